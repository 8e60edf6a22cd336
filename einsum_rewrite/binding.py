"""An equation put to the shapes of its operands: every axis named, every label given a size.

    '...i,...i->...'   on (4,) and (2, 3, 4)
    axes    (i,)  (...0, ...1, i)       the ellipsis becomes labels, aligned from the right
    output  (...0, ...1)

An axis of size 1 whose label is longer elsewhere is broadcast; that operand simply does not depend on the
label, so its axis is given no name (`None`). So is a label that is 1 everywhere and summed: there is nothing
to sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.notation import ELLIPSIS, pointed
from moe_export.errors import EquationError

Size = int | str | None
"""A size that is known, one that has a name, or one of which nothing is known."""

Shape = Sequence[Size]


@dataclass(frozen=True)
class Binding:
    """The labels of every axis, and their sizes.

    Attributes:
        axes: The label of each axis of each operand; None for an axis of size 1 that is broadcast.
        output: The labels of the result.
        sizes: The size of each label, in order of appearance.
    """

    axes: tuple[tuple[str | None, ...], ...]
    output: tuple[str, ...]
    sizes: tuple[tuple[str, Size], ...]


def bind(equation: Equation, shapes: Sequence[Shape]) -> Binding:
    """Put `shapes` to `equation`.

    Raises:
        EquationError: The number of operands, of axes, or the sizes do not fit.
    """
    if len(shapes) != len(equation.inputs):
        raise EquationError(
            f"the equation names {_count(len(equation.inputs), 'operand')} and got {len(shapes)}",
            where=equation.text,
            hint="one term between commas for each operand",
        )
    widest = max((_dots(equation, k, shape) for k, shape in enumerate(shapes)), default=0)
    axes = [_name_axes(term, len(shape), widest) for term, shape in zip(equation.inputs, shapes, strict=True)]
    output = _name_axes(equation.output, len(equation.output) - 1 + widest, widest)
    sizes = _label_sizes(equation, axes, shapes)
    nothing = {label for label, size in sizes.items() if size == 1 and label not in output}
    if len(shapes) == 1:
        nothing = set()  # torch's sum over one operand widens integers, also over an axis of size 1
    unnamed = tuple(
        tuple(None if label in nothing or (size == 1 and sizes[label] != 1) else label
              for label, size in zip(names, shape, strict=True))
        for names, shape in zip(axes, shapes, strict=True)
    )  # fmt: skip
    return Binding(unnamed, tuple(output), tuple((k, v) for k, v in sizes.items() if k not in nothing))


def symbolic_shapes(equation: Equation) -> list[list[Size]]:
    """Shapes of which nothing is known but the labels: each size is named after its label."""
    return [[f"{label}" for label in term if label != ELLIPSIS] for term in equation.inputs]


def _dots(equation: Equation, operand: int, shape: Shape) -> int:
    """How many axes the ellipsis of an operand stands for (0 where there is none)."""
    term = equation.inputs[operand]
    named = sum(label != ELLIPSIS for label in term)
    if len(shape) == named or (ELLIPSIS in term and len(shape) > named):
        return len(shape) - named
    raise EquationError(
        f"operand {operand} has {_count(len(shape), 'dimension')} "
        f"but its subscript names {'at least ' if ELLIPSIS in term else ''}{named}",
        where=_point_at(equation, operand, 0, len(equation.inputs[operand]) - 1),
        hint=f"its shape is {show(shape)}"
        + ("" if ELLIPSIS in term else "; '...' stands for dimensions that are not named"),
    )


def _name_axes(term: Sequence[str], rank: int, widest: int) -> list[str]:
    named = sum(label != ELLIPSIS for label in term)
    names: list[str] = []
    for label in term:
        if label == ELLIPSIS:
            # The rightmost axes of all ellipses are aligned.
            names += [f"...{i}" for i in range(widest - (rank - named), widest)]
        else:
            names.append(label)
    return names


def _label_sizes(
    equation: Equation, axes: Sequence[Sequence[str]], shapes: Sequence[Shape]
) -> dict[str, Size]:
    """The size of each label; 1 gives way to any other, and a number to nothing."""
    sizes: dict[str, Size] = {}
    owner: dict[str, int] = {}
    for operand, (names, shape) in enumerate(zip(axes, shapes, strict=True)):
        diagonal: dict[str, Size] = {}
        for axis, (label, size) in enumerate(zip(names, shape, strict=True)):
            if label in diagonal and _differ(diagonal[label], size):
                raise EquationError(
                    f"{_called(label)} is {diagonal[label]} and {size} in operand {operand}, which repeats it",
                    where=_point_at(equation, operand, axis, len(shape)),
                    hint="a repeated label takes the diagonal, so both dimensions must be equal",
                )
            diagonal.setdefault(label, size)
            if label not in sizes or sizes[label] == 1:
                sizes[label], owner[label] = size, operand
            elif size != 1 and _differ(sizes[label], size):
                raise EquationError(
                    f"{_called(label)} is {sizes[label]} in operand {owner[label]} "
                    f"and {size} in operand {operand}",
                    where=_point_at(equation, operand, axis, len(shape)),
                    hint="give the operands equal sizes there (or 1, which is broadcast), "
                    "or use different labels",
                )
            elif size != 1 and _knows_more(size, sizes[label]):
                sizes[label], owner[label] = size, operand
    return sizes


def _called(label: str) -> str:
    dots = label.removeprefix(ELLIPSIS)
    return f"label {label!r}" if dots == label else f"dimension {dots} of '...'"


def _knows_more(a: Size, b: Size) -> bool:
    return b is None if isinstance(a, str) else isinstance(a, int) and not isinstance(b, int)


def _differ(a: Size, b: Size) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _point_at(equation: Equation, operand: int, axis: int, rank: int) -> str:
    """The equation with a caret under the label (or the ellipsis) that stands for one axis of an operand."""
    term, columns = equation.inputs[operand], equation.columns[operand]
    if not columns:
        return equation.text
    if ELLIPSIS in term:
        dots, wide = term.index(ELLIPSIS), rank - len(term) + 1
        axis = axis if axis < dots else max(dots, axis - wide + 1)
    return pointed(equation.text, columns[min(axis, len(columns) - 1)])


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def show(shape: Shape) -> str:
    """A shape as a person writes it: `(2, b, ?)`."""
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
