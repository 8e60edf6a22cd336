"""`Skeleton`: a traced graph as plain data, with its loops folded; and what several of them have in common.

Skeletons of one model traced at several lengths are equal but for some integers. `generalised` replaces each of
those by its `Form`; where they differ in anything else, the model truly depends on the length.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from moe_export.export.recurrence.form import form_of_one
from moe_export.export.recurrence.law import Law, OfLength
from moe_export.export.recurrence.law_fit import law_of, law_of_length
from moe_export.export.recurrence.loop import WRITE, Loop, Made, Outside, Series, split_part
from moe_export.export.recurrence.loops import Repeats
from moe_export.export.recurrence.operand import SIZE, Read, View, atoms, filled, read_of
from moe_export.export.source import line_of


@dataclass(frozen=True)
class Place:
    """What an item or an input stands for: an input or weight by name, else the item with this number."""

    key: str | int


@dataclass(frozen=True)
class Value:
    """A value outside loops: a place, or what a loop made in one turn, behind a path."""

    base: Place | Made
    path: tuple[View, ...] = ()


@dataclass(frozen=True)
class Size:
    """A size of the inputs, or a sum or product of such; `node` computes it, `size` is what it is in the trace."""

    node: fx.Node
    size: int


@dataclass(frozen=True)
class Scaled:
    """A product of sizes of the inputs and an integer that follows the length: `batch * L`."""

    sizes: tuple[Size, ...]
    number: Any


@dataclass(frozen=True)
class Whole:
    """What a written or appended buffer is after the loop."""

    loop: int
    position: int


@dataclass(frozen=True)
class Row:
    """A list of what a loop made, turn after turn: from turn `first`, `count` turns, forwards or backwards."""

    loop: int
    position: int
    path: tuple[View, ...]
    first: Any
    count: Any
    backwards: bool


@dataclass(frozen=True)
class Call:
    """One operator outside loops."""

    target: Any
    args: Any
    kwargs: Any
    node: fx.Node = field(compare=False, repr=False)


@dataclass(frozen=True)
class Folded:
    """A loop, its outside operands in terms of places."""

    loop: Loop
    number: int


@dataclass(frozen=True)
class Skeleton:
    """A whole graph.

    Attributes:
        items: In an order in which they can run.
        outputs: Of the graph.
    """

    items: tuple[Call | Folded, ...]
    outputs: Any


class LengthError(Exception):
    """The traces differ in more than integers that follow the length: why, and on which line of the model."""

    def __init__(self, reason: str, where: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


class UnlikeError(LengthError):
    """The traces hold other operators or views, or more, outside of the loops that they have in common."""


def skeleton(trace: Repeats) -> Skeleton:
    """Fold the loops that were found.

    Raises:
        LengthError: Something outside reads what a loop does not have after its end.
    """
    return _Folding(trace).skeleton()


class _Folding:
    def __init__(self, trace: Repeats) -> None:
        self._trace = trace
        self._items: list[Call | Folded] = []
        self._places: dict[fx.Node, Place] = {}
        self._order: dict[int, int] = {}  # the loop's number as it was found → its number in the graph

    def skeleton(self) -> Skeleton:
        starts = {loop.first: number for number, loop in enumerate(self._trace.loops)}
        inside = {node for loop in self._trace.loops for row in loop.nodes for node in row}
        outputs: Any = ()
        for node in self._trace.graph.nodes:
            if node.op == "placeholder":
                self._places[node] = Place(node.name)
            elif node.op == "output":
                outputs = self._rewritten(node.args[0], node)
            elif node in starts:
                self._fold(starts[node])
            elif node not in inside and SIZE not in node.meta and Read(node) == read_of(node):
                args = tuple(self._rewritten(argument, node) for argument in node.args)
                kwargs = {key: self._rewritten(value, node) for key, value in node.kwargs.items()}
                self._places[node] = Place(len(self._items))
                self._items.append(Call(node.target, args, kwargs, node))
        return Skeleton(tuple(self._items), outputs)

    def _fold(self, found: int) -> None:
        loop = self._trace.loops[found]
        node = loop.first
        self._order[found] = len(self._order)
        body = tuple(
            dataclasses.replace(
                step, args=self._outside(step.args, node), kwargs=self._outside(step.kwargs, node)
            )
            for step in loop.body
        )
        starts = tuple(
            dataclasses.replace(start, values=self._outside(start.values, node)) for start in loop.starts
        )
        self._items.append(Folded(dataclasses.replace(loop, body=body, starts=starts), self._order[found]))

    def _outside(self, argument: Any, node: fx.Node) -> Any:
        """The same operands, with what is outside in terms of places."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Outside):
                return leaf
            base: Any = leaf.base
            if isinstance(base, fx.Node) and SIZE in base.meta:
                return _size(base)
            if isinstance(base, Made):
                base = dataclasses.replace(base, loop=self._loop(base.loop, node))
            else:
                base = self._places[base]
            return Outside(base, tuple(self._view(view) for view in leaf.path))

        return filled(argument, iter([moved(leaf) for leaf in atoms(argument)]))

    def _loop(self, found: int, node: fx.Node) -> int:
        if found not in self._order:
            raise LengthError("a loop reads what a later loop makes", line_of(node.meta.get("stack_trace")))
        return self._order[found]

    def _view(self, view: View) -> View:
        numbers = tuple(
            (_size(number) if SIZE in number.meta else Value(self._places[number]))
            if isinstance(number, fx.Node)
            else number
            for number in view.numbers
        )
        return dataclasses.replace(view, numbers=numbers)

    # What the items outside read

    def _rewritten(self, argument: Any, node: fx.Node) -> Any:
        if isinstance(argument, Mapping):
            return {key: self._rewritten(value, node) for key, value in argument.items()}
        if isinstance(argument, (tuple, list)):
            leaves = [self._rewritten(value, node) for value in argument]
            return tuple(self._rows(leaves, node))
        if not isinstance(argument, fx.Node):
            return argument
        if SIZE in argument.meta:
            return _size(argument)
        read = read_of(argument)
        made = self._trace.locate(read.base)
        path = tuple(self._view(view) for view in read.path)
        if made is None:
            return Value(self._places[read.base], path)
        loop = self._trace.loops[made.loop]
        number = self._loop(made.loop, node)
        if made.position not in loop.written:
            return Value(*split_part(Made(number, made.position, made.turn), path))
        if made.turn != loop.turns - 1:
            kind = "written" if loop.written[made.position].kind == WRITE else "appended"
            raise LengthError(
                f"what is {kind} in step {made.turn} is read after the loop as it was then",
                line_of(node.meta.get("stack_trace")),
            )
        whole: Any = Whole(number, made.position)
        return Value(whole, path)

    def _rows(self, leaves: list[Any], node: fx.Node) -> Iterator[Any]:
        """Fold what one step made in turns that follow each other."""
        place = 0
        while place < len(leaves):
            stop = place + 1
            while stop < len(leaves) and _follows(
                leaves[place], leaves[stop - 1], leaves[stop], stop - place
            ):
                stop += 1
            if stop - place < 3:
                yield leaves[place]
                place += 1
                continue
            first, last = leaves[place], leaves[stop - 1]
            turns = (first.base.turn, last.base.turn)
            yield Row(
                first.base.loop,
                first.base.position,
                (*first.base.part, *first.path),
                min(turns),
                stop - place,
                turns[0] > turns[1],
            )
            place = stop


def _size(node: fx.Node) -> Size:
    """The size of a node, whatever graph it stands in."""
    hint = node.meta["val"].node.hint if "val" in node.meta else None
    return Size(node, int(hint) if hint is not None else 0)


def _follows(first: Any, before: Any, this: Any, distance: int) -> bool:
    """Whether values are made by one step in turns that follow each other, in the direction of the first two."""
    if not all(isinstance(leaf, Value) and isinstance(leaf.base, Made) for leaf in (first, before, this)):
        return False
    if dataclasses.replace(first, base=dataclasses.replace(first.base, turn=0)) != dataclasses.replace(
        this, base=dataclasses.replace(this.base, turn=0)
    ):
        return False
    steps = abs(this.base.turn - before.base.turn), abs(this.base.turn - first.base.turn)
    return steps == (1, distance)


def generalised(skeletons: Mapping[tuple[int, ...], Skeleton]) -> Skeleton:
    """The skeleton of every length, from those of some.

    Args:
        skeletons: By their length, or by their lengths where there are several.

    Raises:
        LengthError: They differ in more than integers that follow the length.
    """
    lengths = list(skeletons)
    rows = [skeleton.items for skeleton in skeletons.values()]
    for items in zip(*rows, strict=False):
        if len({_kind(item) for item in items}) > 1:
            raise UnlikeError(
                f"the model computes other things at lengths {_sizes(lengths[:2], ' and ')}", _line(items[0])
            )
    if len({len(row) for row in rows}) > 1:
        raise UnlikeError(
            "the model computes more at another length, outside of any loop", _line(rows[0][-1])
        )
    items = tuple(_merged(lengths, columns, _line(columns[0])) for columns in zip(*rows, strict=True))
    outputs = _merged(lengths, [skeleton.outputs for skeleton in skeletons.values()], None)
    return Skeleton(items, outputs)


def _kind(item: Call | Folded) -> Any:
    return item.target if isinstance(item, Call) else len(item.loop.body)


def _line(item: Call | Folded) -> str | None:
    return line_of(item.node.meta.get("stack_trace")) if isinstance(item, Call) else item.loop.line


def _merged(lengths: Sequence[tuple[int, ...]], values: Sequence[Any], where: str | None) -> Any:
    """One value for all lengths."""
    first = values[0]
    if isinstance(first, Size):
        if all((value.size if isinstance(value, Size) else value) == first.size for value in values):
            return first
        return _scaled(lengths, [getattr(value, "size", value) for value in values], first, where)
    if any(type(value) is not type(first) for value in values):
        raise LengthError(f"it computes {_shown(values)} at lengths {_sizes(lengths)}", where)
    if isinstance(first, Series):
        return _law(lengths, values, where)
    if dataclasses.is_dataclass(first):
        return _merged_fields(lengths, values, where)
    if isinstance(first, (tuple, list)):
        if len({len(value) for value in values}) > 1:
            raise UnlikeError(
                f"a list has {_shown([len(value) for value in values])} members at lengths {_sizes(lengths)}, "
                "and no loop makes them", where,
            )  # fmt: skip
        return tuple(_merged(lengths, column, where) for column in zip(*values, strict=True))
    if isinstance(first, dict):
        return {key: _merged(lengths, [value[key] for value in values], where) for key in first}
    return first if all(value == first for value in values) else _merged_numbers(lengths, values, where)


def _merged_numbers(lengths: Sequence[tuple[int, ...]], values: Sequence[Any], where: str | None) -> Any:
    """A number that follows the length."""
    if isinstance(values[0], int) and not isinstance(values[0], bool):
        form = form_of_one(lengths, values)
        if form is not None:
            return form
    if all(isinstance(value, float) for value in values) and len(lengths[0]) == 1:
        law = law_of_length({size: value for (size,), value in zip(lengths, values, strict=True)})
        if law is not None:
            return OfLength(law)
    raise LengthError(f"a number is {_shown(values)} at lengths {_sizes(lengths)}", where)


def _law(lengths: Sequence[tuple[int, ...]], series: Sequence[Series], where: str | None) -> Law:
    """The law of a number of the steps, which holds at all lengths."""
    if len(lengths[0]) > 1:
        raise LengthError("its steps compute with their number, and it loops over two lengths", where)
    law = law_of({size: each.values for (size,), each in zip(lengths, series, strict=True)})
    if law is None:
        seen = [
            f"{_shown(each.values[:3])}, ... at length {size}"
            for (size,), each in zip(lengths, series, strict=True)
        ]
        raise LengthError(
            f"its steps compute with {'; '.join(seen[:2])}, and no formula is known that gives both", where
        )
    return law


def _scaled(
    lengths: Sequence[tuple[int, ...]], values: Sequence[Any], first: Size, where: str | None
) -> Scaled:
    """A size that follows the length as a product: the number that the other sizes are multiplied by."""
    sizes = tuple(_size(node) for node in _factors(first.node))
    rest = math.prod(size.size for size in sizes)
    if rest and all(isinstance(value, int) and value % rest == 0 for value in values):
        form = form_of_one(lengths, [value // rest for value in values])
        if form is not None:
            return Scaled(sizes, form)
    raise LengthError(f"a size of the inputs is {_shown(values)} at lengths {_sizes(lengths)}", where)


def _factors(node: fx.Node) -> list[fx.Node]:
    """The sizes in a product, without its numbers."""
    if node.target is not operator.mul:
        return [node]
    return [factor for part in node.args if isinstance(part, fx.Node) for factor in _factors(part)]


def _merged_fields(lengths: Sequence[tuple[int, ...]], values: Sequence[Any], where: str | None) -> Any:
    first = values[0]
    if isinstance(first, View) and first.written and all(view.written == first.written for view in values):
        return dataclasses.replace(first, numbers=first.written)
    changes = {
        part.name: _merged(lengths, [getattr(value, part.name) for value in values], where)
        for part in dataclasses.fields(first)
        # The size of an axis that is free in the first trace is a number in the others.
        if part.compare and not (part.name == "size" and getattr(first, part.name) is None)
    }
    return dataclasses.replace(first, **changes)


def _sizes(lengths: Sequence[tuple[int, ...]], between: str = ", ") -> str:
    return between.join("x".join(map(str, sizes)) for sizes in lengths)


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
