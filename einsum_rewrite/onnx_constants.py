"""The constants of an ONNX graph that has some already: what they hold, and rearranged ones in their place.

Functions have no initializers, and in old files initializers must be inputs; there the new ones are `Constant` nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.graph_builder import Array, Constants, Names

FIRST_FREE_INITIALIZERS = 4
"""The IR version from which an initializer need not be an input too."""


class MovedConstants(Constants):
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
        super().__init__(root, names, inline=inline)
        self._read_external = read_external
        self._moved: dict[tuple[Any, ...], ir.Value] = {}
        self._replaced: dict[ir.Value, None] = {}

    def known(self, value: ir.Value) -> ir.TensorProtocol | None:
        """The tensor behind a value that never changes and may be read."""
        tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
        if isinstance(tensor, ir.ExternalTensor) and not self._read_external:
            return None
        return tensor

    def moved(self, value: ir.Value, how: tuple[Any, ...], compute: Callable[[Array], Array]) -> ir.Value:
        """A rearranged constant, made once for each value and `how`."""
        key = (value, *how)
        if key not in self._moved:
            tensor = self.known(value)
            assert tensor is not None
            array = np.ascontiguousarray(compute(tensor.numpy()))
            name = f"{value.name}_{'_'.join(map(str, how[:1])).lower()}"
            self._moved[key] = self.add(ir.Tensor(array, dtype=tensor.dtype), name)
            self._replaced[value] = None
        return self._moved[key]

    def drop_replaced(self) -> None:
        """Remove the constants of which only rearranged copies are used now, and vectors that only helped."""
        for value in (*reversed(self._replaced), *self.all_shared()):
            if value.uses() or value.is_graph_output() or value.name is None:
                continue
            producer = value.producer()
            if producer is not None and producer.graph is not None:
                producer.graph.remove(producer, safe=True)
            elif value.graph is not None:
                value.graph.initializers.pop(value.name, None)
