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

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.layout import Axis, Layout, flat


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


def lookups(before: Layout, after: Layout, sizes: Mapping[str, Size]) -> int:
    """About how many nodes a reshape needs beside itself, to look up sizes."""
    if simple_target(before, after, sizes) is not None or flatten_axis(before, after) is not None:
        return 0
    nodes = 1  # Concat
    for axis in after:
        if fixed_size(axis, sizes) is None:
            # Shape; for a product also Concat and ReduceProd
            nodes += 1 if len(axis) == 1 or axis in before else len(axis) + 2
    return nodes
