"""The body of a folded loop: the graph of one iteration, and the sequences that it runs over."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from moe_export.export.frontend.source import line_of
from moe_export.export.recurrence.closed_form import OfLength
from moe_export.export.recurrence.form import Form, moved, scaled
from moe_export.export.recurrence.induction_sequences import InductionSequences, counts, why_not, write_step
from moe_export.export.recurrence.loop import Carried, InductionVariable, Local, Loop, Made, Outside, Step
from moe_export.export.recurrence.loop_body import Along
from moe_export.export.recurrence.operand import PART, SELECT, SLICE, View, atoms
from moe_export.export.recurrence.rolled import (
    Call,
    ItemRef,
    LengthError,
    Scaled,
    Size,
    Summed,
    Value,
)

aten = torch.ops.aten

_WIDEST_WINDOW = 64  # places that an iteration reads at once: each of them becomes an input of the body
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class Outer(Protocol):
    """What the parts of a loop need from the graph around it; `fold` has the only one."""

    graph: fx.Graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node: ...
    def number(self, number: Any) -> Any: ...
    def value(self, value: Any) -> fx.Node: ...
    def viewed(self, node: fx.Node, path: tuple[View, ...]) -> fx.Node: ...
    def result(self, loop: int, index: int) -> fx.Node: ...
    def loop(self, number: int) -> Loop: ...
    def item(self, place: ItemRef) -> Any: ...


def kept_meta(node: fx.Node | None) -> dict[str, Any]:
    """The metadata of a node that says where it comes from, for the node that replaces it."""
    return {key: node.meta[key] for key in _KEPT_META if key in node.meta} if node is not None else {}


def view_call(call: Callable[..., fx.Node], node: fx.Node, view: View, numbers: list[Any]) -> fx.Node:
    """Write one view."""
    if view.kind == PART:
        return call(operator.getitem, node, *numbers)
    return call(aten.select.int if view.kind == SELECT else aten.slice.Tensor, node, *numbers)


def write_counting(
    call: Callable[..., fx.Node],
    step: Step,
    node: fx.Node | None,
    operand: Callable[[Any], Any],
    element: Callable[[Any, torch.dtype], fx.Node],
) -> fx.Node:
    """Write a step that computes with numbers that change from iteration to iteration (`write_step`).

    Raises:
        LengthError: Its operator cannot take a tensor in the place of such a number.
    """
    assert node is not None
    reason = why_not(step, node)
    if reason is not None:
        raise LengthError(reason, line_of(node.meta.get("stack_trace")))
    return write_step(call, step, node, operand, element)


class BodyWriter:
    """Writes one iteration as a graph: states, elements and captured values in, next states and collected values out.

    Attributes:
        initial: Outside nodes that the states start from.
        sequences: Outside nodes that the loop runs over.
        alongs: For each sequence, its axis of time.
        captured: Outside nodes that are the same in every iteration.
        states: The index of the state that holds each carried value.
    """

    def __init__(self, outer: Outer, loop: Loop) -> None:
        self._outer, self._loop = outer, loop
        self.graph = fx.Graph()
        self.initial: list[Any] = []
        self.sequences: list[fx.Node] = []
        self.alongs: list[Along] = []
        self.captured: list[Any] = []
        self.states: dict[Carried, int] = {}
        self._inputs: dict[tuple[str, Any], fx.Node] = {}
        self._order: dict[str, list[fx.Node]] = {"state": [], "element": [], "captured": []}
        self._steps: dict[int, fx.Node] = {}
        self._meta: dict[str, Any] = {}
        self._inductions = InductionSequences(outer.call, outer.number, loop.iterations)

    def write(self, collected: list[Any]) -> fx.Graph:
        """Write the graph; `collected` are the operands that it returns besides the next states."""
        chains = [start for start in self._loop.starts if start.carried.position not in self._loop.written]
        chains.sort(key=lambda start: start.carried.distance)
        links: list[Any] = []  # what each state becomes: a Carried, or the state of that index
        for start in chains:
            for back in range(start.carried.distance):
                carried = dataclasses.replace(start.carried, distance=back + 1)
                if carried not in self.states:
                    self.states[carried] = len(self.initial)
                    self.initial.append(self._outer.value(start.values[start.carried.distance - 1 - back]))
                    links.append(carried)
        for index in range(len(self.initial)):
            self._input("state", index)
        for position, step in enumerate(self._loop.body):
            if position not in self._loop.written:
                self._steps[position] = self._step(position, step)
        following = [self._next(carried) for carried in links]
        self.graph.output((*following, *(self._operand(operand) for operand in collected)))
        self._sort_inputs()
        return self.graph

    def _step(self, position: int, step: Step) -> fx.Node:
        node = self._loop.nodes[0][position]
        self._meta = kept_meta(node)
        if any(counts(leaf) for leaf in atoms((step.args, step.kwargs))):
            return write_counting(self._call, step, node, self._argument, self._count)
        return self._call(step.target, *self._argument(step.args), **self._argument(step.kwargs))

    def _count(self, number: Any, dtype: torch.dtype) -> fx.Node:
        """A number of the iteration, as the element of a sequence with the numbers of all iterations."""
        key = (number, dtype)
        if isinstance(number, OfLength):
            return self._capture(
                key, lambda: InductionSequences(self._outer.call, self._outer.number, 1).scalar(*key)
            )
        known = ("element", key) in self._inputs
        node = self._input("element", key)
        if not known:
            self.sequences.append(self._inductions.sequence(number, dtype))
            self.alongs.append(Along(0))
        return node

    def _sort_inputs(self) -> None:
        """Put states first, then elements, then captured values, in whatever order they were met."""
        body = next(node for node in self.graph.nodes if node.op != "placeholder")
        for kind in ("state", "element", "captured"):
            for node in self._order[kind]:
                body.prepend(node)

    def _next(self, carried: Carried) -> fx.Node:
        if carried.distance > 1:
            return self._input(
                "state", self.states[dataclasses.replace(carried, distance=carried.distance - 1)]
            )
        node: fx.Node = self._operand(Local(carried.position, carried.path))
        return node

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(self._meta)
        return node

    def _input(self, kind: str, key: Any) -> fx.Node:
        if (kind, key) not in self._inputs:
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                node = self.graph.placeholder(f"{kind}_{len(self._order[kind])}")
            self._inputs[kind, key] = node
            self._order[kind].append(node)
        return self._inputs[kind, key]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, Mapping):
            return {key: self._argument(value) for key, value in argument.items()}
        if isinstance(argument, tuple):
            return tuple(self._argument(value) for value in argument)
        return self._operand(argument)

    def _operand(self, operand: Any) -> Any:
        if isinstance(operand, Local):
            return self._viewed(self._steps[operand.position], operand.path)
        if isinstance(operand, Carried):
            return self._input("state", self.states[operand])
        if isinstance(operand, Outside):
            return self._outside(operand)
        if isinstance(operand, (Form, Scaled, Size, Summed, Value)):
            return self._capture(operand, lambda: self._outer.number(operand))
        return operand

    def _viewed(self, node: fx.Node, path: tuple[View, ...]) -> fx.Node:
        for view in path:
            node = view_call(self._call, node, view, [self._operand(number) for number in view.numbers])
        return node

    def _capture(self, key: Any, made: Any) -> fx.Node:
        known = ("captured", key) in self._inputs
        node = self._input("captured", key)
        if not known:
            self.captured.append(made())
        return node

    # Values from outside

    def _outside(self, operand: Outside) -> fx.Node:
        variable = [
            depth
            for depth, view in enumerate(operand.path)
            if any(isinstance(number, InductionVariable) for number in view.numbers)
        ]
        base: Any = operand.base
        if isinstance(base, Made) and isinstance(base.iteration, InductionVariable):
            if variable:
                raise LengthError("an index moves with the steps of two loops", self._loop.line)
            column = self._outer_column(base)
            view = View(SELECT, (0, base.iteration), self._outer.loop(base.loop).iterations)
            return self._viewed(self._element(column, view), operand.path)
        if not variable:
            return self._capture(operand, lambda: self._outer.value(operand))
        if len(variable) > 1:
            raise LengthError("two indices of one value move from step to step", self._loop.line)
        depth = variable[0]
        view, rest = operand.path[depth], operand.path[depth + 1 :]
        value = Value(base, operand.path[:depth])
        if view.kind == PART:
            value, view = self._part(base, view)
        source = self._outer.value(value)
        node = self._element(source, view) if view.kind == SELECT else self._window(source, view)
        return self._viewed(node, rest)

    def _outer_column(self, base: Made) -> fx.Node:
        whole = dataclasses.replace(base, iteration=None)
        return self._outer.value(Value(whole))

    def _part(self, base: Any, view: View) -> tuple[Value, View]:
        """A part of an even `split` that moves with the iterations, as a window that moves over the split value."""
        variable = view.numbers[0]
        item = self._outer.item(base) if isinstance(base, ItemRef) else None
        if isinstance(item, Call) and item.target is aten.split.Tensor:
            source, width, axis = (*item.args, 0)[:3]
            value = item.node.args[0].meta["val"]  # type: ignore[union-attr]
            if isinstance(source, Value) and isinstance(width, int):
                start = InductionVariable(scaled(variable.first, width), variable.step * width)
                end = InductionVariable(moved(start.first, width), start.step)
                return source, View(SLICE, (int(axis) % value.dim(), start, end, 1))
        raise LengthError("the loop runs over parts of different sizes", self._loop.line)

    def _element(self, source: fx.Node, view: View) -> fx.Node:
        """A value of which each iteration reads one index."""
        axis, index = view.numbers
        key = (source, axis, index)
        known = ("element", key) in self._inputs
        node = self._input("element", key)
        if not known:
            self.sequences.append(self._sequence(source, axis, index, view.size))
            self.alongs.append(Along(axis, index.step < 0))
        return node

    def _sequence(self, source: fx.Node, axis: int, index: InductionVariable, size: Any) -> fx.Node:
        """The part of a tensor that the iterations read, in ascending order."""
        iterations, step = self._loop.iterations, abs(index.step)
        low = index.first
        if index.step < 0:
            low = moved(low, scaled(moved(iterations, -1), index.step))
        if low == 0 and step == 1 and size == iterations:
            return source
        end = moved(moved(low, scaled(moved(iterations, -1), step)), 1)
        return self._outer.viewed(source, (View(SLICE, (axis, low, end, step)),))

    def _window(self, source: fx.Node, view: View) -> fx.Node:
        """A value of which each iteration reads several indices: `x[:, t * 4 : t * 4 + 4]`, or a sliding window."""
        axis, start, end, step = view.numbers
        if not (
            isinstance(start, InductionVariable)
            and isinstance(end, InductionVariable)
            and start.step == end.step
        ):
            raise LengthError("the loop reads a part that grows from step to step", self._loop.line)
        width = moved(end.first, scaled(start.first, -1))
        if not isinstance(width, int) or step != 1 or width > _WIDEST_WINDOW:
            raise LengthError(f"the loop reads {width} places a step", self._loop.line)
        places = [
            self._element(
                source, View(SELECT, (axis, InductionVariable(moved(start.first, k), start.step)), view.size)
            )
            for k in range(width)
        ]
        if width == 1:
            return self._call(aten.unsqueeze.default, places[0], axis)
        return self._call(aten.stack.default, places, axis)
