"""Steps that compute with their own number fold, and are right at lengths that nobody traced."""

from __future__ import annotations

from pathlib import Path

import loops_that_count as counting
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import slow

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.recurrence.recurrences import fold_recurrences
from moe_export.export.tracing.dims import DimRequest

LENGTHS = (1, 2, 3, 5, 13, 64, 1000)
STEPS = counting.INTEGERS | counting.FLOATS
# In one loop; each by itself takes seconds to export, and is run with the slow tests.
TOGETHER = {
    "integers": ("running mean", "exponent", "compared", "a tensor of it"),
    "floats": ("part of the last", "power from the end", "bias correction", "of the length alone"),
}


def subject_of(*steps: counting.StepOf) -> Subject:
    example = torch.randn(2, counting.L, counting.D, generator=torch.Generator().manual_seed(0))
    module = counting.Counting(*steps)
    return make_subject(module, (example,), {}, source=Path(counting.__file__), how="a test")


def exported(subject: Subject) -> Graph:
    return export_subject(subject, Options(gates=False, simplify=False, recurrence="scan"))[0]


def check(subject: Subject) -> None:
    """One Scan, as near to a run in float64 as PyTorch is, at all lengths."""
    graph = exported(subject)
    assert sum(node.op_type == "Scan" for node in graph.model.graph) == 1
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in LENGTHS:
        x = torch.randn(3, length, counting.D, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            wanted = subject.call([x])[0].numpy()
        found = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=f"length {length}")


@pytest.mark.parametrize("name", list(TOGETHER))
@pytest.mark.slow_but_one
def test_they_fold_together_for_any_length(name: str) -> None:
    check(subject_of(*(STEPS[step] for step in TOGETHER[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STEPS))
def test_each_folds_for_any_length(name: str) -> None:
    check(subject_of(STEPS[name]))


@pytest.mark.parametrize("dtype", [slow(torch.float64), torch.float16])
def test_numbers_are_rounded_as_the_model_rounds_them(dtype: torch.dtype) -> None:
    """In half precision PyTorch multiplies by a number in float32."""
    module = counting.Counting(STEPS["running mean"], STEPS["power"]).to(dtype)
    x = torch.randn(2, counting.L, counting.D, dtype=dtype, generator=torch.Generator().manual_seed(0))
    subject = make_subject(module, (x,), {}, source=Path(counting.__file__), how="a test")
    folded = fold_recurrences(subject, DimRequest(static=True, picked={("x", 1): "sequence"}), "scan").subject
    longer = x.repeat(1, 9, 1)
    with torch.no_grad():
        torch.testing.assert_close(folded.call([longer]), subject.call([longer]))


def test_integers_and_their_ratios_need_no_float64() -> None:
    graph = exported(subject_of(counting.FLOATS["part of the length"]))
    types = {value.dtype for node in graph.model.graph.all_nodes() for value in node.outputs}
    assert ir.DataType.DOUBLE not in types


@pytest.mark.parametrize(
    "name",
    ["one that stops", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a table", "shifts"))],
)
def test_numbers_without_a_closed_form_are_refused_with_the_steps_and_the_line(name: str) -> None:
    step, reason = counting.REFUSED[name]
    with pytest.raises(NotExportableError, match=reason) as caught:
        fold_recurrences(subject_of(step), DimRequest(), "scan")
    file, _, line = str(caught.value.where).rpartition(":")
    text = Path(file).read_text(encoding="utf-8").splitlines()
    assert text[int(line) - 1].lstrip().startswith("lambda m, h, x, t, n:")
    assert int(line) == step.__code__.co_firstlineno


def test_steps_that_are_not_alike_are_named_with_their_line() -> None:
    # The sequence of Thue and Morse: nothing in it stands three times in a row.
    subject = subject_of(lambda m, h, x, t, n: torch.tanh(h) if t.bit_count() % 2 else h * x)
    with pytest.raises(NotExportableError, match="not alike: in turns, they compute mul, tanh") as caught:
        fold_recurrences(subject, DimRequest(), "scan")
    file, _, line = str(caught.value.where).rpartition(":")
    assert "t.bit_count()" in Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
