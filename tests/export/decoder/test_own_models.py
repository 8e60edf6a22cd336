"""Decoders of modules of a user's own: with states at their door, and of what keeps nothing but loops over tokens."""

from __future__ import annotations

from pathlib import Path

import own_hybrids
import pytest
import torch
from slow_cases import slow
from torch import Tensor, nn

from moe_export.comparing.decoding import with_decoding
from moe_export.errors import NotExportableError
from moe_export.export.decoder.decoder import decoder_of
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.running.choices import runner_of
from moe_export.verify import Report, Tolerance

MODELS = Path(__file__).parents[3] / "models"


def subject_of(model: nn.Module, example: dict[str, object] | None = None) -> Subject:
    inputs = own_hybrids.example(model) if example is None else example
    return make_subject(model.eval(), (), inputs, source=Path(__file__), how="a test")


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


class Running(nn.Module):
    """A state in a list; or, if it forgets, one that it returns as it was given."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.words, self.forgets = nn.Embedding(30, 8), forgets

    def forward(self, input_ids: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        x, h, ys = self.words(input_ids), states[0], []
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t]
            ys.append(h)
        return torch.stack(ys, 1), [states[0] * 1 if self.forgets else h]


def running(forgets: bool = False) -> Subject:
    torch.manual_seed(0)
    ids = torch.randint(3, 30, (2, 7))
    return subject_of(Running(forgets), {"input_ids": ids, "states": [torch.zeros(2, 8)]})


def test_states_at_the_door_have_the_names_that_runtimes_know():
    decoder = decoder_of(running())
    assert list(decoder.subject.inputs) == ["input_ids", "past_key_values.0"]
    assert decoder.subject.outputs[-1] == "present.0"
    assert decoder.dims(DimRequest()).picked == {
        ("input_ids", 0): "batch",
        ("input_ids", 1): "sequence",
        ("past_key_values.0", 0): "batch",
    }


def test_a_state_that_is_not_handed_on_is_refused():
    with pytest.raises(NotExportableError, match="one by one is not what the model gives for all at once"):
        decoder_of(running(forgets=True))


@pytest.mark.parametrize("kind", [own_hybrids.Stateful, own_hybrids.Tuples])
def test_what_layers_keep_is_named_by_its_path(kind):
    decoder = decoder_of(subject_of(made(kind)))
    names = list(decoder.subject.inputs)
    parts = ["window", "state", "keys", "values"] if kind is own_hybrids.Stateful else ["0", "1", "2", "3"]
    assert names == ["input_ids", *(f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in parts)]
    grown = [name for (name, _), size in decoder.dims(DimRequest()).picked.items() if size == "past_sequence"]
    assert grown == [names[3], names[4], names[7], names[8]]


@pytest.mark.parametrize(
    "name", [slow("Plain"), slow("Shifted"), slow("Stateful"), slow("Tuples"), slow("hybrid.py")]
)
def test_in_parts_as_at_once(name, tmp_path):
    own = getattr(own_hybrids, name, None)
    subject = load_subject(str(MODELS / name)) if own is None else subject_of(made(own))
    graph = export_subject(subject, Options(gates=False, simplify=False, decoder=True))[0]
    path = tmp_path / "model.onnx"
    write_model(graph.model, path)
    report = with_decoding(
        Report("torch", "graph", ()), runner_of(path, "cpu"), graph.reference, Tolerance(), 0
    )
    assert report.verdict == "equal", str(report)
    keys = [value for value in graph.model.graph.inputs if value.name.endswith((".key", ".keys"))]
    assert all(str(value.shape[2]) == "past_sequence" for value in keys if len(value.shape) == 4)
