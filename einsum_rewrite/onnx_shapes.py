"""How a reshape says in ONNX what shape it wants.

    (b, l, h, d) → (b, l, h*d)    h, d known      [0, 0, 512]       one Reshape: 0 copies a size
    (b, l, d)    → (b*l, d)       d known         [-1, 64]          one Reshape: -1 is what remains
    (b, l, d)    → (b*l, d)       none known      Flatten(axis=2)
    (b*l, n)     → (b, l, n)      none known      Concat(Shape(x)[0:2], ...) and Reshape

A `-1` beside a copied size that may turn out to be 0 has no answer (0 times what is 0?), and ONNX Runtime
refuses it. Empty batches are real (an expert without tokens), so there the sizes are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.layout import Axis, Layout, flat
from moe_export.einsum_rewrite.plan import Plan


class Piece(NamedTuple):
    """Sizes `start` to `stop` of a value; values are the operands and, after them, what is reshaped."""

    value: int
    start: int
    stop: int


ShapePart = tuple[int, ...] | Piece | list[Piece]
"""Known sizes; sizes that are read; or sizes that are read and multiplied with one another."""


def fixed_size(axis: Axis, sizes: Mapping[str, Size]) -> int | None:
    """The size of an axis if every label in it is known."""
    total = 1
    for label in axis:
        size = sizes[label]
        if not isinstance(size, int):
            return None
        total *= size
    return total


def simple_target(before: Layout, after: Layout, sizes: Mapping[str, Size]) -> list[int] | None:
    """The target of a Reshape that needs no size at run time; None if there is none."""
    target: list[int] = []
    copied = 0
    for i, axis in enumerate(after):
        size = fixed_size(axis, sizes)
        if size == 0:
            return None  # a 0 would be read as a copy
        if size is None and i < len(before) and before[i] == axis:
            size, copied = 0, copied + 1
        target.append(-1 if size is None else size)
    opened = target.count(-1)
    return target if not opened or (opened == 1 and not copied) else None


def flatten_axis(before: Layout, after: Layout) -> int | None:
    """Where `Flatten` must cut `before` to give the two axes `after`; None if it cannot."""
    if len(after) != 2:
        return None
    for cut in range(len(before) + 1):
        if flat(before[:cut]) == after[0] and flat(before[cut:]) == after[1]:
            return cut
    return None


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
