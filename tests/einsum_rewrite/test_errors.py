"""What a user reads after a mistake: what is wrong, a caret under it, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_export.einsum_rewrite import einsum, plan_einsum, to_python
from moe_export.errors import EquationError, UsageError


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


CASES: list[tuple[Callable[[], object], str]] = [
    (
        lambda: einsum("ij,jk->ix", _zeros(2, 3), _zeros(3, 4)),
        """
label 'x' is in the output, and no operand has it
  where: ij,jk->ix
                 ^
  hint: the operands' labels are: i, j, k""",
    ),
    (
        lambda: einsum("ij,jk->ikk", _zeros(2, 3), _zeros(3, 4)),
        """
label 'k' is twice in the output
  where: ij,jk->ikk
                  ^
  hint: name each axis of the result once; a diagonal can be read, not written""",
    ),
    (
        lambda: einsum("ij,jk->ik", _zeros(2, 3), _zeros(3, 4, 5)),
        """
operand 1 has 3 dimensions but its subscript names 2
  where: ij,jk->ik
            ^
  hint: its shape is (3, 4, 5); '...' stands for dimensions that are not named""",
    ),
    (
        lambda: einsum("b...ij->b", _zeros(2, 3)),
        """
operand 0 has 2 dimensions but its subscript names at least 3
  where: b...ij->b
         ^
  hint: its shape is (2, 3)""",
    ),
    (
        lambda: einsum("b...i,bi->b", _zeros(2, 3), _zeros(3, 3)),
        """
label 'b' is 2 in operand 0 and 3 in operand 1
  where: b...i,bi->b
               ^
  hint: give the operands equal sizes there (or 1, which is broadcast), or use different labels""",
    ),
    (
        lambda: einsum("...ab,c...b->...a", _zeros(5, 2, 3), _zeros(6, 4, 3)),
        """
dimension 0 of '...' is 5 in operand 0 and 4 in operand 1
  where: ...ab,c...b->...a
                ^
  hint: give the operands equal sizes there (or 1, which is broadcast), or use different labels""",
    ),
    (
        lambda: einsum("...abc,...c->...a", _zeros(7, 2, 9, 3), _zeros(7, 4)),
        """
label 'c' is 3 in operand 0 and 4 in operand 1
  where: ...abc,...c->...a
                   ^
  hint: give the operands equal sizes there (or 1, which is broadcast), or use different labels""",
    ),
    (
        lambda: einsum("ii->i", _zeros(2, 3)),
        """
label 'i' is 2 and 3 in operand 0, which repeats it
  where: ii->i
          ^
  hint: a repeated label takes the diagonal, so both dimensions must be equal""",
    ),
    (
        lambda: einsum("ij,jk", _zeros(2, 3)),
        """
the equation names 2 operands and got 1
  where: ij,jk
  hint: one term between commas for each operand""",
    ),
    (
        lambda: einsum("ij..->i", _zeros(2, 3)),
        """
'.' has no meaning here
  where: ij..->i
           ^
  hint: an ellipsis is three dots in a row: '...'""",
    ),
    (
        lambda: einsum("i...j...", _zeros(2, 3)),
        """
an operand has two ellipses
  where: i...j...
              ^
  hint: one '...' an operand: it stands for all the axes that are not named""",
    ),
    (
        lambda: einsum("i,d_in->i", _zeros(2), _zeros(3)),
        """
'_' has no meaning here
  where: i,d_in->i
            ^
  hint: a label is one of the letters a-z and A-Z; names such as `d_in` are einops notation, where the pattern comes last""",  # noqa: E501
    ),
    (
        lambda: einsum("ij->i->j", _zeros(2, 3)),
        """
'-' has no meaning here
  where: ij->i->j
              ^
  hint: there is one '->', between the operands and the output""",
    ),
    (
        lambda: einsum(_zeros(2, 3), "a b"),
        """
an einops pattern must contain '->'
  where: a b
            ^
  hint: write the axes of the result after '->'; nothing after it means a scalar""",
    ),
    (
        lambda: einsum(_zeros(2, 6), "a (b c) -> a"),
        """
'(' has no meaning here
  where: a (b c) -> a
           ^
  hint: einsum has no axes in parentheses: reshape (or einops.rearrange) the operand first""",
    ),
    (
        lambda: einsum(_zeros(2, 1), "a 1 -> a"),
        """
'1' has no meaning here
  where: a 1 -> a
           ^
  hint: an axis is a name such as `b` or `d_in`; one of size 1 needs a name, too, or is squeezed first""",
    ),
    (
        lambda: einsum(_zeros(2, 3), "batch dim -> heads"),
        """
label 'heads' is in the output, and no operand has it
  where: batch dim -> heads
                      ^
  hint: the operands' labels are: batch, dim""",
    ),
    (
        lambda: einsum(_zeros(2, 3), [0, 52]),
        """
52 is no subscript: the sublist form takes the numbers 0 to 51 and `...`
  where: sublist [0, 52]
  hint: renumber the labels from 0, or write the equation as a string""",
    ),
    (
        lambda: einsum(_zeros(2, 3)),
        """
einsum got no equation
  where: einsum(Tensor)
  hint: einsum('ij,jk->ik', a, b), einsum(a, b, 'i j, j k -> i k') or einsum(a, [0, 1], b, [1, 2])""",
    ),
    (
        lambda: einsum("ij", 3),
        """
operand 0 is int, not a tensor
  where: ij""",
    ),
    (
        lambda: plan_einsum("ij,jk->ik", (2, 3), (4, 5)),
        """
label 'j' is 3 in operand 0 and 4 in operand 1
  where: ij,jk->ik
            ^
  hint: give the operands equal sizes there (or 1, which is broadcast), or use different labels""",
    ),
    (
        lambda: plan_einsum("ij,jk->ik", notation="numpy"),
        """
there is no notation 'numpy'
  hint: use 'torch' or 'einops'""",
    ),
    (
        lambda: plan_einsum("ij,jk->ik", target="cuda"),
        """
there is no target 'cuda'
  hint: the targets are: onnx, onnxruntime-cpu, onnxruntime-cuda, tensorrt, torch""",
    ),
    (
        lambda: to_python(plan_einsum("ij->i"), ["a", "b"]),
        """
the equation has 1 operand and got 2 names
  where: ij->i""",
    ),
]


@pytest.mark.parametrize(("call", "text"), CASES)
def test_the_text(call: Callable[[], object], text: str) -> None:
    with pytest.raises(EquationError) as caught:
        call()
    assert str(caught.value) == text.lstrip("\n")


def test_an_equation_error_is_wrong_use_and_a_value_error() -> None:
    with pytest.raises(ValueError, match="no operand has it") as caught:
        plan_einsum("ij->k")
    assert isinstance(caught.value, UsageError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("ij,jk->ik", [(2, 3), (4, 5)]),
        ("ii->i", [(2, 3)]),
        ("ij", [(2, 3, 4)]),
        ("i1", [(2, 3)]),
        ("ij->ijj", [(2, 3)]),
    ],
)
def test_torch_refuses_the_same(text: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [_zeros(*shape) for shape in shapes]
    with pytest.raises(EquationError):
        einsum(text, *operands)
    with pytest.raises(RuntimeError):
        torch.einsum(text, *operands)


@pytest.mark.parametrize(
    ("equation", "column", "hint"),
    [
        ("ij;jk->ik", 2, "the operands' labels are separated by ','"),
        ("ij,jk\u2192ik", 5, "the result's labels follow '->'"),
        ("b \u2026 d, d n -> b n", 2, "an ellipsis is three dots in a row: '...'"),
        ("torch.einsum('ij,jk->ik', a, b)", 5, "give the equation alone, without the call around it"),
        ("'ij,jk->ik'", 0, "give the equation alone, without quotes"),
        (
            "b 1 d, d n -> b n",
            2,
            "an axis is a name such as `b` or `d_in`; one of size 1 needs a name, too, or is squeezed first",
        ),
        (
            "bk,kd->bK",
            8,
            "the operands' labels are: b, d, k; capitals and small letters are different labels",
        ),
        (
            "i_j,jk->ik",
            8,
            "the operands' labels are: i_j, jk; with such names a word is one label, as in einops",
        ),
    ],
)
def test_what_was_meant(equation: str, column: int, hint: str) -> None:
    with pytest.raises(EquationError) as caught:
        plan_einsum(equation)
    assert caught.value.where == f"{equation}\n{' ' * (len('where: ') + column)}^"
    assert caught.value.hint == hint


def test_ranks_that_fit_no_reading_are_said_of_the_usual_one() -> None:
    """One axis an operand would be words, `ij` and `jk`, but then nobody has an `ik`."""
    with pytest.raises(EquationError, match="operand 0 has 1 dimension but its subscript names 2"):
        plan_einsum("ij,jk->ik", (2,), (3,))
