"""The shape that a reshape must put together at run time, because it cannot be written down (`reshaping`)."""

from __future__ import annotations

from typing import NamedTuple

from moe_export.einsum_rewrite.layout import Axis, Layout
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.reshaping import fixed_size


class Piece(NamedTuple):
    """Sizes `start` to `stop` of a value; values are the operands and, after them, what is reshaped."""

    value: int
    start: int
    stop: int


ShapePart = tuple[int, ...] | Piece | list[Piece]
"""Known sizes; sizes that are read; or sizes that are read and multiplied with one another."""


def shape_pieces(plan: Plan, before: Layout, after: Layout) -> list[ShapePart]:
    """The parts of the shape `after`, neighbours that come from the same place joined."""
    parts: list[ShapePart] = []
    here = len(plan.operands)
    for axis in after:
        size = fixed_size(axis, plan.sizes)
        if size is not None:
            part: ShapePart = (size,)
        elif axis in before:
            position = before.index(axis)
            part = Piece(here, position, position + 1)
        else:
            part = _read_labels(axis, plan)
        joined = _join(parts[-1], part) if parts else None
        if joined is None:
            parts.append(part)
        else:
            parts[-1] = joined
    return parts


def _read_labels(axis: Axis, plan: Plan) -> Piece | list[Piece]:
    """The sizes of the labels of one axis, each read from an operand that has it."""
    pieces: list[Piece] = []
    for label in axis:
        operand, position = plan.size_sources[label]
        piece = Piece(operand, position, position + 1)
        joined = _join(pieces[-1], piece) if pieces else None
        if isinstance(joined, Piece):
            pieces[-1] = joined
        else:
            pieces.append(piece)
    return pieces[0] if len(axis) == 1 else pieces


def _join(a: ShapePart, b: ShapePart) -> ShapePart | None:
    if isinstance(a, Piece) and isinstance(b, Piece):
        follows = a.value == b.value and a.stop == b.start
        return Piece(a.value, a.start, b.stop) if follows else None
    if isinstance(a, list) or isinstance(b, list) or isinstance(a, Piece) or isinstance(b, Piece):
        return None
    return a + b
