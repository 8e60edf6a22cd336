"""`Filling`: zeros after the last step, up to a whole number of chunks or of iterations.

length 70, chunks of 32    →    26 steps of zeros at the end
"""

from __future__ import annotations

import onnx_ir as ir

from moe_export.graph_builder import GraphBuilder


class Filling:
    """Counts the steps that the last chunk lacks, and pads values by as many.

    Args:
        nodes: Where nodes are written.
        length: How many steps there are; int64, (1,).
        steps: How many steps a chunk has.
    """

    def __init__(self, nodes: GraphBuilder, length: ir.Value, steps: int) -> None:
        self._nodes = nodes
        self._lacking = nodes.op("Mod", nodes.op("Neg", length), nodes.ints(steps))
        self._pads: dict[tuple[int, int], ir.Value] = {}

    def behind(self, value: ir.Value, axis: int, rank: int, by: ir.Value | None = None) -> ir.Value:
        """A value of this rank with the missing steps appended along an axis, as zeros or as this number."""
        nodes, key = self._nodes, (axis, rank)
        if key not in self._pads:
            ahead, behind = [0] * (rank + axis), [0] * (rank - 1 - axis)
            parts = [nodes.ints(*ahead), self._lacking, *([nodes.ints(*behind)] if behind else [])]
            self._pads[key] = nodes.op("Concat", *parts, axis=0)
        return nodes.op("Pad", value, self._pads[key], *([by] if by is not None else []))
