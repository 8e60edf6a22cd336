"""What nodes of a graph make of weights that are not in memory: recipes with a step more.

`Transpose`, `Cast` and the like of a recipe is a recipe; any other operator becomes one that runs it when the weight
is written. Numbers that are small are numbers again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from moe_export.export.weights.recipe import (
    Array,
    Computed,
    Converted,
    Part,
    Recipe,
    RecipeTensor,
    Reshaped,
    Stacked,
    Transposed,
    recipe_of,
)

Known = Array | Recipe
"""A weight: its numbers, or where they are."""

REALISED = 4096
"""Bytes up to which what comes of recipes is read at once."""


def known_tensor(tensor: ir.TensorProtocol) -> Known:
    """What a constant of a graph holds."""
    return tensor.recipe if isinstance(tensor, RecipeTensor) else tensor.numpy()


def as_tensor(known: Known) -> ir.TensorProtocol:
    """A weight as the tensor of a constant."""
    return RecipeTensor(known) if isinstance(known, Recipe) else ir.tensor(known)


def row_of(known: Known, index: int) -> Known:
    """One row of the first axis, without that axis."""
    if not isinstance(known, Recipe):
        found: Array = known[index]
        return found
    return Reshaped(Part(known, 0, index, index + 1), known.shape[1:])


def stacked(rows: Sequence[Known]) -> Known:
    """Rows behind each other on a new first axis."""
    recipes = tuple(row for row in rows if isinstance(row, Recipe))
    if len(recipes) < len(rows):
        return np.stack([realised(row) for row in rows])
    return Stacked(recipes)


def realised(known: Known) -> Array:
    """The numbers themselves."""
    return known.array() if isinstance(known, Recipe) else known


def follow(
    nodes: Sequence[ir.Node], values: Mapping[ir.Value, Known], wanted: Sequence[ir.Value], version: int
) -> list[Known]:
    """What nodes give for weights, as `_evaluate` does for arrays.

    Args:
        nodes: In order.
        values: What they take.
        wanted: Values among those that the nodes take or give.
        version: Opset.
    """
    known: dict[ir.Value, Known] = dict(values)
    for node in nodes:
        taken = {value: known[value] for value in node.inputs if value is not None}
        if not any(isinstance(one, Recipe) for one in taken.values()):
            arrays = {value: realised(one) for value, one in taken.items()}
            known.update(zip(node.outputs, _evaluate([node], arrays, node.outputs, version), strict=True))
            continue
        step = one_step(node, known)
        for output in node.outputs:
            known[output] = step if step is not None else _computed(node, taken, output, version)
    return [_small(known[value]) for value in wanted]


def _small(known: Known) -> Known:
    return known.array() if isinstance(known, Recipe) and known.nbytes <= REALISED else known


def _computed(node: ir.Node, taken: Mapping[ir.Value, Known], output: ir.Value, version: int) -> Known:
    def run() -> Array:
        arrays = {value: realised(one) for value, one in taken.items()}
        return _evaluate([node], arrays, [output], version)[0]

    shape = output.shape
    if shape is None or output.dtype is None or not shape.is_static():
        return run()
    return Computed(run, output.dtype, tuple(int(size) for size in shape))  # type: ignore[arg-type]


def one_step(node: ir.Node, known: Mapping[ir.Value, Known]) -> Recipe | None:
    """The recipe of a node's one output; None if it takes more than reading the first input in another way."""
    source = known.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    rule = _RULES.get(node.op_type) if not node.domain else None
    if rule is None or not isinstance(source, Recipe) or len(node.outputs) != 1:
        return None
    rest: list[Array | None] = []
    for value in node.inputs[1:]:
        array = known.get(value) if value is not None else None
        if value is not None and not isinstance(array, np.ndarray):
            return None
        rest.append(array if isinstance(array, np.ndarray) else None)
    return rule(node, source, rest)


def _transpose(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe:
    given = node.attributes.get("perm")
    order = tuple(given.as_ints()) if given is not None else tuple(reversed(range(len(source.shape))))
    if isinstance(source, Transposed):
        order, source = tuple(source.order[axis] for axis in order), source.source
    return source if order == tuple(range(len(order))) else Transposed(source, order)


def _cast(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe:
    dtype = ir.DataType(node.attributes["to"].as_int())
    return source if dtype == source.dtype else Converted(source, dtype)


def _reshape(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe | None:
    if not rest or rest[0] is None:
        return None
    shape = [int(size) for size in rest[0].reshape(-1)]
    zero = node.attributes.get("allowzero")
    if zero is None or not zero.as_int():
        shape = [source.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    if -1 in shape:
        others = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = math.prod(source.shape) // others if others else 0
    return Reshaped(source, tuple(shape))


def _axes(node: ir.Node, rest: Sequence[Array | None], rank: int) -> list[int] | None:
    if rest and rest[0] is not None:
        return [int(axis) % rank for axis in rest[0].reshape(-1)]
    given = node.attributes.get("axes")
    return [axis % rank for axis in given.as_ints()] if given is not None else None


def _squeeze(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe:
    axes = _axes(node, rest, len(source.shape))
    if axes is None:
        axes = [axis for axis, size in enumerate(source.shape) if size == 1]
    return Reshaped(source, tuple(size for axis, size in enumerate(source.shape) if axis not in axes))


def _unsqueeze(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe | None:
    count = rest[0].size if rest and rest[0] is not None else len(node.attributes["axes"].as_ints())
    axes = _axes(node, rest, len(source.shape) + count)
    if axes is None:
        return None
    sizes = iter(source.shape)
    return Reshaped(
        source, tuple(1 if axis in axes else next(sizes) for axis in range(len(source.shape) + count))
    )


def _slice(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe | None:
    if len(rest) < 2 or rest[0] is None or rest[1] is None:
        return None
    starts, stops = ([int(value) for value in array.reshape(-1)] for array in (rest[0], rest[1]))
    rank = len(source.shape)
    given = rest[2] if len(rest) > 2 else None
    axes = [int(axis) % rank for axis in given.reshape(-1)] if given is not None else list(range(len(starts)))
    if len(rest) > 3 and rest[3] is not None and any(int(step) != 1 for step in rest[3].reshape(-1)):
        return None
    for axis, start, stop in zip(axes, starts, stops, strict=True):
        first, last, _ = slice(start, stop).indices(source.shape[axis])
        source = Part(source, axis, first, max(first, last))
    return source


def _identity(node: ir.Node, source: Recipe, rest: Sequence[Array | None]) -> Recipe:
    return source


_RULES: Mapping[str, Callable[[ir.Node, Recipe, Sequence[Array | None]], Recipe | None]] = {
    "Transpose": _transpose,
    "Cast": _cast,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Slice": _slice,
    "Identity": _identity,
}


def fold_steps(graph: ir.Graph) -> None:
    """Take nodes that only read a weight in another way into its recipe."""
    for node in list(graph):
        if not node.inputs or recipe_of(node.inputs[0]) is None or node.op_type not in _RULES:
            continue
        values = {
            value: known_tensor(value.const_value)
            for value in node.inputs
            if value is not None and value.const_value is not None
        }
        found = one_step(node, values)
        output = node.outputs[0]
        if found is None or output.is_graph_output():
            continue
        old = node.inputs[0]
        made = ir.Value(
            name=output.name,
            shape=ir.Shape(found.shape),
            type=ir.TensorType(found.dtype),
            const_value=RecipeTensor(found, output.name),
        )
        output.replace_all_uses_with(made)
        output.name = f"{output.name}.folded"
        graph.remove(node, safe=True)
        graph.register_initializer(made)
        if old is not None and not old.uses() and old.name in graph.initializers:
            del graph.initializers[str(old.name)]


def _evaluate(
    nodes: Sequence[ir.Node],
    values: Mapping[ir.Value, Array],
    wanted: Sequence[ir.Value],
    version: int,
) -> list[Array]:
    """What nodes give for arrays that are known now.

    Args:
        nodes: In order.
        values: What they take.
        wanted: Values among those that the nodes take or give.
        version: Opset.
    """
    known = dict(values)
    for node in nodes:
        if node.op_type == "Transpose":  # a view; the reference would copy
            array = known[node.inputs[0]]  # type: ignore[index]
            perm = node.attributes.get("perm")
            known[node.outputs[0]] = array.transpose(perm.as_ints() if perm else None)
            continue
        names = [f"i{index}" if value is not None else "" for index, value in enumerate(node.inputs)]
        results = [f"o{index}" for index in range(len(node.outputs))]
        proto = onnx.helper.make_node(node.op_type, names, results, domain=node.domain)
        proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
        feeds = {
            name: known[value] for name, value in zip(names, node.inputs, strict=True) if value is not None
        }
        run = ReferenceEvaluator(proto, opsets={"": version}).run(None, feeds)
        known.update(zip(node.outputs, map(np.asarray, run), strict=True))
    return [known[value] for value in wanted]
