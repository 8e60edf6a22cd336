"""The constants of an ONNX graph: those it has, and those that the new nodes need.

Vectors of integers (axes, shapes) are initializers of the main graph, one for each different vector.
Functions have no initializers, and neither do old files whose initializers must be inputs; there they are
`Constant` nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

FIRST_FREE_INITIALIZERS = 4
"""The IR version from which an initializer need not be an input too."""


class Names:
    """Names that no value or node of the model has."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self._counts: dict[str, int] = {}

    def fresh(self, wish: str) -> str:
        """`wish`, or `wish_1`, `wish_2`, ..."""
        name = wish
        while name in self._taken:
            self._counts[wish] = self._counts.get(wish, 0) + 1
            name = f"{wish}_{self._counts[wish]}"
        self._taken.add(name)
        return name


class Constants:
    """The constants that are seen from one main graph or one function.

    Args:
        root: The main graph or the function.
        names: Names that are free.
        inline: Make `Constant` nodes instead of initializers.
        read_external: Whether weights outside the file may be read, so as to be transposed once and for all.
    """

    def __init__(
        self, root: ir.Graph | ir.Function, names: Names, *, inline: bool, read_external: bool
    ) -> None:
        self._root = root
        self._names = names
        self._inline = inline or isinstance(root, ir.Function)
        self._read_external = read_external
        self._vectors: dict[tuple[int, ...], ir.Value] = {}
        self._moved: dict[tuple[Any, ...], ir.Value] = {}
        self._made: dict[ir.Value, ir.TensorProtocol] = {}
        self._replaced: dict[ir.Value, None] = {}

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A constant int64 vector."""
        key = tuple(values)
        if key not in self._vectors:
            name = self._names.fresh("ints_" + "_".join(map(str, key)).replace("-", "m"))
            self._vectors[key] = self._add(ir.tensor(np.array(key, dtype=np.int64), name=name))
        return self._vectors[key]

    def known(self, value: ir.Value) -> ir.TensorProtocol | None:
        """The tensor behind a value that never changes and may be read."""
        tensor = self._made.get(value)
        if tensor is None and not value.is_graph_input():
            tensor = ir.convenience.get_const_tensor(value)
        if isinstance(tensor, ir.ExternalTensor) and not self._read_external:
            return None
        return tensor

    def moved(self, value: ir.Value, how: tuple[Any, ...], compute: Callable[[Array], Array]) -> ir.Value:
        """A rearranged constant, made once for each value and `how`."""
        key = (value, *how)
        if key not in self._moved:
            tensor = self.known(value)
            assert tensor is not None
            name = self._names.fresh(f"{value.name}_{'_'.join(map(str, how[:1])).lower()}")
            array = np.ascontiguousarray(compute(tensor.numpy()))
            self._moved[key] = self._add(ir.Tensor(array, dtype=tensor.dtype, name=name))
            self._replaced[value] = None
        return self._moved[key]

    def drop_replaced(self) -> None:
        """Remove the constants of which only rearranged copies are used now, and vectors that only helped."""
        for value in (*reversed(self._replaced), *self._vectors.values()):
            if value.uses() or value.is_graph_output() or value.name is None:
                continue
            producer = value.producer()
            if producer is not None and producer.graph is not None:
                producer.graph.remove(producer, safe=True)
            elif value.graph is not None:
                value.graph.initializers.pop(value.name, None)

    def _add(self, tensor: ir.TensorProtocol) -> ir.Value:
        if self._inline:
            node = ir.node("Constant", [], attributes={"value": tensor})
            value = node.outputs[0]
            value.name = tensor.name
            self._place_first(node)
        else:
            value = ir.Value(
                name=tensor.name,
                shape=ir.Shape(tensor.numpy().shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            assert isinstance(self._root, ir.Graph)
            self._root.register_initializer(value)
        self._made[value] = tensor
        return value

    def _place_first(self, node: ir.Node) -> None:
        for first in self._root:
            self._root.insert_before(first, node)
            return
