"""Decoders of modules that keep something in an object of a class of their own, however it goes in and comes out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import own_doors
import pytest
import torch
from slow_cases import slow
from torch import Tensor, nn

from moe_export.comparing.decoding import with_decoding
from moe_export.errors import NotExportableError
from moe_export.export.decoder.decoder import Decoder, decoder_of
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, export_subject
from moe_export.running.choices import runner_of
from moe_export.verify import Report, Tolerance

CACHE = [f"past_key_values.{part}_cache.{layer}" for part in ("key", "value") for layer in (0, 1)]


def subject_of(kind: type[nn.Module], more: dict[str, Any] | None = None) -> Subject:
    module, inputs = own_doors.made(kind), own_doors.example(more or {})
    return make_subject(module, (), inputs, source=Path(__file__), how="a test")


def decoder(name: str) -> Decoder:
    return decoder_of(subject_of(*own_doors.KINDS[name]))


@pytest.mark.parametrize("name", ["optional", "in place"])
def test_a_cache_of_lists_that_grow(name):
    found = decoder(name)
    assert list(found.subject.inputs) == ["input_ids", *CACHE]
    assert found.subject.outputs == (
        "logits",
        *(name.replace("past_key_values", "present") for name in CACHE),
    )
    assert [place for place, size in found.free.items() if size == "past_sequence"] == [
        (name, 2) for name in CACHE
    ]


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("filled", ["past_key_values.rows.0", "past_key_values.rows.1"]),
        ("written", ["past_key_values.0"]),
        ("returned", ["past_key_values.first", "past_key_values.second"]),
        ("recurrent", ["past_key_values.h", "past_key_values.c"]),
    ],
)
def test_states_in_objects(name, states):
    found = decoder(name)
    assert list(found.subject.inputs) == ["input_ids", *states]
    assert len(found.subject.outputs) == 1 + len(states)
    assert set(found.free.values()) == {"batch", "sequence"}


def test_the_batch_need_not_be_the_first_axis():
    assert decoder("recurrent").free["past_key_values.h", 1] == "batch"


def test_the_example_is_not_written_into():
    states = own_doors.States()
    inputs = {"input_ids": torch.randint(3, own_doors.WORDS, (2, 7)), "states": states}
    subject = make_subject(own_doors.made(own_doors.Filled), (), inputs, source=Path(__file__), how="a test")
    decoder_of(subject)
    assert states.rows == [None, None]


def test_a_count_of_tokens_that_no_tensor_tells_is_refused():
    wanted = r"cache\.seen counts tokens in a Python int, and no tensor beside it has one entry a token"
    with pytest.raises(NotExportableError, match=wanted) as caught:
        decoder_of(subject_of(own_doors.Counts, {"cache": own_doors.Seen}))
    assert caught.value.where == __file__
    assert "take it from position_ids" in caught.value.hint


class Forgets(own_doors.Optional):
    """Returns what it was given."""

    def forward(self, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        before = copy.deepcopy(cache)
        logits, after = super().forward(input_ids, cache)
        return logits, after if before is None else before


def test_a_cache_that_does_not_become_the_next_is_refused():
    with pytest.raises(NotExportableError, match="is not what the model gives for all at once"):
        decoder_of(subject_of(Forgets))


class Numbered(own_doors.Optional):
    """Numbers the tokens of each call anew."""

    def forward(self, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        after = own_doors.MyCache() if cache is None else cache
        after.seen_tokens = 0
        return super().forward(input_ids, after)


def test_what_is_not_kept_is_refused():
    wanted = "logits of 9 tokens one by one is not what the model gives for all at once"
    with pytest.raises(NotExportableError, match=wanted):
        decoder_of(subject_of(Numbered))


class Several(own_doors.Optional):
    """Refuses a single token once it has seen some."""

    def forward(self, input_ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        if cache is not None and input_ids.shape[1] < 2:
            raise ValueError("too few tokens")
        return super().forward(input_ids, cache)


def test_tokens_that_cannot_be_run_in_parts_are_refused():
    with pytest.raises(NotExportableError, match="9 tokens one by one cannot be run: too few tokens"):
        decoder_of(subject_of(Several))


@pytest.mark.parametrize("name", [slow(name) for name in own_doors.KINDS])
def test_in_parts_as_at_once(name, tmp_path):
    graph = export_subject(
        subject_of(*own_doors.KINDS[name]), Options(gates=False, simplify=False, decoder=True)
    )[0]
    path = tmp_path / "model.onnx"
    write_model(graph.model, path)
    report = with_decoding(
        Report("torch", "graph", ()), runner_of(path, "cpu"), graph.reference, Tolerance(), 0
    )
    assert report.verdict == "equal", str(report)
    # Weights have the names of the user's module, not of what is built around it.
    assert "words.weight" in graph.model.graph.initializers
