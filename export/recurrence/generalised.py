"""`generalised`: what the rolled graphs of one model, traced at several lengths, have in common.

They are equal except for some numbers. Each integer among those becomes a `Form`, each number of the steps a closed
form; where they differ in anything else, the model really depends on the length.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from moe_export.export.frontend.source import line_of
from moe_export.export.recurrence.closed_form import ClosedForm, OfLength
from moe_export.export.recurrence.closed_form_fit import closed_form_of, closed_form_of_length
from moe_export.export.recurrence.form import TracedLengths, form_of_one
from moe_export.export.recurrence.loop import Series
from moe_export.export.recurrence.operand import View
from moe_export.export.recurrence.rolled import (
    Call,
    Folded,
    LengthError,
    RolledGraph,
    Scaled,
    Size,
    Summed,
    size_of,
)


class UnlikeError(LengthError):
    """The traces differ in operators or views, or in how many they have, outside of the loops that they share."""


def generalised(all_rolled: Mapping[tuple[int, ...], RolledGraph], chunk: int | None) -> RolledGraph:
    """The rolled graph for every length, from those at a few.

    Args:
        all_rolled: By the sizes of the lengths that are folded over.
        chunk: The places that an iteration takes, where that is known.

    Raises:
        LengthError: They differ in more than numbers that follow the length.
    """
    lengths = TracedLengths(tuple(all_rolled), chunk)
    rows = [rolled.items for rolled in all_rolled.values()]
    for items in zip(*rows, strict=False):
        if len({_kind(item) for item in items}) > 1:
            raise UnlikeError(
                f"the model runs different operators at lengths {_sizes(lengths.sizes[:2], ' and ')}",
                _line(items[0]),
            )
    if len({len(row) for row in rows}) > 1:
        raise UnlikeError(
            "outside of any loop, the model runs more operators at one length than at another",
            _line(rows[0][-1]),
        )
    items = tuple(_merged(lengths, columns, _line(columns[0])) for columns in zip(*rows, strict=True))
    outputs = _merged(lengths, [rolled.outputs for rolled in all_rolled.values()], None)
    return RolledGraph(items, outputs)


def _kind(item: Call | Folded) -> Any:
    return item.target if isinstance(item, Call) else len(item.loop.body)


def _line(item: Call | Folded) -> str | None:
    return line_of(item.node.meta.get("stack_trace")) if isinstance(item, Call) else item.loop.line


def _merged(lengths: TracedLengths, values: Sequence[Any], where: str | None) -> Any:
    """One value for all lengths."""
    first = values[0]
    if isinstance(first, Size):
        if all((value.size if isinstance(value, Size) else value) == first.size for value in values):
            return first
        return _with_sizes(lengths, [getattr(value, "size", value) for value in values], first, where)
    if any(type(value) is not type(first) for value in values):
        raise LengthError(f"it computes {_shown(values)} at lengths {_sizes(lengths.sizes)}", where)
    if isinstance(first, Series):
        return _closed_form(lengths, values, where)
    if dataclasses.is_dataclass(first):
        return _merged_fields(lengths, values, where)
    if isinstance(first, (tuple, list)):
        if len({len(value) for value in values}) > 1:
            raise UnlikeError(
                f"a list has {_shown([len(value) for value in values])} members at lengths {_sizes(lengths.sizes)}, "
                "and no loop makes them", where,
            )  # fmt: skip
        return tuple(_merged(lengths, column, where) for column in zip(*values, strict=True))
    if isinstance(first, dict):
        return {key: _merged(lengths, [value[key] for value in values], where) for key in first}
    return first if all(value == first for value in values) else _merged_numbers(lengths, values, where)


def _merged_numbers(lengths: TracedLengths, values: Sequence[Any], where: str | None) -> Any:
    """A number as a function of the length."""
    if isinstance(values[0], int) and not isinstance(values[0], bool):
        form = form_of_one(lengths, values)
        if form is not None:
            return form
    if all(isinstance(value, float) for value in values) and len(lengths.sizes[0]) == 1:
        closed_form = closed_form_of_length(
            {size: value for (size,), value in zip(lengths.sizes, values, strict=True)}
        )
        if closed_form is not None:
            return OfLength(closed_form)
    raise LengthError(f"a number is {_shown(values)} at lengths {_sizes(lengths.sizes)}", where)


def _closed_form(lengths: TracedLengths, series: Sequence[Series], where: str | None) -> ClosedForm:
    """The closed form of a number of the steps, for all lengths."""
    if len(lengths.sizes[0]) > 1:
        raise LengthError("its steps compute with their number, which works over one length only", where)
    closed_form = closed_form_of(
        {size: each.values for (size,), each in zip(lengths.sizes, series, strict=True)}
    )
    if closed_form is None:
        seen = [
            f"{_shown(each.values[:3])}, ... at length {size}"
            for (size,), each in zip(lengths.sizes, series, strict=True)
        ]
        raise LengthError(
            f"its steps compute with {'; '.join(seen[:2])}, and no formula is known that gives both", where
        )
    return closed_form


def _with_sizes(
    lengths: TracedLengths, values: Sequence[Any], first: Size, where: str | None
) -> Scaled | Summed:
    """A size that is a product or a sum of sizes of the inputs and a number that follows the length."""
    if all(isinstance(value, int) for value in values):
        found = _scaled(lengths, values, first) or _summed(lengths, values, first)
        if found is not None:
            return found
    raise LengthError(f"a size of the inputs is {_shown(values)} at lengths {_sizes(lengths.sizes)}", where)


def _scaled(lengths: TracedLengths, values: Sequence[int], first: Size) -> Scaled | None:
    sizes = tuple(size_of(node) for node in _parts(first.node, operator.mul))
    rest = math.prod(int(size.size) for size in sizes)
    if not rest or any(value % rest for value in values):
        return None
    form = form_of_one(lengths, [value // rest for value in values])
    return None if form is None else Scaled(sizes, form)


def _summed(lengths: TracedLengths, values: Sequence[int], first: Size) -> Summed | None:
    """A sum; None also if a size in it is unknown, or multiplied by a number, which may follow the length as well."""
    terms = _parts(first.node, operator.add)
    if first.node.target is not operator.add or not all(_is_of_inputs(term) for term in terms):
        return None
    sizes = tuple(map(size_of, terms))
    if not all(size.size for size in sizes):
        return None
    form = form_of_one(lengths, [value - sum(int(size.size) for size in sizes) for value in values])
    return None if form is None else Summed(sizes, form)


def _parts(node: fx.Node, operation: Any) -> list[fx.Node]:
    """The factors of a product, or the terms of a sum, that are sizes, without those that are numbers."""
    if node.target is not operation:
        return [node]
    return [part for one in node.args if isinstance(one, fx.Node) for part in _parts(one, operation)]


def _is_of_inputs(node: fx.Node) -> bool:
    """Whether a size is one of an input's, or a product of such, with no number in it."""
    if node.target is not operator.mul:
        return node.target is not operator.add
    return all(isinstance(factor, fx.Node) and _is_of_inputs(factor) for factor in node.args)


def _merged_fields(lengths: TracedLengths, values: Sequence[Any], where: str | None) -> Any:
    first = values[0]
    if isinstance(first, View) and first.written and all(view.written == first.written for view in values):
        return dataclasses.replace(first, numbers=first.written)
    changes = {
        part.name: _merged(lengths, [getattr(value, part.name) for value in values], where)
        for part in dataclasses.fields(first)
        # Only the first trace has free axes: their sizes are None there, and numbers in the others.
        if part.compare and not (part.name == "size" and getattr(first, part.name) is None)
    }
    return dataclasses.replace(first, **changes)


def _sizes(lengths: Sequence[tuple[int, ...]], between: str = ", ") -> str:
    return between.join("x".join(map(str, sizes)) for sizes in lengths)


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
