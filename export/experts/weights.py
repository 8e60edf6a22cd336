"""The weights of the experts as a lowering takes them: separate or stacked, prepared offline if they are known.

A body may transpose or cast a weight before it uses it (`experts/body_parts`: `prepared`). If the weight is a constant,
or is computed from constants alone, that is done here, once, and the graph holds the result. For weights that are not
in memory it is done when they are written (`onnx/recipe_steps`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.experts.body_parts import BodyParts, PartsBuilder
from moe_export.export.onnx.recipe_steps import (
    Known,
    as_tensor,
    follow,
    known_tensor,
    realised,
    row_of,
    stacked,
)
from moe_export.export.weights.recipe import Recipe
from moe_export.graph_builder import GraphBuilder

Weight = Sequence[ir.Value] | ir.Value
"""E tensors, or one stack (E, ...) of them."""

_MOST = 2**28
"""Bytes of weights that may be read from files for a lowering that computes with them offline."""


class ExpertWeights:
    """The weights of one block, for a body of one expert.

    Args:
        w: Where constants and preparing nodes are written.
        weights: The weights, in the order of the body's inputs.
        count: E.
        opset: The graph's opset.

    Attributes:
        known: Whether all of them are known before run time.
    """

    def __init__(self, w: GraphBuilder, weights: Sequence[Weight], count: int, opset: int) -> None:
        self._w = w
        self._weights = weights
        self._count = count
        self._opset = opset
        self._arrays = [_arrays(weight, opset) for weight in weights]
        self.known = all(array is not None for array in self._arrays)

    def stacks(self) -> list[np.ndarray]:
        """The weights as arrays (E, ...).

        Raises:
            NotExportableError: A weight is only known at run time, or more than 256 MiB of them are in files.
        """
        if not self.known:
            raise NotExportableError(
                "the weights of the experts are computed at run time", code=Code.EXPERTS_FORM
            )
        stacks = self._stacks()
        if sum(stack.nbytes for stack in stacks if isinstance(stack, Recipe)) > _MOST:
            raise NotExportableError(
                "this form computes with the experts' weights, and they are not in memory",
                code=Code.WEIGHT_VALUES,
            )
        return [realised(stack) for stack in stacks]

    def _stacks(self) -> list[Known]:
        return [stacked(array) if isinstance(array, list) else array for array in self._arrays]  # type: ignore[misc]

    def apart(self, parts: BodyParts, builder: PartsBuilder) -> list[list[ir.Value]]:
        """For each expert, its weights as the core takes them."""
        if not self.known:
            return [
                builder.prepared(self._w, [self._one(weight, expert) for weight in self._weights])
                for expert in range(self._count)
            ]
        return [self._constants_of(parts, expert) for expert in range(self._count)]

    def _constants_of(self, parts: BodyParts, expert: int) -> list[ir.Value]:
        found = []
        for value, array in zip(parts.ready, self._prepared(parts, expert), strict=True):
            weight = self._weights[parts.weights.index(value)] if value in parts.weights else None
            if (
                weight is not None
                and not isinstance(weight, ir.Value)
                and weight[expert].const_value is not None
            ):
                found.append(weight[expert])  # the model's own, under its own name
            else:
                found.append(self._constant(array, parts, value, expert))
        return found

    def _constant(self, array: Known, parts: BodyParts, value: ir.Value, expert: int | None) -> ir.Value:
        """A weight as the core takes it, of one expert or (None) of all; named after the model's own weight."""
        name = self._name_of(parts, value, expert)
        if name is not None:
            return self._w.constants.add(as_tensor(array), name)
        own = str(value.name)
        return self._w.constant(as_tensor(array), own if expert is None else f"{expert}.{own}")

    def _name_of(self, parts: BodyParts, value: ir.Value, expert: int | None) -> str | None:
        """`experts.up`, expert 3, transposed: `experts.up.3.transpose`; None if what it is made of has no one name."""
        steps: list[str] = []
        constants = set(parts.body.initializers.values())
        while value not in parts.weights:
            producer = value.producer()
            assert producer is not None  # of `prepared`, which reads nothing but weights and constants
            steps.insert(0, producer.op_type.lower())
            value = next(taken for taken in producer.inputs if taken is not None and taken not in constants)
        weight = self._weights[parts.weights.index(value)]
        if isinstance(weight, ir.Value):
            own = weight
            steps = steps if expert is None else [str(expert), *steps]
        elif expert is None:
            return None
        else:
            own = weight[expert]
        return ".".join([str(own.name), *steps]) if own.const_value is not None else None

    def stacked(self, parts: BodyParts) -> list[ir.Value]:
        """For each weight one stack (E, ...) of what the core of one expert takes.

        Weights that are not known yet are stacked unprepared: what is taken from the stack has to go through
        `PartsBuilder.prepared`.
        """
        if not self.known:
            return [self._stack(weight) for weight in self._weights]
        columns = zip(*(self._prepared(parts, expert) for expert in range(self._count)), strict=True)
        return [
            self._constant(stacked(column), parts, value, None)
            for value, column in zip(parts.ready, columns, strict=True)
        ]

    def batched(self, parts: BodyParts, builder: PartsBuilder) -> list[ir.Value]:
        """For each weight one stack (E, ...), as the core of a body for several experts takes it."""
        if not self.known:
            return builder.prepared(self._w, [self._stack(weight) for weight in self._weights])
        values = dict(zip(parts.weights, self._stacks(), strict=True))
        found = follow(parts.prepared, {**_constants(parts.body), **values}, parts.ready, self._opset)
        return [
            self._constant(array, parts, value, None) for value, array in zip(parts.ready, found, strict=True)
        ]

    def _prepared(self, parts: BodyParts, expert: int) -> list[Known]:
        own: dict[ir.Value, Known] = {
            value: array[expert] if isinstance(array, list) else row_of(array, expert)
            for value, array in zip(parts.weights, self._arrays, strict=True)
            if array is not None
        }
        return follow(parts.prepared, {**_constants(parts.body), **own}, parts.ready, self._opset)

    def _one(self, weight: Weight, expert: int) -> ir.Value:
        if not isinstance(weight, ir.Value):
            return weight[expert]
        w = self._w
        return w.op(
            "Squeeze", w.op("Slice", weight, w.ints(expert), w.ints(expert + 1), w.ints(0)), w.ints(0)
        )

    def _stack(self, weight: Weight) -> ir.Value:
        if isinstance(weight, ir.Value):
            return weight
        w = self._w
        return w.op("Concat", *(w.op("Unsqueeze", value, w.ints(0)) for value in weight), axis=0)


def _constants(body: ir.Graph) -> dict[ir.Value, Known]:
    return {
        value: value.const_value.numpy()
        for value in body.initializers.values()
        if value.const_value is not None
    }


def _arrays(weight: Weight, opset: int) -> list[Known] | Known | None:
    if isinstance(weight, ir.Value):
        return known_array(weight, opset)
    arrays = [known_array(value, opset) for value in weight]
    found = [array for array in arrays if array is not None]
    return found if len(found) == len(arrays) else None


def known_array(value: ir.Value, opset: int) -> Known | None:
    """The value's contents, if it is a constant or is computed from constants alone; else None."""
    needed: list[ir.Node] = []
    arrays: dict[ir.Value, Known] = {}
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        producer = current.producer()
        if current.const_value is not None:
            arrays[current] = known_tensor(current.const_value)
        elif producer is None or producer.graph is None or producer.domain or _has_graph(producer):
            return None
        else:
            needed.append(producer)
            stack += [taken for taken in producer.inputs if taken is not None]
    if not needed:
        return arrays[value]
    order = {node: position for position, node in enumerate(needed[0].graph or ())}
    in_order = sorted(dict.fromkeys(needed), key=lambda node: order[node])
    return follow(in_order, arrays, [value], opset)[0]


def _has_graph(node: ir.Node) -> bool:
    return any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values())
