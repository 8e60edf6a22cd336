"""Every equation that was seen in public code: torch operators, Python source, static and dynamic sizes."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import einops
import pytest
import torch

from moe_export.einsum_rewrite import Equation, Plan, einsum, to_python
from moe_export.einsum_rewrite.planner import _plan, make_plan
from moe_export.einsum_rewrite.python_source import NAMES
from moe_export.einsum_rewrite.torch_ops import run

TABLE = Path(__file__).parent / "data" / "equations.tsv"


def _read() -> Iterator[tuple[str, str]]:
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            # NumPy's letters are torch's.
            yield row["equation"], "einops" if row["notation"] == "einops" else "torch"


ROWS = list(_read())
SIZES = (
    (3, 5, 2, 7, 4, 6, 8, 2, 3, 2, 5),
    (2, 1, 3, 1, 5, 2, 3, 1, 2, 4, 1),
    (5, 2, 0, 3, 2, 4, 2, 3, 2, 2, 2),
)
ELLIPSES = ([2, 3], [], [4])


def _shapes(equation: Equation, assignment: int) -> list[list[int]]:
    labels = dict.fromkeys(label for term in equation.inputs for label in term if label != "...")
    sizes = dict(zip(labels, SIZES[assignment], strict=False))
    dots = ELLIPSES[assignment]
    return [
        [n for label in term for n in (dots if label == "..." else [sizes[label]])]
        for term in equation.inputs
    ]


def _operands(shapes: list[list[int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randint(-3, 4, shape, generator=generator) for shape in shapes]


def _dynamic_plan(equation: Equation, shapes: list[list[int]], target: str = "onnx") -> Plan:
    # A size of 1 is static: that is what torch.export makes of it, too.
    return make_plan(equation, [[1 if n == 1 else None for n in shape] for shape in shapes], target=target)


def test_the_table_has_not_shrunk() -> None:
    assert len(ROWS) == 402
    assert sum(notation == "einops" for _, notation in ROWS) == 62


@pytest.mark.parametrize("assignment", range(len(SIZES)))
@pytest.mark.parametrize(("text", "notation"), ROWS)
def test_equal_to_the_peer_in_every_form(text: str, notation: str, assignment: int) -> None:
    equation = Equation.parse(text, notation)
    shapes = _shapes(equation, assignment)
    operands = _operands(shapes)
    if notation == "einops":
        expected, got = einops.einsum(*operands, text), einsum(*operands, text)
    else:
        expected, got = torch.einsum(text, *operands), einsum(text, *operands)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    for target in ("onnx", "torch"):
        assert torch.equal(run(_dynamic_plan(equation, shapes, target), operands), expected)
    for plan in (_dynamic_plan(equation, shapes, "torch"), make_plan(equation, shapes, target="torch")):
        names = (
            NAMES[: len(operands)] if len(operands) <= len(NAMES) else [f"x{k}" for k in range(len(operands))]
        )
        scope = dict(zip(names, operands, strict=True))
        exec(to_python(plan), scope)
        assert torch.equal(scope["out"], expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_few_transposes_and_few_nodes(dynamic: bool) -> None:
    plans = []
    for text, notation in ROWS:
        equation = Equation.parse(text, notation)
        if len(equation.inputs) == 2:
            shapes = _shapes(equation, 0)
            plans.append(_dynamic_plan(equation, shapes) if dynamic else make_plan(equation, shapes))
    transposes = [plan.summary.split(", ").count("permute") for plan in plans]
    nodes = [len(plan.steps) for plan in plans]
    assert len(plans) == 342
    assert sum(transposes) / len(plans) <= 0.95
    assert sum(nodes) / len(plans) <= 2.9
    assert max(transposes) <= 3
    assert max(nodes) <= 6


def test_planning_takes_less_than_two_milliseconds() -> None:
    started, count = time.process_time(), 0
    for text, notation in ROWS:
        equation = Equation.parse(text, notation)
        _plan.cache_clear()
        make_plan(equation, _shapes(equation, 0))
        count += 1
    assert (time.process_time() - started) / count < 2e-3
