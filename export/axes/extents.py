"""What axes run over, and which of them run over the same: the tokens of a batch, the units of a layer, the experts.

    x (batch, sequence, 32) ─▶ view (batch*sequence, 32) ─▶ linear with (8, 32) ─▶ (batch*sequence, 8)

An axis runs over a product of extents, its first one the slowest: `batch*sequence` here, and none where its size is 1.
Where an operator lines two axes up, their extents are one from there on, or one is the product of the others.

What an extent claims, and what tests hold it to: its entries may stand in any order. Reorder them in everything that is
given, and every value is reordered along the axes that have the extent, numbers that count its entries name the same
ones, and nothing else changes. An operator to which the order matters (a running sum, a slice) ends that claim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from moe_export.export.sizes import Size, expression_of, fixed, same_size


@dataclass(eq=False)
class Extent:
    """What an axis, or a factor of one, runs over.

    Attributes:
        size: How many entries it has.
        name: What the model calls it: the name of a dimension; empty if it has none.
        role: What it is in a routing: "token", "expert", "slot"; see `Extents.call`.
        order: The operator to which the order of its entries matters; None if they may stand in any order.
        unknown: Whether it is an axis of a value that an operator without a rule made.
    """

    size: Size
    name: str = ""
    role: str = ""
    order: fx.Node | None = None
    unknown: bool = False
    _is: tuple[Extent, ...] | None = field(default=None, repr=False)


Axis = tuple[Extent, ...]
"""What an axis runs over, the slowest extent first; empty for an axis of size 1."""


class Extents:
    """The extents of one program, which become fewer as operators line up axes."""

    def new(self, size: Size, *, order: fx.Node | None = None, role: str = "") -> Axis:
        """An axis of its own."""
        return () if same_size(size, 1) else (Extent(size, role=role, order=order),)

    def of(self, axis: Axis) -> Axis:
        """An axis by what is known now."""
        found: list[Extent] = []
        for extent in axis:
            found += [extent] if extent._is is None else self.of(extent._is)
        return tuple(found)

    def mark(self, axes: Iterable[Axis], by: fx.Node) -> None:
        """Note that to an operator the order matters, in which the entries of these axes stand."""
        for axis in axes:
            for extent in self.of(axis):
                extent.order = extent.order or by

    def call(self, axis: Axis, role: str) -> None:
        """Note what an axis is in a routing: the first role that an extent is given stays."""
        for extent in self.of(axis):
            extent.role = extent.role or role

    def match(self, one: Axis, other: Axis, by: fx.Node) -> None:
        """Note that an operator lines two axes up, entry by entry."""
        left, right = list(self.of(one)), list(self.of(other))
        if not same_size(size_of(left), size_of(right)):
            return self.mark([one, other], by)
        while left and right:
            first, second = left[0], right[0]
            if first is second or same_size(first.size, second.size):
                self._bind(first, (second,))
            elif len(left) == 1 and first not in right:
                return self._bind(first, tuple(right))
            elif len(right) == 1 and second not in left:
                return self._bind(second, tuple(left))
            elif not (self._divided(left, second.size) or self._divided(right, first.size)):
                break
            else:
                continue
            left, right = list(self.of(tuple(left[1:]))), list(self.of(tuple(right[1:])))
        self.mark([tuple(left), tuple(right)], by)
        return None

    def reshaped(self, axes: Sequence[Axis], sizes: Sequence[Size], by: fx.Node) -> tuple[Axis, ...]:
        """The axes after a reshape to these sizes: lined up from the left, then from the right, and what is between."""
        left = [extent for axis in axes for extent in self.of(axis)]
        begin: list[Axis] = []
        end: list[Axis] = []
        wanted = list(sizes)
        while wanted and (group := self._taken(left, wanted, first=True)) is not None:
            begin.append(group)
            wanted.pop(0)
        while wanted and (group := self._taken(left, wanted, first=False)) is not None:
            end.insert(0, group)
            wanted.pop()
        if len(wanted) == 1:
            between: list[Axis] = [tuple(left)]
        elif len(left) == 1 and wanted:
            between = [(part,) for part in self._divide(left[0], wanted)]
        else:
            self.mark([tuple(left)], by)
            between = [self.new(size, order=by) for size in wanted]
        return (*begin, *between, *end)

    def _taken(self, left: list[Extent], wanted: Sequence[Size], *, first: bool) -> Axis | None:
        """The extents, taken off one end, that make up the size wanted there; None if they are not known."""
        size = wanted[0 if first else -1]
        if same_size(size, 1):
            return ()
        for _ in range(2):
            for count in range(1, len(left) + 1):
                group = left[:count] if first else left[-count:]
                if same_size(size_of(group), size):
                    left[:] = left[count:] if first else left[:-count]
                    return tuple(group)
            if not self._divided(left, size, wanted, first=first):
                break
        return None

    def _divided(
        self, axis: list[Extent], size: Size, wanted: Sequence[Size] = (), *, first: bool = True
    ) -> bool:
        """Divide the extent at one end of an axis into one of this size and the rest, where that is possible."""
        if not axis:
            return False
        extent = axis[0 if first else -1]
        whole, part = fixed(extent.size), fixed(size)
        if whole is not None and part is not None and 1 < part < whole and whole % part == 0:
            parts: Sequence[Size] = (part, whole // part) if first else (whole // part, part)
        else:
            ends = range(2, len(wanted) + 1)
            runs = [list(wanted[:end] if first else wanted[-end:]) for end in ends]
            runs = [run for run in runs if same_size(size_of(map(Extent, run)), extent.size)]
            parts = [each for each in runs[0] if not same_size(each, 1)] if runs else ()
        if len(parts) < 2:
            return False
        axis[0 if first else -1 : 1 if first else None] = self._divide(extent, parts)
        return True

    def _divide(self, extent: Extent, sizes: Sequence[Size]) -> list[Extent]:
        """Divide an extent into parts of these sizes. Steps of a free number become steps of chunks."""
        parts = [Extent(size) for size in sizes]
        is_free = getattr(expression_of(extent.size), "is_Symbol", False) or fixed(sizes[-1]) is not None
        if fixed(extent.size) is None and is_free:
            parts[0].role, parts[-1].role = "chunk", "step of a chunk"
        self._bind(extent, tuple(parts))
        return parts

    def _bind(self, extent: Extent, to: Axis) -> None:
        """Make an extent another one, or the product of others."""
        if to == (extent,):
            return
        if len(to) == 1 and to[0].unknown:
            extent, to = to[0], (extent,)
        extent._is = to
        if extent.order is not None:
            self.mark([to], extent.order)
        if len(to) == 1:
            to[0].role = to[0].role or extent.role
            to[0].name = to[0].name or extent.name
        elif extent.role:
            self.call(to, extent.role)


def size_of(extents: Iterable[Extent]) -> Size:
    """How many entries an axis has, or several extents together."""
    product: Size = 1
    for extent in extents:
        product = product * extent.size
    return product


def leaves(axes: Sequence[Axis]) -> list[Extent]:
    """The extents of several axes."""
    return [extent for axis in axes for extent in axis]
