"""`read_linear`: whether a loop is a linear recurrence that is only read through products, and in what terms.

    h' = a * h + B u        h: axes of the state, some of them batch (g), some only in u (p), some read over (n)
    y  = sum over n of C h'

Each of a, B, u and C is a product of factors, and a factor has some of the state's axes: that is what tells a decay
a head (a[g]) from a decay for each entry of the state. Found by what the body computes, however it is spelled:
views, sums of products, matrix products.

Source of the form: state space duality, arXiv:2405.21060, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from moe_export.export.scans.marked import Marked
from moe_export.export.scans.time import CannotError

Axes = tuple[
    tuple[int, ...], ...
]  # for each axis of a value the axes of the state that it stands for; () has size 1


@dataclass(frozen=True)
class Factor:
    """A value of the step, and which axis of the state each of its axes is; None for one of size 1."""

    value: ir.Value
    labels: tuple[int | None, ...]

    @property
    def axes(self) -> set[int]:
        """The state's axes that it has."""
        return {label for label in self.labels if label is not None}


@dataclass(frozen=True)
class _Seen:
    """A value of the body in terms of a state: `view of (product of scale) * h + sum of products`."""

    state: int
    new: bool
    axes: Axes
    scale: tuple[Factor, ...] = ()
    terms: tuple[tuple[Factor, ...], ...] = ()


@dataclass(frozen=True)
class Reading:
    """`value[axes] = sum over `over` of factors * h`; of the step's new state, or of the one before."""

    value: ir.Value
    state: int
    new: bool
    factors: tuple[Factor, ...]
    over: frozenset[int]
    axes: Axes


@dataclass(frozen=True)
class LinearState:
    """`h' = decay * h + row * column`.

    Attributes:
        shape: Of the state.
        decay: Factors; none of them for no decay.
        row: B: factors with axes that are read over.
        column: u: the other factors.
        batch, over, only: The axes g, n and p.
    """

    shape: tuple[int | ir.SymbolicDim, ...]
    decay: tuple[Factor, ...]
    row: tuple[Factor, ...]
    column: tuple[Factor, ...]
    batch: tuple[int, ...]
    over: tuple[int, ...]
    only: tuple[int, ...]

    def size(self, axes: Sequence[int]) -> int:
        """The product of the sizes of axes."""
        return math.prod(self.sizes(axes))

    def sizes(self, axes: Sequence[int]) -> list[int]:
        """The sizes of axes, as far as they are numbers."""
        return [size for axis in axes if isinstance(size := self.shape[axis], int)]


@dataclass(frozen=True)
class Linear:
    """A loop in these terms."""

    states: tuple[LinearState, ...]
    readings: tuple[Reading, ...]


def read_linear(loop: Marked) -> Linear:
    """Read a loop as a linear recurrence.

    Raises:
        CannotError: It is none; says why.
    """
    return _Reader(loop).read()


class _Reader:
    def __init__(self, loop: Marked) -> None:
        self._loop = loop
        self._dependent = loop.dependent()
        self._body = {value for node in loop.body for value in node.outputs}
        self._seen: dict[ir.Value, _Seen] = {}
        self._readings: list[Reading] = []
        self._next: dict[int, _Seen] = {}

    def read(self) -> Linear:
        shapes = []
        for number, mark in enumerate(self._loop.states):
            shape = mark.outputs[0].shape
            if shape is None:
                raise CannotError("a state of unknown shape")
            shapes.append(tuple(shape))
            self._seen[mark.outputs[0]] = _Seen(number, False, tuple((axis,) for axis in range(len(shape))))
        following = {value: number for number, value in enumerate(self._loop.following)}
        done: set[ir.Value] = set()  # readings, and what is computed from them
        for node in self._loop.body:
            if not any(value in self._dependent for value in node.inputs if value is not None):
                continue
            held = [value for value in node.inputs if value in self._seen]
            if held and any(value in done for value in node.inputs):
                raise CannotError(f"{node.op_type} mixes a state with what was read from one")
            if not held:
                done.update(node.outputs)
                continue
            self._state_step(node, following, done)
        self._check(done)
        states = [self._state(number, shape) for number, shape in enumerate(shapes)]
        return Linear(tuple(states), tuple(self._readings))

    def _check(self, done: set[ir.Value]) -> None:
        for value in self._loop.following:
            if value in done:
                raise CannotError("a state is computed from what was read from one")
        for value in self._loop.collected:
            if value in self._seen:
                raise CannotError("whole states are handed out")

    def _state_step(self, node: ir.Node, following: dict[ir.Value, int], done: set[ir.Value]) -> None:
        value = node.outputs[0]
        rule = _RULES.get(node.op_type)
        if rule is None or len(node.outputs) != 1:
            raise CannotError(f"{node.op_type} of a state is not linear")
        found = rule(self, node)
        if isinstance(found, Reading):
            self._readings.append(found)
            done.add(value)
            return
        self._seen[value] = found
        if value in following:
            number = following[value]
            if found.new or found.state != number or found.axes != _plain(found.axes):
                raise CannotError("a state follows from another one")
            self._next[number] = found
            self._seen[value] = _Seen(number, True, found.axes)

    def _state(self, number: int, shape: tuple[int | ir.SymbolicDim, ...]) -> LinearState:
        found = self._next.get(number)
        if found is None or len(found.terms) != 1:
            raise CannotError("a step does not add one product to its state")
        readings = [reading for reading in self._readings if reading.state == number]
        if not readings:
            raise CannotError("nobody reads a state in the loop")
        over = readings[0].over
        if any(reading.over != over for reading in readings):
            raise CannotError("a state is read over different axes")
        row = tuple(factor for factor in found.terms[0] if factor.axes & over)
        column = tuple(factor for factor in found.terms[0] if not factor.axes & over)
        decays = {axis for factor in found.scale for axis in factor.axes}
        reads = {axis for reading in readings for factor in reading.factors for axis in factor.axes}
        rows = {axis for factor in row for axis in factor.axes}
        if decays & over:
            raise CannotError("its decay differs along the axes that are read over")
        batch = (decays | reads | rows) - over
        only = set(range(len(shape))) - batch - over
        if not only <= {axis for factor in column for axis in factor.axes}:
            batch |= only  # an axis that nothing has: broadcast
            only = set()
        for axis in (*over, *only):
            if not isinstance(shape[axis], int):
                raise CannotError("a size of the state is not known")
        return LinearState(
            shape, found.scale, row, column, tuple(sorted(batch)), tuple(sorted(over)), tuple(sorted(only))
        )

    # Steps on a state

    def seen(self, node: ir.Node) -> tuple[_Seen, ir.Value | None, int]:
        """The operand that is a state, the other operand, and the place of the first."""
        places = [place for place, value in enumerate(node.inputs) if value in self._seen]
        if len(places) > 1:
            raise CannotError(f"{node.op_type} of two states")
        place = places[0]
        value = node.inputs[place]
        assert value is not None
        others = [other for at, other in enumerate(node.inputs) if at != place]
        return self._seen[value], others[0] if others else None, place

    def factors(self, value: ir.Value | None, axes: Axes) -> tuple[Factor, ...]:
        """A value that is broadcast against axes, as a product."""
        assert value is not None
        if value.shape is None or len(value.shape) > len(axes):
            raise CannotError("a factor with more axes than the state")
        labels: list[int | None] = []
        for size, axis in zip(value.shape, axes[len(axes) - len(value.shape) :], strict=True):
            if size == 1:
                labels.append(None)
            elif len(axis) == 1:
                labels.append(axis[0])
            else:
                raise CannotError("a factor along several axes of the state that were joined")
        return self._split(Factor(value, tuple(labels)))

    def _split(self, factor: Factor) -> tuple[Factor, ...]:
        """Through products and views."""
        value, labels = factor.value, factor.labels
        node = value.producer()
        if node is None or value not in self._body or value in self._dependent:
            return (factor,)
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "Mul":
            return tuple(part for operand in node.inputs for part in self._split(_broadcast(operand, labels)))
        if node.op_type == "MatMul" and (pair := _outer(node, labels)) is not None:
            return tuple(part for operand in pair for part in self._split(operand))
        if node.op_type == "Identity" and first is not None:
            return self._split(Factor(first, labels))
        if node.op_type == "Unsqueeze" and first is not None:
            axes = _constant(node.inputs[1], len(labels))
            return self._split(
                Factor(first, tuple(label for place, label in enumerate(labels) if place not in axes))
            )
        if node.op_type == "Transpose" and first is not None:
            order = list(node.attributes["perm"].as_ints())
            return self._split(
                Factor(first, tuple(labels[order.index(place)] for place in range(len(order))))
            )
        return (factor,)


def _plain(axes: Axes) -> Axes:
    return tuple((place,) for place in range(len(axes)))


def _broadcast(value: ir.Value | None, labels: Sequence[int | None]) -> Factor:
    if value is None or value.shape is None:
        raise CannotError("a factor of unknown shape")
    kept = labels[len(labels) - len(value.shape) :]
    return Factor(
        value, tuple(None if size == 1 else label for size, label in zip(value.shape, kept, strict=True))
    )


def _outer(node: ir.Node, labels: tuple[int | None, ...]) -> tuple[Factor, Factor] | None:
    """A matrix product over an axis of size 1, as a product that is broadcast."""
    left, right = node.inputs
    if left is None or right is None or left.shape is None or right.shape is None:
        return None
    if min(len(left.shape), len(right.shape)) < 2 or left.shape[-1] != 1:
        return None
    return _broadcast(left, (*labels[:-1], None)), _broadcast(right, (*labels[:-2], None, labels[-1]))


def _constant(value: ir.Value | None, rank: int) -> list[int]:
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise CannotError("axes that are computed")
    return [int(axis) % rank for axis in tensor.numpy().reshape(-1)]


def _multiplied(reader: _Reader, node: ir.Node) -> _Seen:
    state, other, place = reader.seen(node)
    if node.op_type == "Div" and place == 0:
        raise CannotError("a state is divided")
    if node.op_type == "Div":
        raise CannotError("something is divided by a state")
    more = reader.factors(other, state.axes)
    return replace(state, scale=(*state.scale, *more), terms=tuple((*term, *more) for term in state.terms))


def _added(reader: _Reader, node: ir.Node) -> _Seen:
    state, other, _ = reader.seen(node)
    if other is None or other.shape is None or len(other.shape) > len(state.axes):
        raise CannotError("a sum with something larger than the state")
    return replace(state, terms=(*state.terms, reader.factors(other, state.axes)))


def _viewed(reader: _Reader, node: ir.Node) -> _Seen:
    state, _, _ = reader.seen(node)
    axes = list(state.axes)
    shape = node.outputs[0].shape
    if node.op_type == "Transpose":
        axes = [axes[place] for place in node.attributes["perm"].as_ints()]
    elif node.op_type == "Unsqueeze":
        for place in sorted(_constant(node.inputs[1], len(shape or ()))):
            axes.insert(place, ())
    elif node.op_type == "Squeeze":
        gone = _constant(node.inputs[1] if len(node.inputs) > 1 else None, len(axes))
        axes = [axis for place, axis in enumerate(axes) if place not in gone]
    elif node.op_type == "Reshape":
        axes = _regrouped(axes, node)
    return replace(state, axes=tuple(axes))


def _regrouped(axes: Sequence[tuple[int, ...]], node: ir.Node) -> list[tuple[int, ...]]:
    """The axes after a reshape that only joins some, or adds some of size 1."""
    old, new = node.inputs[0].shape if node.inputs[0] else None, node.outputs[0].shape
    if old is None or new is None:
        raise CannotError("a Reshape of an unknown shape")
    result: list[tuple[int, ...]] = []
    place = 0
    for size in new:
        if size == 1:
            result.append(())
            continue
        joined: list[int] = []
        product: object = None
        while place < len(old) and str(product) != str(size):
            step = old[place]
            joined += axes[place]
            if product is None:
                product = step
            elif isinstance(product, int) and isinstance(step, int):
                product *= step
            else:
                raise CannotError("a Reshape of sizes that are not known")
            place += 1
        if str(product) != str(size):
            raise CannotError("a Reshape that takes a state's axis apart")
        result.append(tuple(joined))
    return result


def _summed(reader: _Reader, node: ir.Node) -> Reading:
    state, _, _ = reader.seen(node)
    if state.terms:
        raise CannotError("what is read is more than a product with a state")
    gone = _constant(node.inputs[1] if len(node.inputs) > 1 else None, len(state.axes))
    kept = int(node.attributes["keepdims"].as_int()) if "keepdims" in node.attributes else 1
    axes = [
        () if place in gone else axis for place, axis in enumerate(state.axes) if place not in gone or kept
    ]
    over = frozenset(axis for place in gone for axis in state.axes[place])
    return Reading(node.outputs[0], state.state, state.new, state.scale, over, tuple(axes))


def _contracted(reader: _Reader, node: ir.Node) -> Reading:
    state, other, place = reader.seen(node)
    if state.terms or other is None or other.shape is None or len(other.shape) > len(state.axes):
        raise CannotError("what is read is more than a product with a state")
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
        raise CannotError("a state is read by a matrix")
    factors = (*state.scale, *reader.factors(other, labels))
    return Reading(node.outputs[0], state.state, state.new, factors, frozenset(over), result)


_RULES: dict[str, Callable[[_Reader, ir.Node], _Seen | Reading]] = {
    **dict.fromkeys(("Mul", "Div"), _multiplied),
    "Add": _added,
    **dict.fromkeys(("Identity", "Transpose", "Unsqueeze", "Squeeze", "Reshape"), _viewed),
    "ReduceSum": _summed,
    "MatMul": _contracted,
}
