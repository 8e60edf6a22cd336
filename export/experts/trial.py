"""The trial of one expert: the code that it was cut out of, and the body, are run on random values and have to agree.

In float64 whatever the model's type: in float16 a difference of one in twenty would pass for rounding. If they agree,
experts and rows are not mixed by the code, and the axes of each value are what they were taken for. That the rows of a
body do not mix is checked for every block, however it was written (`experts/mixing`).

Letters: N tokens, E experts, R rows of a body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.axes.extents import Extent, size_of
from moe_export.export.axes.shapes import shape_of
from moe_export.export.experts.canonical import Walk
from moe_export.export.experts.notes import named
from moe_export.export.experts.one_expert import OneExpert
from moe_export.export.gates.region import is_size
from moe_export.export.sizes import expression_of, fixed
from moe_export.float64 import agree, doubled, wide_if_possible

_ROWS = 3
"""Tokens, or slots, if their number is free; each further free axis gets one more, so that they differ."""
_EXACT = 1e-9  # of the largest value: float64 rounds at 1e-16, and a real difference is far larger
_ROUNDED = {torch.float32: 1e-3}
_HALF = 5e-2  # half precision has two to three digits


def check(one: OneExpert, instead: Mapping[fx.Node, fx.Node], chosen: fx.Node | None = None) -> None:
    """Run the code on random values: it has to be what was cut out of it, expert by expert, or the sum of that.

    Args:
        one: What was cut out.
        instead: As `OneExpert.module` takes them.
        chosen: Of a sum over the experts: a table that is 0 where an expert is not chosen, or the numbers (N, k) of
            those that are. What an expert adds for others has to be 0.

    Raises:
        RefusedError: It is not, or cannot be run.
    """
    trial, module = _Trial(one), one.module(instead)
    values = trial.values(chosen)

    def found(wide: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        given = {node: doubled(value) if wide else value for node, value in values.items()}
        whole = torch.cat([trial.apart(trial.run(end, given), end) for end in one.results])
        count = one.scope.count
        rows = [module(*trial.inputs(number, given, instead)).flatten(1) for number in range(count)]
        return (list(whole), rows) if len(whole) == count and chosen is None else ([whole.sum(0)], rows)

    try:
        (wanted, rows), is_wide = wide_if_possible(found)
    except Exception as error:
        why = str(error).strip().split("\n", 1)[0]
        raise RefusedError(f"the experts cannot be run on other rows: {why}") from error
    near = _EXACT if is_wide else _ROUNDED.get(rows[0].dtype, _HALF)
    if chosen is None and not agree(wanted, rows, near):
        raise RefusedError("the experts mix their rows, or differ in more than their weights")
    if chosen is None:
        return
    if not agree(wanted, [sum(rows, start=torch.zeros_like(rows[0]))], near):
        raise RefusedError(f"what {named(one.results[-1])} gives is not a sum over the experts")
    for number, value in enumerate(rows):
        if value[~trial.is_chosen(values[chosen], chosen, number)].count_nonzero():
            raise RefusedError("an expert is not 0 where it was not chosen")


class _Trial:
    """Values and sizes to run some code with."""

    def __init__(self, one: OneExpert) -> None:
        self._one, self._scope = one, one.scope
        own = (*self._scope.rows[::-1], *self._scope.experts)
        self._numbers = {
            extent: number if (number := fixed(extent.size)) is not None else _ROWS + place
            for place, extent in enumerate(own)
        }
        runs = [run for count in range(1, len(own) + 1) for run in combinations(own, count)]
        self._sizes = {expression_of(size_of(run)): self._number(run) for run in runs[::-1]}
        self._generator = torch.Generator().manual_seed(0)

    def _number(self, axis: Sequence[Extent]) -> int:
        return prod(self._numbers[extent] for extent in axis if extent in self._numbers)

    def _shape(self, node: fx.Node) -> list[int]:
        axes = self._scope.known.axes(node)
        sizes = [
            size if (size := fixed(whole)) is not None else self._sizes.get(expression_of(whole))
            for whole in shape_of(node)
        ]
        numbers = [size for size in sizes if size is not None]
        if len(numbers) < len(sizes) or len(axes) < len(sizes):
            raise RefusedError(f"the experts read {named(node)}, whose size is free")
        return numbers

    def values(self, gates: fx.Node | None) -> dict[fx.Node, torch.Tensor]:
        """Random values of all that the code reads; of gates a half is 0."""
        read = dict.fromkeys(node for walk in self._one.walks for node in walk.leaves)
        seeds = self._one.walks[0].seeds
        return {node: self._random(node, node is gates) for node in (*seeds, *read)}

    def _random(self, node: fx.Node, is_gates: bool) -> torch.Tensor:
        """Random values; numbers name each expert once."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise RefusedError(f"the experts read {named(node)}, which is no tensor")
        sizes, dtype = self._shape(node), node.meta["val"].dtype
        value = torch.rand(sizes, generator=self._generator)
        if dtype is torch.bool:
            return value > 0.5
        if not dtype.is_floating_point:
            each = [*sizes, 1][: max(2, len(sizes))]  # of a vector, the numbers of one slot
            order = torch.rand([*each[:-1], self._scope.count], generator=self._generator).argsort(-1)
            return order[..., : each[-1]].reshape(sizes).to(dtype)
        normal = torch.randn(sizes, generator=self._generator).to(dtype)
        return normal * (value > 0.5) if is_gates else normal

    def apart(self, value: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """A value as (E, R, D), the rows in the order of groups and slots; (1, R, D) if it is of no experts."""
        flat: list[Extent | int] = []
        for axis, size in zip(self._scope.known.axes(node), value.shape, strict=True):
            own = [extent for extent in axis if extent in self._numbers]
            flat += [*own, size // self._number(own)]
        value = value.reshape([each if isinstance(each, int) else self._numbers[each] for each in flat])
        experts, rows = (
            [flat.index(extent) for extent in of if extent in flat]
            for of in (self._scope.experts, self._scope.rows)
        )
        rest = [place for place, each in enumerate(flat) if isinstance(each, int)]
        count, height = (prod(value.shape[place] for place in of) for of in (experts, rows))
        return value.permute([*experts, *rows, *rest]).reshape([count, height, -1])

    def inputs(
        self, number: int, values: Mapping[fx.Node, torch.Tensor], instead: Mapping[fx.Node, fx.Node]
    ) -> Iterator[torch.Tensor]:
        """The body's inputs for one expert and all rows, of which the gates of all tokens stand in one slot."""
        rows = torch.arange(self._number(self._scope.rows))
        yield from (rows, torch.zeros_like(rows), torch.tensor([number]))
        for node in self._one.outside:
            if node is self._scope.seed:
                yield self.apart(values[node], node)[number]
            else:
                yield self._entry(node, values, number).unsqueeze(1) if node in instead else values[node]
        for node, weight in self._one.inputs.items():
            yield (
                self._entry(node, values, number)
                if weight.stack is not None
                else values[weight.separate[number]]
            )

    def _entry(self, node: fx.Node, values: Mapping[fx.Node, torch.Tensor], number: int) -> torch.Tensor:
        return values[node].select(self._scope.experts_axis(node) or 0, number)

    def is_chosen(self, value: torch.Tensor, gates: fx.Node, number: int) -> torch.Tensor:
        """(N,): whether an expert is chosen."""
        axis = self._scope.experts_axis(gates)
        if axis is None:
            return (value.reshape(len(value), -1) == number).any(1)
        return value.select(axis, number) != 0

    def run(self, result: fx.Node, values: Mapping[fx.Node, Any]) -> torch.Tensor:
        """What the code computes."""
        whole = Walk(result, lambda node: "leaf" if node in values else ("size" if is_size(node) else None))
        made = dict(values)

        def known(node: fx.Node) -> Any:
            if node in made or not is_size(node):
                return made[node]
            size = node.meta["val"]
            return self._sizes[expression_of(size)] if fixed(size) is None else fixed(size)

        for node in whole.nodes:
            target: Any = node.target
            made[node] = target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))
        found: torch.Tensor = made[result]
        return found
