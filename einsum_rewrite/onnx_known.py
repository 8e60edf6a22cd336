"""What is known of the values of an ONNX model: shapes and types, written or inferred."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import onnx_ir as ir

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.notation import ELLIPSIS
from moe_export.errors import EquationError

INVENTED = "unk__"
"""How shape inference begins the names that it gives to sizes of which it knows nothing."""


class Known:
    """Shapes and types; inferring happens on a copy, so the model keeps what was written in it."""

    def __init__(self, model: ir.Model) -> None:
        self._shapes: dict[ir.Value, ir.Shape] = {}
        self._types: dict[ir.Value, ir.DataType] = {}
        inferred = _inferred(model)
        for here, there in zip(model.graphs(), inferred.graphs(), strict=False):
            found = ir.convenience.create_value_mapping(there)
            for name, value in ir.convenience.create_value_mapping(here).items():
                self._learn(value, found.get(name))

    def _learn(self, value: ir.Value, twin: ir.Value | None) -> None:
        if twin is None:
            return
        if twin.shape is not None:
            self._shapes[value] = twin.shape
        if twin.dtype is not None:
            self._types[value] = twin.dtype

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type of a value's elements."""
        return value.dtype or self._types.get(value)

    def shape(self, value: ir.Value) -> tuple[Size, ...] | None:
        """The sizes of a value; None if not even their number is known."""
        inferred = self._shapes.get(value)
        written = value.shape
        if written is None and value.const_value is not None:
            written = ir.Shape(value.const_value.numpy().shape)
        if written is None:
            return None if inferred is None else tuple(map(_size, inferred))
        sizes = tuple(map(_size, written))
        if inferred is None or len(inferred) != len(sizes):
            return sizes
        return tuple(
            theirs if isinstance(theirs, int) or mine is None else mine
            for mine, theirs in zip(sizes, map(_size, inferred), strict=True)
        )

    def shapes(self, equation: Equation, operands: list[ir.Value]) -> list[tuple[Size, ...]]:
        """The shapes of the operands of an einsum; where a rank is not known, the equation tells it.

        Raises:
            EquationError: The equation cannot tell it, because of an ellipsis.
        """
        shapes = []
        for number, (term, value) in enumerate(zip(equation.inputs, operands, strict=False)):
            shape = self.shape(value)
            if shape is None and ELLIPSIS in term:
                raise EquationError(
                    f"nothing is known of the shape of operand {number} ({value.name!r}), "
                    "so its '...' may stand for any number of axes",
                    where=equation.text,
                    hint="write the shape into the file (value_info), or spell the axes out in the equation",
                )
            shapes.append((None,) * len(term) if shape is None else shape)
        return shapes + [()] * (len(operands) - len(shapes))


def _size(dim: int | ir.SymbolicDim) -> Size:
    if isinstance(dim, int):
        return dim
    name = dim.value
    return None if name is None or name.startswith(INVENTED) else str(name)


def _inferred(model: ir.Model) -> ir.Model:
    from onnx_ir.passes.common import ShapeInferencePass

    log = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = log.level
    log.setLevel(logging.ERROR)  # a file whose shapes cannot be inferred is no news to the user
    try:
        copy = model.clone()
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(copy)
    finally:
        log.setLevel(level)
    return copy


def bodies(model: ir.Model) -> Iterator[tuple[ir.Graph | ir.Function, ir.Node]]:
    """Every node with the main graph or the function that it belongs to, subgraphs included."""
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            yield root, node


def taken_names(model: ir.Model) -> set[str]:
    """Every name of a node or a value of the model."""
    taken: set[str] = set()
    graphs: dict[ir.Graph | ir.Function, None] = dict.fromkeys((model.graph, *model.functions.values()))
    for _, node in bodies(model):
        taken |= {node.name or "", *(value.name or "" for value in node.outputs)}
        if node.graph is not None:
            graphs[node.graph] = None
    for graph in graphs:
        taken.update(value.name or "" for value in graph.inputs)
        if isinstance(graph, ir.Graph):
            taken.update(graph.initializers)
    return taken
