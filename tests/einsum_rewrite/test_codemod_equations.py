"""Equations of NumPy's tests and random ones through the codemod: exactly the integers of the call."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.einsum_rewrite.codemod import rewrite_file
from moe_export.einsum_rewrite.equation import Equation
from moe_export.errors import UsageError

HEAD = "import torch\n"
TABLE = Path(__file__).with_name("data") / "numpy_equations.tsv"
LETTERS = "abcdEF"
LONGEST = 30_000  # elements of the space that an equation ranges over


def _equations() -> list[str]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["equation"] for row in rows if _legal(row["equation"])]


def _legal(equation: str) -> bool:
    try:
        Equation.parse(equation)
    except UsageError:
        return False
    return True


def _source(equations: list[str]) -> str:
    """One function for each equation, on its own lines."""
    functions = []
    for index, equation in enumerate(equations):
        names = ", ".join(f"x{k}" for k in range(len(Equation.parse(equation).inputs)))
        functions.append(f"def f{index}({names}):\n    return torch.einsum({equation!r}, {names})\n")
    return HEAD + "".join(functions)


def _both(source: str, code: str) -> tuple[dict, dict]:
    old: dict = {}
    new: dict = {}
    exec(source, old)
    exec(code, new)
    return old, new


def _operands(equation: str, dots: tuple[int, ...], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    inputs = Equation.parse(equation).inputs
    labels = list(dict.fromkeys(label for term in inputs for label in term))
    size_of = {label: sizes[index % len(sizes)] for index, label in enumerate(labels)}
    generator = torch.Generator().manual_seed(0)
    shapes = [
        [size for label in term for size in (dots if label == "..." else (size_of[label],))]
        for term in inputs
    ]
    return [torch.randint(-2, 3, shape, generator=generator) for shape in shapes]


def test_every_equation_of_numpy_is_rewritten():
    equations = _equations()
    assert len(equations) > 140
    source = _source(equations)
    result = rewrite_file(source)
    assert not result.left
    assert len(result.rewritten) == len(equations)
    old, new = _both(source, result.code)
    for index, equation in enumerate(equations):
        many = len({*equation} - {*",->. "}) > 8
        for dots, sizes in (
            ((2, 3), (2,) if many else (2, 3, 4)),
            ((), (2, 1) if many else (3, 1, 2)),
            ((0,), (2, 1)),
        ):
            operands = _operands(equation, dots, sizes)
            assert torch.equal(old[f"f{index}"](*operands), new[f"f{index}"](*operands)), equation


@st.composite
def equations(draw: st.DrawFn) -> str:
    """An equation without an ellipsis in torch's letters."""
    terms = draw(st.lists(st.text(LETTERS, max_size=4), min_size=1, max_size=3))
    if not draw(st.booleans()):
        return ",".join(terms)
    known = draw(st.permutations(sorted({label for term in terms for label in term})))
    return ",".join(terms) + "->" + "".join(known[: draw(st.integers(0, len(known)))])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(equations(), st.lists(st.sampled_from([0, 1, 2, 2, 3]), min_size=1, max_size=6).map(tuple))
def test_random_equations(equation: str, sizes: tuple[int, ...]):
    source = _source([equation])
    result = rewrite_file(source)
    assert not result.left, result.left
    assert "torch.einsum" not in result.code
    old, new = _both(source, result.code)
    operands = _operands(equation, (), sizes)
    assert torch.equal(old["f0"](*operands), new["f0"](*operands))


@pytest.mark.parametrize("equation", ["ii", "iij->j", "i,i,i", "ab,ab,c->", "->", ","])
def test_small_ones(equation):
    test_random_equations.hypothesis.inner_test(equation, (2, 3))
