"""Read one call of einsum in Python source: its equation and its operands, or why they cannot be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst

from moe_export.einsum_rewrite.equation import Equation
from moe_export.errors import EquationError

TORCH = frozenset({"torch.einsum", "torch.functional.einsum", "opt_einsum.contract"})
EINOPS = frozenset({"einops.einsum", "einops.einops.einsum"})
ELSEWHERE = frozenset({"numpy.einsum", "jax.numpy.einsum", "tensorflow.einsum", "torch.jit.einsum"})


class UnknownError(Exception):
    """Why a call is left alone."""


@dataclass(frozen=True)
class EinsumCall:
    """A call that is understood.

    Attributes:
        equation: As parsed.
        text: As it was typed, for the comment.
        operands: The operands' expressions.
    """

    equation: Equation
    text: str
    operands: tuple[cst.BaseExpression, ...]


def is_einsum(names: frozenset[str]) -> bool:
    """Whether a function, by its qualified names, is an einsum of tensors of PyTorch."""
    return bool(names & (TORCH | EINOPS))


def read_call(call: cst.Call, names: frozenset[str]) -> EinsumCall:
    """Take a call apart.

    Args:
        call: The call.
        names: Qualified names of the function.

    Raises:
        UnknownError: The equation or the operands cannot be known from the source.
    """
    keywords = {arg.keyword.value: arg.value for arg in call.args if arg.keyword is not None}
    if any(arg.star for arg in call.args):
        raise UnknownError("its operands are a starred list, whose length is not known here")
    values = [arg.value for arg in call.args if arg.keyword is None]
    einops = bool(names & EINOPS)
    named = keywords.pop("pattern" if einops else "equation", None)
    if keywords:
        raise UnknownError(f"it has the argument {', '.join(keywords)}, which has no meaning without einsum")
    if named is not None:
        text, operands = _text(named), values
    elif not values:
        raise UnknownError("it has no arguments")
    elif einops:
        text, operands = _text(values[-1]), values[:-1]
    elif _is_sublists(values):
        return _from_sublists(values)
    else:
        text, operands = _text(values[0]), values[1:]
    operands = _unpacked(operands)
    try:
        equation = Equation.parse(text, "einops" if einops else "torch")
    except EquationError as error:
        raise UnknownError(f"its equation is malformed: {error.what}") from error
    if len(equation.inputs) != len(operands):
        raise UnknownError(
            f"its equation names {len(equation.inputs)} operands and it has {len(operands)}, or a list of them"
        )
    return EinsumCall(equation, text, tuple(operands))


def _text(node: cst.BaseExpression) -> str:
    """A string that stands in the source, possibly in pieces."""
    if isinstance(node, (cst.SimpleString, cst.ConcatenatedString)):
        value = node.evaluated_value
        if isinstance(value, str):
            return value
    kind = "an f-string" if isinstance(node, cst.FormattedString) else "no string literal"
    raise UnknownError(f"its equation is {kind}, and is only known at run time")


def _unpacked(operands: Sequence[cst.BaseExpression]) -> list[cst.BaseExpression]:
    """Operands that are given as one list or tuple display."""
    if len(operands) == 1 and isinstance(operands[0], (cst.List, cst.Tuple)):
        elements = operands[0].elements
        if any(isinstance(element, cst.StarredElement) for element in elements):
            raise UnknownError("its operands are a starred list, whose length is not known here")
        return [element.value for element in elements]
    return list(operands)


def _is_sublists(values: Sequence[cst.BaseExpression]) -> bool:
    return len(values) > 1 and isinstance(values[1], (cst.List, cst.Tuple)) and not _is_string(values[0])


def _is_string(node: cst.BaseExpression) -> bool:
    return isinstance(node, (cst.SimpleString, cst.ConcatenatedString, cst.FormattedString))


def _from_sublists(values: Sequence[cst.BaseExpression]) -> EinsumCall:
    """`einsum(x, [0, 1], y, [1, 2], [0, 2])`."""
    pairs = len(values) // 2
    sublists = [_numbers(value) for value in values[1 : 2 * pairs : 2]]
    output = _numbers(values[-1]) if len(values) % 2 else None
    try:
        equation = Equation.from_sublists(sublists, output)
    except EquationError as error:
        raise UnknownError(f"its sublists are malformed: {error.what}") from error
    return EinsumCall(equation, equation.text, tuple(values[0 : 2 * pairs : 2]))


def _numbers(node: cst.BaseExpression) -> list[object]:
    if not isinstance(node, (cst.List, cst.Tuple)):
        raise UnknownError("its sublists are only known at run time")
    found: list[object] = []
    for element in node.elements:
        if isinstance(element.value, cst.Integer):
            found.append(element.value.evaluated_value)
        elif isinstance(element.value, cst.Ellipsis):
            found.append(...)
        else:
            raise UnknownError("its sublists are only known at run time")
    return found
