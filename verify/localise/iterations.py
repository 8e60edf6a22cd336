"""Step through a Scan, a Loop or an If of the reference: the inputs of its body, one iteration at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from moe_export.verify.bodies import bodies, captured
from moe_export.verify.localise.level import Level, Session, Value


@dataclass(frozen=True)
class Iteration:
    """One run of a body.

    Args:
        number: Which iteration; None in an If.
        attribute: The attribute of the body that ran.
        inputs: The body's inputs, in order.
        values: The reference's values in it, by name: computed and given.
    """

    number: int | None
    attribute: str
    inputs: tuple[Value, ...]
    values: Mapping[str, Value]


def iterations(level: Level, node: onnx.NodeProto, known: Mapping[str, Value]) -> Iterator[Iteration]:
    """The iterations of a node's body.

    Args:
        level: The reference's graph.
        node: A node in it that has bodies; nothing is yielded for an operator other than Scan, Loop and If.
        known: The reference's values at this level.

    Raises:
        Exception: onnxruntime refuses the body, or fails.
    """
    given = [_value(level, name, known) if name else None for name in node.input]
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "If" and given[0] is not None:
        name = "then_branch" if bool(np.asarray(given[0]).reshape(-1)[0]) else "else_branch"
        stepper = _Stepper(level, node, name, known)
        yield stepper.iteration(None, ())
    elif node.op_type == "Scan":
        yield from _scan(_Stepper(level, node, "body", known), given, attributes)
    elif node.op_type == "Loop":
        yield from _loop(_Stepper(level, node, "body", known), given)


def _value(level: Level, name: str, known: Mapping[str, Value]) -> Value:
    tensor = level.constant(name)
    return known[name] if tensor is None else onnx.numpy_helper.to_array(tensor)


class _Stepper:
    """Runs a body of the reference, every value of it an output."""

    def __init__(
        self, level: Level, node: onnx.NodeProto, attribute: str, known: Mapping[str, Value]
    ) -> None:
        self.attribute = attribute
        self.level = level.body(attribute, node)
        self.names = [name for name in self.level.producer if name]
        outer = [name for name in dict.fromkeys(captured(bodies(node)[attribute])) if name in known]
        self.outer = {name: known[name] for name in outer if self.level.constant(name) is None}
        self.places = [value.name for value in self.level.graph.input]
        self.outputs = [value.name for value in self.level.graph.output]
        self._session: Session | None = None
        self._signature: Any = None
        self._taken: list[str] = []

    def iteration(self, number: int | None, inputs: tuple[Value, ...]) -> Iteration:
        feeds = {**self.outer, **dict(zip(self.places, inputs, strict=True))}
        if not self.names:
            return Iteration(number, self.attribute, inputs, feeds)
        signature = {name: np.shape(value) for name, value in feeds.items() if not isinstance(value, list)}
        if self._session is None or signature != self._signature:
            made = self.level.part(self.names, feeds, ())
            self._session, self._signature = Session(made), signature
            self._taken = [value.name for value in made.graph.input]
        found = self._session.run({name: feeds[name] for name in self._taken})
        return Iteration(
            number, self.attribute, inputs, {**feeds, **dict(zip(self.names, found, strict=True))}
        )

    def results(self, iteration: Iteration) -> list[Value]:
        return [_value(self.level, name, iteration.values) for name in self.outputs]


def _scan(stepper: _Stepper, given: list[Value | None], attributes: Mapping[str, Any]) -> Iterator[Iteration]:
    count = int(attributes["num_scan_inputs"])
    states, streams = (
        given[: len(given) - count],
        [np.asarray(value) for value in given[len(given) - count :]],
    )
    axes = list(attributes.get("scan_input_axes", [0] * count))
    backwards = list(attributes.get("scan_input_directions", [0] * count))
    length = min((stream.shape[axis] for stream, axis in zip(streams, axes, strict=True)), default=0)
    for number in range(length):
        elements = [
            np.take(stream, length - 1 - number if reverse else number, axis)
            for stream, axis, reverse in zip(streams, axes, backwards, strict=True)
        ]
        iteration = stepper.iteration(number, (*(state for state in states if state is not None), *elements))
        yield iteration
        states = list(stepper.results(iteration)[: len(states)])


def _loop(stepper: _Stepper, given: list[Value | None]) -> Iterator[Iteration]:
    limit = None if given[0] is None else int(np.asarray(given[0]).reshape(-1)[0])
    going = given[1] if len(given) > 1 and given[1] is not None else np.array(True)
    states = [state for state in given[2:] if state is not None]
    number = 0
    while bool(np.asarray(going).reshape(-1)[0]) and (limit is None or number < limit):
        iteration = stepper.iteration(number, (np.array(number, np.int64), going, *states))
        yield iteration
        results = stepper.results(iteration)
        going, states = results[0], list(results[1 : 1 + len(states)])
        number += 1
