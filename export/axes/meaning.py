"""What the values of a program mean: what their axes run over, and what their numbers count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from moe_export.export.axes.extents import Axis, Extents, size_of
from moe_export.export.sizes import Size, same_size


@dataclass(frozen=True)
class Meaning:
    """What is known of one value.

    Attributes:
        axes: What each of its axes runs over.
        numbers: The axis whose entries its integers number, 0 first: the experts, for what `topk` chose; None for any
            other values.
        partly: Whether some of these numbers may be below 0, and name no entry.
        columns: Where its last axis has numbers of different axes side by side, as `nonzero` lists them: these axes.
        running: Whether it comes from a running count of marks: a token's place among those of an expert.
    """

    axes: tuple[Axis, ...]
    numbers: Axis | None = None
    partly: bool = False
    columns: tuple[Axis, ...] = ()
    running: bool = False


@dataclass(frozen=True)
class Meanings:
    """The meanings of a program's values, as they are worked out (`axes/analysis`).

    Attributes:
        extents: What the axes run over.
        found: The meaning of each value, or of each part of a tuple.
        tokens: What the tokens of each choice run over: one axis, or several.
        lost: Nodes whose operators have no rule: nothing is known of the axes of their results.
    """

    extents: Extents = field(default_factory=Extents)
    found: dict[fx.Node, tuple[Meaning, ...]] = field(default_factory=dict)
    tokens: list[tuple[Axis, ...]] = field(default_factory=list)
    lost: list[fx.Node] = field(default_factory=list)

    def of(self, node: Any) -> Meaning | None:
        """The meaning of a value; None for what is no tensor."""
        found = self.found.get(node) if isinstance(node, fx.Node) else None
        return found[0] if found is not None and not isinstance(node.meta["val"], (tuple, list)) else None

    def axes(self, node: fx.Node) -> tuple[Axis, ...]:
        """What each axis of a value runs over, by all that is known of the program."""
        found = self.of(node)
        return tuple(map(self.extents.of, found.axes)) if found is not None else ()

    def anew(self, sizes: Sequence[Size], by: fx.Node | None = None) -> Meaning:
        """A value of which nothing is known but its sizes.

        Args:
            sizes: Its sizes.
            by: The operator that put its entries into an order; None if there is none.
        """
        return Meaning(tuple(self.extents.new(size, order=by) for size in sizes))

    def unknown(self, sizes: Sequence[Size], by: fx.Node) -> Meaning:
        """A value that an operator without a rule made."""
        found = self.anew(sizes, by)
        for axis in found.axes:
            for extent in axis:
                extent.unknown = True
        return found

    def used(self, source: fx.Node, by: fx.Node) -> None:
        """Note that an operator reads a value in a way in which the order of all its entries matters."""
        for found in self.found.get(source, ()):
            self.extents.mark(found.axes, by)
        self.computed_with(source, by)

    def computed_with(self, source: fx.Node, by: fx.Node) -> None:
        """Note that an operator computes with the numbers of a value, not only with what they number."""
        for found in self.found.get(source, ()):
            self.extents.mark([*([found.numbers] if found.numbers else []), *found.columns], by)

    def whole(self, found: Meaning, by: fx.Node) -> Meaning:
        """The same for an operator that does not keep columns apart: their numbers are values like others."""
        self.extents.mark(found.columns, by)
        return replace(found, columns=())

    def match_numbers(self, numbers: Axis | None, axis: Axis, by: fx.Node) -> bool:
        """Note that numbers name the entries of an axis; of numbers of something else, the order matters.

        Returns:
            Whether they may name its entries.
        """
        if numbers is None or not same_size(size_of(numbers), size_of(axis)):
            self.extents.mark([numbers or (), axis], by)
            return False
        self.extents.match(numbers, axis, by)
        return True
