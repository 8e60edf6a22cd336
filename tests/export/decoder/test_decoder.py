"""A decoder: any number of new tokens after any number of earlier ones is what the model gives for all at once."""

from __future__ import annotations

from pathlib import Path

import families
import hybrid_families
import numpy as np
import pytest
import torch
from optimum_feeding import NEW, Fed
from torch import nn

from moe_export.comparing.checking import verify_graph
from moe_export.comparing.decoding import with_decoding
from moe_export.errors import NotExportableError
from moe_export.export.decoder.decoder import decoder_of
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.running.choices import runner_of
from moe_export.verify import Report, Tolerance

BY_NAME = {family.name: family for family in families.FAMILIES}
ATTEND_ONLY = sorted(set(BY_NAME) - {"switch_transformers", "nllb_moe", "jamba"})

CHUNKED = {"Zamba2": 2, "FalconH1": 2}


def subject_of(model: nn.Module) -> Subject:
    return make_subject(
        model, (), {"input_ids": torch.randint(3, 32, (2, 7))}, source=Path(__file__), how="a test"
    )


def exported(model: nn.Module) -> Graph:
    return export_subject(subject_of(model), Options(gates=False, simplify=False, decoder=True))[0]


def decoded(graph: Graph, folder: Path, wrap=lambda runner: runner) -> Report:
    path = folder / "model.onnx"
    write_model(graph.model, path)
    return with_decoding(
        Report("torch", "graph", ()), wrap(runner_of(path, "cpu")), graph.reference, Tolerance(), 0
    )


@pytest.fixture(scope="module")
def mixtral() -> Graph:
    return exported(BY_NAME["mixtral"].build_lm())


def test_names_and_sizes(mixtral):
    inputs = {value.name: [str(size) for size in value.shape] for value in mixtral.model.graph.inputs}
    (ids, mask, positions, key, *_), names = inputs.values(), list(inputs)
    assert names[:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert ids == positions == ["batch", "sequence"]
    assert mask == ["batch", "past_sequence + sequence"]
    assert (key[0], key[2]) == ("batch", "past_sequence")
    outputs = {value.name: [str(size) for size in value.shape] for value in mixtral.model.graph.outputs}
    assert outputs["logits"][:2] == ["batch", "sequence"]
    assert outputs["present.0.key"][2] == "past_sequence + sequence"


def test_it_is_right_without_earlier_tokens(mixtral):
    assert {dim.name: dim.minimum for dim in mixtral.traced.dims} == {
        "batch": 1,
        "sequence": 1,
        "past_sequence": 0,
    }


def test_in_parts_as_at_once(mixtral, tmp_path):
    report = decoded(mixtral, tmp_path)
    assert report.verdict == "equal", str(report)
    labels = [case.label for case in report.cases]
    assert labels[:2] == ["prompt at once", "token by token"]
    assert labels[-1] == "a text of 64 tokens"
    assert {row.output for row in report.rows} == {"logits", "next_token"}


def test_names_and_order_that_optimum_looks_for(mixtral, tmp_path):
    write_model(mixtral.model, tmp_path / "model.onnx")
    model = mixtral.reference.module.whole.subject.module
    prompt, mask = torch.tensor([[0, 0, 5, 17, 9], [8, 30, 4, 21, 6]]), torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    model.generation_config.eos_token_id = None  # the text has a length, and no end
    wanted = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    found = Fed(tmp_path / "model.onnx", model.config).generate(prompt.numpy(), mask.numpy())
    assert found.tolist() == wanted.tolist()


class Broken:
    """A decoder that gets other inputs than it was given."""

    def __init__(self, runner, change):
        self.name, self.inputs, self.outputs = runner.name, runner.inputs, runner.outputs
        self._runner, self._change = runner, change

    def run(self, inputs):
        return self._runner.run(self._change(dict(inputs)))


def first_key_forgotten(inputs):
    return inputs | {"past_key_values.0.key": np.zeros_like(inputs["past_key_values.0.key"])}


def mask_not_read(inputs):
    return inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])}


def stands_still(inputs):
    return inputs | {"position_ids": inputs["position_ids"] * 0}


@pytest.mark.parametrize("change", [first_key_forgotten, mask_not_read, stands_still])
def test_a_wrong_decoder_is_not_equal(mixtral, tmp_path, change):
    report = decoded(mixtral, tmp_path, lambda runner: Broken(runner, change))
    assert report.verdict == "not equal"


@pytest.mark.slow
def test_verification_runs_both(mixtral, tmp_path):
    write_model(mixtral.model, tmp_path / "model.onnx")
    report, _ = verify_graph(mixtral, tmp_path / "model.onnx", tolerance=Tolerance())
    labels = [case.label for case in report.cases]
    assert "example" in labels
    assert "token by token" in labels
    assert report.verdict == "equal", str(report)


def test_a_batch_that_is_fixed(mixtral):
    subject = subject_of(BY_NAME["mixtral"].build_lm())
    dims = decoder_of(subject).dims(DimRequest(static=True, picked={("input_ids", 1): None}))
    assert not any(axis == 0 for _, axis in dims.picked)
    assert dims.picked["past_key_values.0.key", 2] == "past_sequence"


def test_proving_it_copies_no_weights_of_experts(monkeypatch):
    """The way that is traced looks them up for each pair of a token and an expert; the model's own loop does not."""
    from transformers.integrations import moe

    subject = subject_of(BY_NAME["mixtral"].build_lm())
    layers = list(subject.module.model.layers)
    assert all(hasattr(layer.mlp.experts, "gate_up_proj") for layer in layers)

    def copied(*_):
        raise AssertionError("weights were copied for each pair")

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "batched_mm", copied)
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "grouped_mm", copied)
    assert "past_key_values.0.key" in decoder_of(subject).subject.inputs


def test_what_has_no_decoder_is_refused():
    made = nn.Sequential(nn.Embedding(32, 4))
    subject = make_subject(made, (torch.randint(3, 32, (2, 7)),), {}, source=Path(__file__), how="a test")
    with pytest.raises(NotExportableError, match="no part that takes a cache, returns nothing that it takes"):
        decoder_of(subject)


class LooksBack(nn.Module):
    """Adds the mean of all tokens that it is given, which no cache holds."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BY_NAME["mixtral"].build_lm()

    def forward(self, input_ids):
        logits = self.model(input_ids=input_ids).logits
        return logits + logits.mean(1, keepdim=True)


class Last(nn.Module):
    """Gives the logits of the last token alone, as servers want them, or a mean over all tokens."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.model, self.mean = BY_NAME["mixtral"].build_lm(), mean

    def forward(self, input_ids):
        logits = self.model(input_ids=input_ids).logits
        return logits.mean() if self.mean else logits[:, -1]


@pytest.mark.slow
def test_logits_of_the_last_token(tmp_path):
    graph = exported(Last())
    report = decoded(graph, tmp_path)
    assert report.verdict == "equal", str(report)
    assert len(report.rows) == 1
    assert decoded(graph, tmp_path, lambda runner: Broken(runner, first_key_forgotten)).verdict == "not equal"


def test_outputs_of_no_token_are_refused():
    with pytest.raises(NotExportableError, match="no output is one of a token"):
        decoder_of(subject_of(Last(mean=True)))


def test_what_a_cache_does_not_hold_is_refused():
    with pytest.raises(NotExportableError, match="is not what the model gives for all at once"):
        decoder_of(subject_of(LooksBack()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTEND_ONLY)
def test_families(name, tmp_path):
    report = decoded(exported(BY_NAME[name].build_lm()), tmp_path)
    assert report.verdict == "equal", str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Lfm2", "Lfm2Moe", "Bamba", "GraniteMoeHybrid", "NemotronH", "Zamba2", "FalconH1", "Mamba2"],
)
def test_families_with_windows_and_states(name, tmp_path):
    graph = exported(hybrid_families.by_chunks(name))
    inputs = {value.name: [str(size) for size in value.shape] for value in graph.model.graph.inputs}
    window = inputs["past_key_values.0.conv_state"]
    assert window[0] == "batch"
    assert window[2].isdecimal()
    branches = sum(node.op_type == "If" for node in graph.model.graph)
    assert branches == (
        0 if name.startswith("Lfm2") else CHUNKED.get(name, 1)
    )  # one for each layer of chunks
    report = decoded(graph, tmp_path)
    assert report.verdict == "equal", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Jamba"])
def test_recurrences_that_the_library_starts_from_zeros(name, tmp_path):
    graph = exported(hybrid_families.slow_path(name))
    assert any(value.name == "past_key_values.0.recurrent_state" for value in graph.model.graph.inputs)
    report = decoded(graph, tmp_path)
    assert report.verdict == "equal", str(report)


@pytest.mark.slow
def test_a_state_that_goes_in_by_another_name(tmp_path):
    graph = exported(hybrid_families.states_by_argument())
    assert [value.name for value in graph.model.graph.inputs][1:] == [
        f"past_key_values.{i}" for i in range(5)
    ]
    report = decoded(graph, tmp_path)
    assert report.verdict == "equal", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3Next", "Qwen3_5Moe"])
def test_a_delta_rule_beside_attention(name, tmp_path):
    graph = exported(hybrid_families.delta_and_attention(name))
    assert not any("chunks" in note for note in graph.notes)  # a token alone would take as long as 8
    report = decoded(graph, tmp_path)
    assert report.verdict == "equal", str(report)
