"""`read_linear`: whether a loop is a linear recurrence that is only read through products, and which ones.

    h' = a * h + B u        h: axes of the state, some of them batch (g), some only in u (p), some read over (n)
    y  = sum over n of C h'

Each of a, B, u and C is a product of factors, and a factor has some of the state's axes: that is what distinguishes one
decay a head (a[g]) from one decay for each entry of the state. Recognised by what the body computes, however it is
spelled: views, sums of products, matrix products. An axis is "read over" if y sums over it.

Source of the form: state space duality, arXiv:2405.21060, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.loop_region import LoopRegion
from moe_export.export.scans.terms import (
    Axes,
    Factor,
    Reading,
    Seen,
    axes_of,
    broadcast,
    constant,
    outer,
    plain,
    regrouped,
)


@dataclass(frozen=True)
class Fed:
    """`h' = … + row * (sum over n of read * h)`: what a step reads of the state before it, stored under other rows.

    Attributes:
        minus: Whether it is subtracted.
    """

    read: tuple[Factor, ...]
    row: tuple[Factor, ...]
    minus: bool


@dataclass(frozen=True)
class LinearState:
    """`h' = decay * h + row * column`.

    Attributes:
        shape: The state's shape.
        decay: The factors of a; empty for no decay.
        row: B: factors with axes that are read over.
        column: u: the other factors.
        batch, over, only: The axes g, n and p.
        rate: For a delta rule (`delta`), `h' = decay * h + rate * row * (column - row decay h)`; else None.
        fed: For a decay that is a diagonal plus a product, what the product adds; else None.
    """

    shape: tuple[int | ir.SymbolicDim, ...]
    decay: tuple[Factor, ...]
    row: tuple[Factor, ...]
    column: tuple[Factor, ...]
    batch: tuple[int, ...]
    over: tuple[int, ...]
    only: tuple[int, ...]
    rate: tuple[Factor, ...] | None = None
    fed: Fed | None = None

    def size(self, axes: Sequence[int]) -> int:
        """The product of the sizes of axes; unknown ones count as 1."""
        return math.prod(self.sizes(axes))

    def sizes(self, axes: Sequence[int]) -> list[int]:
        """The sizes of axes, without unknown ones."""
        return [size for axis in axes if isinstance(size := self.shape[axis], int)]

    @property
    def decays_over(self) -> bool:
        """Whether the decay differs along the axes that are read over."""
        return any(factor.axes & set(self.over) for factor in self.decay)


@dataclass(frozen=True)
class Linear:
    """A loop as linear recurrences, one for each state, and everything that is read from them."""

    states: tuple[LinearState, ...]
    readings: tuple[Reading, ...]


def read_linear(loop: LoopRegion) -> Linear:
    """Read a loop as a linear recurrence.

    Raises:
        RefusedError: It is not one, and why.
    """
    return Reader(loop).read()


class Reader:
    """Reads a body node by node: values that are a state, values read from one, and values computed from those."""

    def __init__(self, loop: LoopRegion) -> None:
        self.loop = loop
        self.dependent = loop.dependent()
        self._body = {value for node in loop.body for value in node.outputs}
        self._seen: dict[ir.Value, Seen] = {}
        self.readings: list[Reading] = []
        self.next: dict[int, Seen] = {}

    def read(self) -> Linear:
        shapes = []
        for number, boundary in enumerate(self.loop.states):
            shape = boundary.outputs[0].shape
            if shape is None:
                raise RefusedError("a state of unknown shape")
            shapes.append(tuple(shape))
            self._seen[boundary.outputs[0]] = Seen(
                number, False, tuple((axis,) for axis in range(len(shape)))
            )
        following = {value: number for number, value in enumerate(self.loop.following)}
        done: set[ir.Value] = set()  # readings, and what is computed from them
        for node in self.loop.body:
            if not any(value in self.dependent for value in node.inputs if value is not None):
                continue
            held = [value for value in node.inputs if value in self._seen]
            if held and any(value in done for value in node.inputs):
                self._take(node.outputs[0], self.mixed(node), following)
            elif not held:
                done.update(node.outputs)
            else:
                self._state_step(node, following, done)
        self._check(done)
        states = [self.state(number, shape) for number, shape in enumerate(shapes)]
        return Linear(tuple(states), tuple(self.readings))

    def mixed(self, node: ir.Node) -> Seen:
        """Handle a node that takes a state together with a value read from one; here such a node is refused."""
        raise RefusedError(f"{node.op_type} mixes a state with what was read from one")

    def _check(self, done: set[ir.Value]) -> None:
        for value in self.loop.following:
            if value in done:
                raise RefusedError("a state is computed from what was read from one")
        for value in self.loop.collected:
            if value in self._seen:
                raise RefusedError("whole states are returned")

    def _state_step(self, node: ir.Node, following: dict[ir.Value, int], done: set[ir.Value]) -> None:
        value = node.outputs[0]
        rule = _RULES.get(node.op_type)
        if rule is None or len(node.outputs) != 1:
            raise RefusedError(f"{node.op_type} of a state is not linear")
        found = rule(self, node)
        if isinstance(found, Reading):
            self.readings.append(found)
            done.add(value)
        else:
            self._take(value, found, following)

    def _take(self, value: ir.Value, found: Seen, following: dict[ir.Value, int]) -> None:
        """Record a value that is a view of a state, scaled and added to."""
        self._seen[value] = found
        if value in following:
            number = following[value]
            if found.new or found.state != number or found.axes != plain(found.axes):
                raise RefusedError("a state is computed from another one, or its axes are moved")
            self.next[number] = found
            self._seen[value] = Seen(number, True, found.axes)

    def state(self, number: int, shape: tuple[int | ir.SymbolicDim, ...]) -> LinearState:
        """The recurrence of a state.

        Raises:
            RefusedError: Its step does not add exactly one product to it.
        """
        found = self.next.get(number)
        if found is None or len(found.terms) != 1:
            raise RefusedError("a step does not add one product to its state")
        over = self.over(number)
        row = tuple(factor for factor in found.terms[0] if factor.axes & over)
        column = tuple(factor for factor in found.terms[0] if not factor.axes & over)
        return self.made(number, shape, found.scale, row, column)

    def over(self, number: int) -> frozenset[int]:
        """The axes that a state is read over."""
        overs = {reading.over for reading in self.readings if reading.state == number}
        if len(overs) != 1:
            raise RefusedError("a state is read over different axes" if overs else "no step reads the state")
        return overs.pop()

    def made(
        self,
        number: int,
        shape: tuple[int | ir.SymbolicDim, ...],
        decay: tuple[Factor, ...],
        row: tuple[Factor, ...],
        column: tuple[Factor, ...],
        rate: tuple[Factor, ...] | None = None,
        fed: Fed | None = None,
    ) -> LinearState:
        """A state of these factors, its axes sorted into batch, read over and only in the column."""
        over = self.over(number)
        reads = [factor for reading in self.readings if reading.state == number for factor in reading.factors]
        within = (*(rate or ()), *((*fed.read, *fed.row) if fed is not None else ()))
        batch = axes_of((*decay, *reads, *row, *within)) - over
        batch |= {axis for axis in set(range(len(shape))) - over if shape[axis] == 1}  # in no factor's labels
        only = set(range(len(shape))) - batch - over
        if not only <= axes_of(column):
            batch |= only  # no factor has some of these axes: what is added is broadcast along them
            only = set()
        for axis in (*over, *only):
            if not isinstance(shape[axis], int):
                raise RefusedError("a size of the state is unknown")
        g, n, p = (tuple(sorted(some)) for some in (batch, over, only))
        return LinearState(shape, decay, row, column, g, n, p, rate, fed)

    # Steps on a state

    def seen(self, node: ir.Node) -> tuple[Seen, ir.Value | None, int]:
        """The operand that is a state, the other operand, and which operand the state is."""
        places = [place for place, value in enumerate(node.inputs) if value in self._seen]
        if len(places) > 1:
            raise RefusedError(f"{node.op_type} of two states")
        place = places[0]
        value = node.inputs[place]
        assert value is not None
        others = [other for at, other in enumerate(node.inputs) if at != place]
        return self._seen[value], others[0] if others else None, place

    def factors(self, value: ir.Value | None, axes: Axes) -> tuple[Factor, ...]:
        """The factors of a value that is broadcast against axes of the state."""
        assert value is not None
        if value.shape is None or len(value.shape) > len(axes):
            raise RefusedError("a factor with more axes than the state")
        labels: list[int | None] = []
        for size, axis in zip(value.shape, axes[len(axes) - len(value.shape) :], strict=True):
            if size == 1:
                labels.append(None)
            elif len(axis) == 1:
                labels.append(axis[0])
            else:
                raise RefusedError("a factor along several axes of the state that were joined")
        return self.split(Factor(value, tuple(labels)))

    def whole(self, value: ir.Value) -> bool:
        """Whether a value counts as one factor, even if it is a product."""
        return value in self.dependent

    def split(self, factor: Factor) -> tuple[Factor, ...]:
        """The factors that a factor is the product of, seen through views."""
        value, labels = factor.value, factor.labels
        node = value.producer()
        if node is None or value not in self._body or self.whole(value):
            return (factor,)
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "Mul":
            return tuple(part for operand in node.inputs for part in self.split(broadcast(operand, labels)))
        if node.op_type == "MatMul" and (pair := outer(node, labels)) is not None:
            return tuple(part for operand in pair for part in self.split(operand))
        if node.op_type == "Identity" and first is not None:
            return self.split(Factor(first, labels))
        if node.op_type == "Unsqueeze" and first is not None:
            axes = constant(node.inputs[1], len(labels))
            return self.split(
                Factor(first, tuple(label for place, label in enumerate(labels) if place not in axes))
            )
        if node.op_type == "Squeeze" and first is not None and len(node.inputs) > 1:
            left: list[int | None] = list(labels)
            for place in sorted(constant(node.inputs[1], len(first.shape or ()))):
                left.insert(place, None)
            return self.split(Factor(first, tuple(left)))
        if node.op_type == "Transpose" and first is not None:
            order = list(node.attributes["perm"].as_ints())
            return self.split(Factor(first, tuple(labels[order.index(place)] for place in range(len(order)))))
        return (factor,)


def _multiplied(reader: Reader, node: ir.Node) -> Seen:
    state, other, place = reader.seen(node)
    if node.op_type == "Div" and place == 0:
        raise RefusedError("a state is divided")
    if node.op_type == "Div":
        raise RefusedError("something is divided by a state")
    more = reader.factors(other, state.axes)
    return replace(state, scale=(*state.scale, *more), terms=tuple((*term, *more) for term in state.terms))


def _added(reader: Reader, node: ir.Node) -> Seen:
    state, other, _ = reader.seen(node)
    if other is None or other.shape is None or len(other.shape) > len(state.axes):
        raise RefusedError("a sum with something larger than the state")
    return replace(state, terms=(*state.terms, reader.factors(other, state.axes)))


def _viewed(reader: Reader, node: ir.Node) -> Seen:
    state, _, _ = reader.seen(node)
    axes = list(state.axes)
    shape = node.outputs[0].shape
    if node.op_type == "Transpose":
        axes = [axes[place] for place in node.attributes["perm"].as_ints()]
    elif node.op_type == "Unsqueeze":
        for place in sorted(constant(node.inputs[1], len(shape or ()))):
            axes.insert(place, ())
    elif node.op_type == "Squeeze":
        gone = constant(node.inputs[1] if len(node.inputs) > 1 else None, len(axes))
        axes = [axis for place, axis in enumerate(axes) if place not in gone]
    elif node.op_type == "Reshape":
        axes = regrouped(axes, node)
    return replace(state, axes=tuple(axes))


def _summed(reader: Reader, node: ir.Node) -> Reading:
    state, _, _ = reader.seen(node)
    gone = constant(node.inputs[1] if len(node.inputs) > 1 else None, len(state.axes))
    kept = int(node.attributes["keepdims"].as_int()) if "keepdims" in node.attributes else 1
    axes = [
        () if place in gone else axis for place, axis in enumerate(state.axes) if place not in gone or kept
    ]
    over = frozenset(axis for place in gone for axis in state.axes[place])
    return Reading(node.outputs[0], state.state, state.new, state.scale, over, tuple(axes), state.terms)


def _contracted(reader: Reader, node: ir.Node) -> Reading:
    state, other, place = reader.seen(node)
    if other is None or other.shape is None or len(other.shape) > len(state.axes):
        raise RefusedError("a state is read by something with more axes")
    shape, axes = other.shape, state.axes
    if place == 0 and len(shape) == 1:
        over, labels, result = axes[-1], axes[-1:], axes[:-1]
    elif place == 0 and shape[-1] == 1:
        over, labels, result = axes[-1], (*axes[:-2], axes[-1], ()), (*axes[:-1], ())
    elif place == 1 and len(shape) >= 2 and shape[-2] == 1:
        over, labels, result = axes[-2], (*axes[:-2], (), axes[-2]), (*axes[:-2], (), axes[-1])
    elif place == 1 and len(shape) == 1:
        over, labels, result = axes[-2], axes[-2:-1], (*axes[:-2], axes[-1])
    else:
        raise RefusedError("a state is read by a matrix")
    more = reader.factors(other, labels)
    terms = tuple((*term, *more) for term in state.terms)
    factors = (*state.scale, *more)
    return Reading(node.outputs[0], state.state, state.new, factors, frozenset(over), result, terms)


_RULES: dict[str, Callable[[Reader, ir.Node], Seen | Reading]] = {
    **dict.fromkeys(("Mul", "Div"), _multiplied),
    "Add": _added,
    **dict.fromkeys(("Identity", "Transpose", "Unsqueeze", "Squeeze", "Reshape"), _viewed),
    "ReduceSum": _summed,
    "MatMul": _contracted,
}
