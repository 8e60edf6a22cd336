"""The step of transformers' models that keep a cache: from an empty one, token by token, as all tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import hybrid_families
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import slow
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.recurrence.step_cache import step_with_cache
from moe_export.export.recurrence.step_model import present_of
from moe_export.export.recurrence.transformers_cache import find_cached_model
from moe_export.export.tracing.dims import DimRequest

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = 32
MOE = {family.name: family for family in families.FAMILIES}
DECODERS = sorted(set(MOE) - {"switch_transformers", "nllb_moe"})  # encoders and decoders


def subject_of(model: nn.Module) -> Subject:
    ids = torch.randint(3, TOKENS, (2, 7))
    return make_subject(model, (), {"input_ids": ids}, source=Path(__file__), how="a test")


def step_of(model: nn.Module) -> Graph:
    """Without the graph of the whole model."""
    cached = find_cached_model(model)
    assert cached is not None
    step = step_with_cache(subject_of(model), cached)
    options = Options(gates=False, simplify=False, dims=step.dims(DimRequest()))
    return export_subject(step.subject, options)[0]


def check(model: nn.Module, graph: Graph, length: int, tolerance: float = 2e-5) -> None:
    """Batches 1 and 3, starting from no token at all."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [value.name for value in session.get_outputs()]
    for batch in (1, 3):
        ids = torch.randint(3, TOKENS, (batch, length))
        with torch.no_grad():
            found: Any = model(input_ids=ids)
        wanted = (found if torch.is_tensor(found) else found[0]).numpy()
        sizes = {"batch": batch, "past_sequence": 0}
        pasts = {
            value.name: np.zeros([sizes.get(size, size) for size in value.shape], np.float32)
            for value in session.get_inputs() if value.name.startswith("past_")
        }  # fmt: skip
        rows = []
        for place in range(length):
            feed = {"input_ids": ids[:, place : place + 1].numpy(), **pasts}
            made = dict(zip(outputs, session.run(None, feed), strict=True))
            rows.append(made[outputs[0]])
            pasts = {name: made[present_of(name)] for name in pasts}
        error = np.abs(np.concatenate(rows, axis=1) - wanted).max()
        assert error <= tolerance * max(1, np.abs(wanted).max()), error


def mixtral(**more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, **more,
    )  # fmt: skip
    model: nn.Module = transformers.MixtralModel(config).eval()
    return model


def test_names_and_sizes_of_keys_and_values() -> None:
    model = mixtral(sliding_window=None)
    whole, graph = export_subject(subject_of(model), Options(gates=False, simplify=False, decode=True))
    assert (whole.kind, graph.kind) == ("model", "step")
    shapes = {
        value.name: [str(size) for size in value.shape or ()]
        for value in (*graph.model.graph.inputs, *graph.model.graph.outputs)
    }
    assert list(shapes) == [
        "input_ids", "past_key_values.0.key", "past_key_values.0.value",
        "last_hidden_state", "present.0.key", "present.0.value",
    ]  # fmt: skip
    assert shapes["input_ids"] == ["batch", "1"]
    assert shapes["past_key_values.0.key"] == ["batch", "1", "past_sequence", "8"]
    assert shapes["present.0.key"] == ["batch", "1", "past_sequence + 1", "8"]
    assert any("experts" in note and "lowered as" in note for note in graph.notes)
    check(model, graph, 9)


@pytest.mark.slow
@pytest.mark.parametrize("window", [4, slow(70)])
def test_beyond_the_window_of_attention(window: int) -> None:
    """The example has fewer tokens than the longer window: that it ends must not be left out of the trace."""
    model = mixtral(sliding_window=window)
    check(model, step_of(model), window + 12)


@pytest.mark.slow
def test_windows_states_keys_and_values_of_a_hybrid() -> None:
    model = hybrid_families.Last(hybrid_families.slow_path("Jamba"))
    graph = step_of(model)
    names = [value.name for value in graph.model.graph.inputs]
    assert names == [
        "input_ids",
        *(f"past_key_values.{it}" for it in ("0.conv_state", "0.recurrent_state", "1.key", "1.value")),
    ]
    check(model, graph, 9)


@pytest.mark.slow
def test_states_that_a_model_keeps_elsewhere_are_refused() -> None:
    """RecurrentGemma keeps its recurrent states in its modules, and only keys and values in the cache."""
    model = hybrid_families.Last(hybrid_families.slow_path("RecurrentGemma"))
    with pytest.raises(NotExportableError, match="steps one by one give something else"):
        step_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_families_of_experts(name: str) -> None:
    model = MOE[name].build()
    check(model, step_of(model), 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GraniteMoeHybrid", "NemotronH", "Zamba2", "Lfm2"])
def test_hybrid_families(name: str) -> None:
    model = hybrid_families.Last(hybrid_families.by_chunks(name))
    check(model, step_of(model), 12)
