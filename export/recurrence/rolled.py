"""`RolledGraph`: a traced graph as plain data, with its loops folded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_export.errors import RefusedError
from moe_export.export.frontend.source import line_of
from moe_export.export.recurrence.loop import WRITE, Loop, Made, Outside, split_part
from moe_export.export.recurrence.loops import Repeats
from moe_export.export.recurrence.operand import SIZE, Read, View, atoms, filled, read_of


@dataclass(frozen=True)
class ItemRef:
    """A reference to an input or weight by name, or to an item of the graph by number."""

    key: str | int


@dataclass(frozen=True)
class Value:
    """A value outside loops: `path` applied to an item, an input, or what a loop made in one iteration."""

    base: ItemRef | Made
    path: tuple[View, ...] = ()


@dataclass(frozen=True)
class Size:
    """A size of the inputs, or a number computed of such; `node` computes it, and it is `size` in the trace."""

    node: fx.Node
    size: int | float


@dataclass(frozen=True)
class Scaled:
    """A product of sizes of the inputs and an integer that follows the length: `batch * L`."""

    sizes: tuple[Size, ...]
    number: Any


@dataclass(frozen=True)
class Summed:
    """A sum of sizes of the inputs, or of products of such, and an integer that follows the length: `past + L`."""

    sizes: tuple[Size, ...]
    number: Any


@dataclass(frozen=True)
class Whole:
    """A buffer that a loop writes into or appends to, as it is after the loop."""

    loop: int
    position: int


@dataclass(frozen=True)
class Row:
    """A list of a loop's values in `count` consecutive iterations, `first` being the earliest; perhaps in reverse."""

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
    """A loop whose outside operands are `ItemRef`s, sizes and values of earlier loops."""

    loop: Loop
    number: int


@dataclass(frozen=True)
class RolledGraph:
    """A whole graph with its loops folded.

    Attributes:
        items: Operators and loops, in an order in which they can run.
        outputs: The graph's outputs, nested as the model returns them.
    """

    items: tuple[Call | Folded, ...]
    outputs: Any


class LengthError(RefusedError):
    """The traces differ in more than integers that follow the length: why, and on which line of the model."""


def roll(trace: Repeats) -> RolledGraph:
    """Fold the loops that were found.

    Raises:
        LengthError: Something outside reads a value that a loop no longer has after its end, or does not have yet.
    """
    return _Folding(trace).graph()


class _Folding:
    def __init__(self, trace: Repeats) -> None:
        self._trace = trace
        self._items: list[Call | Folded] = []
        self._places: dict[fx.Node, ItemRef] = {}
        self._order: dict[int, int] = {}  # the loop's number as it was found → its number in the graph

    def graph(self) -> RolledGraph:
        starts = {loop.first: number for number, loop in enumerate(self._trace.loops)}
        inside = {node for loop in self._trace.loops for row in loop.nodes for node in row}
        outputs: Any = ()
        for node in self._trace.graph.nodes:
            if node.op == "placeholder":
                self._places[node] = ItemRef(node.name)
            elif node.op == "output":
                outputs = self._rewritten(node.args[0], node)
            elif node in starts:
                self._fold(starts[node])
            elif node not in inside and SIZE not in node.meta and Read(node) == read_of(node):
                args = tuple(self._rewritten(argument, node) for argument in node.args)
                kwargs = {key: self._rewritten(value, node) for key, value in node.kwargs.items()}
                self._places[node] = ItemRef(len(self._items))
                self._items.append(Call(node.target, args, kwargs, node))
        return RolledGraph(tuple(self._items), outputs)

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
        """The same operands, with references to items in the place of nodes outside."""

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Outside):
                return leaf
            base: Any = leaf.base
            if isinstance(base, fx.Node) and SIZE in base.meta:
                return size_of(base)
            path = tuple(self._view(view) for view in leaf.path)
            # Loops found together know nothing of each other: one may start from what another ends with.
            made = base if isinstance(base, Made) else self._trace.locate(base)
            if made is not None:
                return Outside(*self._made(made, path, node))
            if base not in self._places:
                reader = line_of(node.meta.get("stack_trace"))
                raise LengthError("a loop reads what is computed after it begins", reader)
            base = self._places[base]
            return Outside(base, path)

        return filled(argument, iter([moved(leaf) for leaf in atoms(argument)]))

    def _loop(self, found: int, node: fx.Node) -> int:
        if found not in self._order:
            raise LengthError("a loop reads what a later loop makes", line_of(node.meta.get("stack_trace")))
        return self._order[found]

    def _view(self, view: View) -> View:
        numbers = tuple(
            (size_of(number) if SIZE in number.meta else Value(self._places[number]))
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
            return size_of(argument)
        read = read_of(argument)
        made = self._trace.locate(read.base)
        path = tuple(self._view(view) for view in read.path)
        if made is None:
            return Value(self._places[read.base], path)
        return Value(*self._made(made, path, node))

    def _made(self, made: Made, path: tuple[View, ...], node: fx.Node) -> tuple[Any, tuple[View, ...]]:
        """What a loop made, as `node` reads it, and the path that is left to be applied to it."""
        loop = self._trace.loops[made.loop]
        number = self._loop(made.loop, node)
        if made.position not in loop.written:
            return split_part(dataclasses.replace(made, loop=number), path)
        if made.iteration != loop.iterations - 1:
            kind = "written into" if loop.written[made.position].kind == WRITE else "appended to"
            raise LengthError(
                f"a buffer that the loop has {kind} is read after it as it was after step {made.iteration}",
                line_of(node.meta.get("stack_trace")),
            )
        return Whole(number, made.position), path

    def _rows(self, leaves: list[Any], node: fx.Node) -> Iterator[Any]:
        """Fold the values of one step in three or more consecutive iterations into a `Row`."""
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
            iterations = (first.base.iteration, last.base.iteration)
            yield Row(
                first.base.loop,
                first.base.position,
                (*first.base.part, *first.path),
                min(iterations),
                stop - place,
                iterations[0] > iterations[1],
            )
            place = stop


def size_of(node: fx.Node) -> Size:
    """A node of the shape arithmetic as a `Size`; 0 in the trace if that is unknown."""
    hint = node.meta["val"].node.hint if "val" in node.meta else None
    if hint is None:
        return Size(node, 0)
    return Size(node, float(hint) if isinstance(node.meta["val"], torch.SymFloat) else int(hint))


def _follows(first: Any, before: Any, this: Any, distance: int) -> bool:
    """Whether a value comes from the same step as those before it, one iteration further in the same direction."""
    if not all(isinstance(leaf, Value) and isinstance(leaf.base, Made) for leaf in (first, before, this)):
        return False
    if dataclasses.replace(first, base=dataclasses.replace(first.base, iteration=0)) != dataclasses.replace(
        this, base=dataclasses.replace(this.base, iteration=0)
    ):
        return False
    steps = abs(this.base.iteration - before.base.iteration), abs(this.base.iteration - first.base.iteration)
    return steps == (1, distance)
