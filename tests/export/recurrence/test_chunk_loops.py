"""Loops that take several places per iteration, the last of them filled up: any length, not only multiples of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_export.domain import Domain
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.recurrence.agreement import Agreement
from moe_export.export.recurrence.form import (
    Form,
    FormError,
    TracedLengths,
    form_of,
    form_of_one,
    moved,
    scaled,
)
from moe_export.export.recurrence.recurrences import fold_recurrences
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.lengths import Length, chunk_of

CHUNK = 3


class Filled(nn.Module):
    """Linear attention over chunks: all pairs within a chunk, a state for what was before it."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        missing = -length % CHUNK
        if self.always or missing:
            x = functional.pad(x, (0, 0, 0, missing))
        chunks = x.view(b, -1, CHUNK, d)
        mask, state, found = torch.ones(CHUNK, CHUNK).tril(), x.new_zeros(b, d, d), []
        for t in range(chunks.shape[1]):
            now = chunks[:, t]
            found.append((now @ now.mT * mask) @ now + now @ state)
            state = state * 0.5 + now.mT @ now
        return torch.cat(found, 1)[:, :length]


class Copied(Filled):
    """One that copies what is not contiguous, as one place is: it runs fewer operators at length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT.contiguous().mT)


class Together(nn.Module):
    """Over chunks so long that the first traces have one: the tracer leaves both lengths free up to its end."""

    CHUNK = 8

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b, length, d = x.shape
        missing = -y.shape[1] % self.CHUNK
        if missing:
            x, y = (functional.pad(each, (0, 0, 0, missing)) for each in (x, y))
        count = x.shape[1] // self.CHUNK
        first, second = (each.view(b, count, self.CHUNK, -1) for each in (x, y))
        state, out = x.new_zeros(b, d), torch.zeros_like(second)
        for t in range(count):
            state = state * 0.5 + first[:, t].sum(1)
            out[:, t] = second[:, t] * state[:, None]
        return out.reshape(b, -1, d)[:, :length]


class Whole(nn.Module):
    """Takes whole chunks only, and nothing reads the state after the last of them."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, x: Tensor) -> Tensor:
        b, length, d = x.shape
        assert length % self.chunk == 0
        chunks = x.view(b, -1, self.chunk, d)
        state, found = x.new_zeros(b, d, d), torch.zeros_like(chunks)
        for t in range(length // self.chunk):
            now = chunks[:, t]
            found[:, t] = (now @ now.mT).tril() @ now + now @ state
            state = state * 0.5 + now.mT @ now
        return found.reshape(b, length, d)


class Ragged(nn.Module):
    """The last chunk may be shorter: it is an iteration of its own behind the loop."""

    def __init__(self, chunk: int = CHUNK) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, x: Tensor) -> Tensor:
        total, found = torch.zeros_like(x[:, :1]), []
        for t in range(0, x.shape[1], self.chunk):
            now = x[:, t : t + self.chunk].cumsum(1) + total
            total = torch.tanh(now[:, -1:])
            found.append(now)
        return torch.cat(found, 1)


def subject_of(module: nn.Module) -> Subject:
    return make_subject(module.eval(), (torch.randn(2, 7, 2) / 4,), {}, source=Path(__file__), how="a test")


def exported(subject: Subject) -> Graph:
    return export_subject(subject, Options(gates=False, simplify=False))[0]


@pytest.mark.parametrize(
    ("module", "iterations"),
    [
        pytest.param(Filled(True), "(L + 2) // 3 steps", marks=pytest.mark.slow),
        pytest.param(Filled(False), "(L + 2) // 3 steps", marks=pytest.mark.slow),
    ],
    ids=["filled up", "filled up where it is short"],
)
def test_chunks_hold_for_any_length(module: nn.Module, iterations: str) -> None:
    subject = subject_of(module)
    graph = exported(subject)
    assert iterations in graph.notes[0]
    assert_right_at_any_length(subject, graph)


@pytest.mark.slow
def test_inputs_that_have_one_length_are_cut_into_chunks_together() -> None:
    args = (torch.randn(2, 13, 2), torch.randn(2, 13, 2))
    subject = make_subject(Together().eval(), args, {}, source=Path(__file__), how="a test")
    graph = exported(subject)
    assert "(L + 7) // 8 steps for L = x.shape[1] and y.shape[1]" in graph.notes[0]
    assert len(set(graph.traced.inputs.values())) == 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for length in (1, 2, 7, 8, 9, 16, 17, 40):
        given = {name: torch.randn(3, length, 2) for name in ("x", "y")}
        (wanted,) = subject.call_named(given)
        (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def assert_right_at_any_length(subject: Subject, graph: Graph) -> None:
    (sequence,) = (dim for dim in graph.traced.dims if dim.name == "sequence")
    assert sequence.minimum <= 2
    assert sequence.maximum is None
    assert_right_where_it_claims_to_be(subject, graph)


def assert_right_where_it_claims_to_be(subject: Subject, graph: Graph) -> None:
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    (sequence,) = (dim for dim in graph.traced.dims if dim.name == "sequence")
    for length in (1, 2, 3, 4, 6, 11, 12, 40):
        if (
            length < sequence.minimum
            or length > (sequence.maximum or length)
            or not Domain(graph.traced.conditions).holds({"sequence": length, "batch": 3})
        ):
            continue
        x = torch.randn(3, length, 2) / 4
        (wanted,) = subject.call_named({"x": x})
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_length_that_the_tracer_takes_for_a_number_all_the_same_is_that_of_the_example() -> None:
    """Where the shorter chunk has a size of one, the tracer fixes it; in a long process it sometimes does not."""
    subject = subject_of(Ragged())
    graph = exported(subject)
    if graph.traced.inputs["x"][1] == 7:
        assert "the loop over x:1 cannot be folded" in graph.notes[0]
    else:
        assert_right_where_it_claims_to_be(subject, graph)


def test_the_places_of_an_iteration_are_seen_in_the_operators() -> None:
    length = Length((("x", 1),))
    assert chunk_of(subject_of(Filled(True)), length) == CHUNK
    assert chunk_of(subject_of(Filled(False)), length) == CHUNK
    assert chunk_of(subject_of(Copied(False)), length) == CHUNK
    assert chunk_of(subject_of(Ragged()), length) == CHUNK
    assert chunk_of(subject_of(nn.Tanh()), Length((("input", 1),))) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (lambda n: -(-n // 16), "(L + 15) // 16"),
        (lambda n: 3 * (n // 4) + 1, "3 * (L // 4) + 1"),
        (lambda n: -n % 16, "16 * ((L + 15) // 16) - L"),
        (lambda n: n % 5, "-5 * (L // 5) + L"),
    ],
)
def test_numbers_of_chunks(number, text) -> None:
    chunk = int(text.rpartition("//")[2].split()[0].rstrip(")"))
    lengths = (3 * chunk + 1, 4 * chunk + chunk // 2, 6 * chunk, 8 * chunk - 1)
    form = form_of({length: number(length) for length in lengths})
    assert str(form) == text
    assert form is not None
    assert [form.at(length) for length in range(1, 200)] == [number(length) for length in range(1, 200)]


NUMBERS = {
    "chunks begun": lambda n, chunk: -(-n // chunk),
    "all but one of them": lambda n, chunk: -(-n // chunk) - 1,
    "two rows of them": lambda n, chunk: -(-n // chunk) * 2,
    "full chunks": lambda n, chunk: n // chunk,
    "padded": lambda n, chunk: -(-n // chunk) * chunk,
    "padding": lambda n, chunk: -n % chunk,
    "cut off": lambda n, chunk: n // chunk * chunk,
    "rest": lambda n, chunk: n % chunk,
}


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("full chunks", "cut off", "rest")])
def test_without_a_whole_number_of_chunks_those_begun_are_meant(name: str) -> None:
    """At these lengths full chunks are the same as all but one of those begun; the fold's proof tells them apart."""
    number = NUMBERS[name]
    for chunk in range(3, 65):
        lengths = (3 * chunk + 1, 4 * chunk + chunk // 2, 6 * chunk - 1, 8 * chunk - 1)
        form = form_of({length: number(length, chunk) for length in lengths}, chunk)
        assert form is not None, chunk
        assert [form.at(n) for n in range(1, 600)] == [number(n, chunk) for n in range(1, 600)], chunk


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_chunks_of_every_size_are_told_apart(name: str) -> None:
    """At the lengths that are traced, other sizes of chunks give the same numbers: 6 * (L // 5) - L - 1 for 8."""
    number = NUMBERS[name]
    for chunk in range(2, 65):
        lengths = (3 * chunk + 1, 4 * chunk + chunk // 2, 6 * chunk, 8 * chunk - 1)
        form = form_of({length: number(length, chunk) for length in lengths}, chunk)
        assert form is not None, chunk
        assert [form.at(n) for n in range(1, 600)] == [number(n, chunk) for n in range(1, 600)], chunk


def test_sums_and_multiples_of_rounded_numbers() -> None:
    chunks, length = Form(1, 3, 4), Form(1, -2)
    for made, wanted in (
        (moved(length, chunks), lambda n: n - 2 + (n + 3) // 4),
        (moved(scaled(chunks, 4), scaled(length, -1)), lambda n: (n + 3) // 4 * 4 - n + 2),
        (moved(moved(length, chunks), scaled(chunks, -1)), lambda n: n - 2),
    ):
        assert [made.at(n) for n in range(1, 30)] == [wanted(n) for n in range(1, 30)]
    with pytest.raises(FormError, match="rounded differently"):
        moved(chunks, Form(1, 0, 4))
    with pytest.raises(FormError, match="different lengths"):
        moved(length, Form(1, 0, of=1))


def test_a_number_of_one_of_two_lengths() -> None:
    sizes = TracedLengths(((6, 7), (7, 9), (9, 10)))
    assert form_of_one(sizes, [5, 7, 8]) == Form(1, -2, of=1)
    assert form_of_one(sizes, [12, 14, 18]) == Form(2, 0)
    assert form_of_one(sizes, [100, 7, 52]) is None


@pytest.mark.parametrize(
    ("chunk", "shown"),
    [(8, 3), pytest.param(8, 2, marks=pytest.mark.slow), pytest.param(16, 3, marks=pytest.mark.slow)],
)
def test_a_model_that_takes_whole_chunks_only_has_any_number_of_them(chunk: int, shown: int) -> None:
    """At three chunks, two whole iterations are in a trace, which is no loop; and its number is no (L - 4) // 7."""
    model = Whole(chunk)
    example = torch.randn(2, shown * chunk, 4, generator=torch.Generator().manual_seed(0))
    subject = make_subject(model, (example,), {}, source=Path(__file__), how="a test")
    recurrent = fold_recurrences(subject, DimRequest())
    assert recurrent.lengths, recurrent.notes
    assert f"// {chunk} steps" in recurrent.notes[0]
    for count in (1, 2, 3, 4, 7, 15, 40):
        x = torch.randn(2, count * chunk, 4, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(recurrent.subject.call([x])[0], model(x), rtol=1e-4, atol=1e-4)


def test_where_a_model_takes_multiples_only_these_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4, 5 and 7 chunks of 8, (L - 4) // 7 is as many as L // 8; a model refuses most lengths that tell."""
    compared: list[tuple[int, ...]] = []
    at = Agreement.at

    def watched(agreement: Agreement, sizes: tuple[int, ...]) -> bool | None:
        same = at(agreement, sizes)
        if same is not None:
            compared.append(sizes)
        return same

    monkeypatch.setattr(Agreement, "at", watched)
    example = torch.randn(2, 24, 4, generator=torch.Generator().manual_seed(0))
    subject = make_subject(Whole(8), (example,), {}, source=Path(__file__), how="a test")
    assert fold_recurrences(subject, DimRequest()).lengths
    assert {(8,), (16,), (24,), (40,), (104,)} <= set(compared)
