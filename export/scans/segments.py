"""`Segments`: the decays between any two steps of a chunk, from their logarithms, without losing digits.

The decay from step s to step t is the exponential of the sum of the segment s+1 … t. Each segment is summed by itself,
all of them as one product with a matrix of ones and zeros: all terms have one sign, so no digit is lost however strong
the decay is, and the exponential of a sum <= 0 never overflows. The usual difference of two cumulative sums is wrong by
up to 1e-3 where the decay is strong.

Letters: c chunks, g batch axes of the state, t, s steps of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.graph_builder import GraphBuilder

STEPS = 32
"""How many steps T a chunk has: the segments cost T^2 a step, the scan over the chunks 1 / T."""


class Segments:
    """The decays of a chunk, each written once, when it is first asked for.

    Attributes:
        steps: How many steps a chunk has.
        rank: How many axes (c, g, t) has.

    Args:
        nodes: Where nodes are written.
        logarithms: The logarithm of each step's decay, (c, g, t); None for no decay.
        dtype: The type that is computed in.
        rank: How many axes `logarithms` has.
    """

    steps = STEPS

    def __init__(
        self, nodes: GraphBuilder, logarithms: ir.Value | None, dtype: ir.DataType, rank: int
    ) -> None:
        self._nodes, self._logs, self._dtype, self.rank = nodes, logarithms, dtype, rank
        self._made: dict[Any, ir.Value] = {}

    @property
    def has_decay(self) -> bool:
        return self._logs is not None

    def pairs(self, read: ir.Value, rows: ir.Value, new: bool, earlier: bool = False) -> ir.Value:
        """What step t reads of what step s stored, decayed, (c, g, t, s); 0 for steps that it does not see.

        Args:
            read: (c, g, t, n).
            rows: (c, g, s, n).
            new: Whether a step reads the state behind it, rather than the one before it.
            earlier: Whether only pairs with s < t are looked at: others may be anything.
        """
        nodes, rank = self._nodes, self.rank
        products = nodes.op("MatMul", read, nodes.transposed(rows, [*range(rank - 1), rank, rank - 1]))
        return products if earlier and not self.has_decay else nodes.op("Mul", self.within(new), products)

    def from_start(self, read: ir.Value, new: bool) -> ir.Value:
        """Read, (c, g, t, n), times the decay from the start of the chunk."""
        if not self.has_decay:
            return read
        return self._nodes.op("Mul", read, self._nodes.unsqueezed(self.since(new), [self.rank]))

    def within(self, new: bool) -> ir.Value:
        """D: the decay from step s to step t, or to the one before t if not `new`; (c, g, t, s), 0 for later s."""
        key = ("within", new)
        if key not in self._made:
            self._made[key] = self._within(new)
        return self._made[key]

    def _within(self, new: bool) -> ir.Value:
        place = np.arange(STEPS)
        seen = place[:, None] >= place[None, :] + (not new)  # (t, s)
        if self._logs is None:
            return self._constant(seen)
        nodes = self._nodes
        r, t, s = np.ix_(place, place, place)
        inside = ((r > s) & (r <= t - (not new)) & seen[None]).reshape(STEPS, STEPS * STEPS)
        unseen = np.where(seen, 0, -np.inf).reshape(1, -1)
        flat = nodes.op("Reshape", self._logs, nodes.ints(-1, STEPS))
        sums = nodes.op("Gemm", flat, self._constant(inside), self._constant(unseen))
        shape = nodes.op("Shape", self._logs)
        return nodes.op(
            "Reshape", nodes.op("Exp", sums), nodes.op("Concat", shape, nodes.ints(STEPS), axis=0)
        )

    def since(self, new: bool) -> ir.Value:
        """The decay from the start of the chunk to step t, or to the one before if not `new`; (c, g, t)."""
        return self._exponential("since", np.triu(np.ones((STEPS, STEPS)), 0 if new else 1))

    def to_end(self, rows: ir.Value) -> ir.Value:
        """Rows or columns, (c, g, s, …), times the decay from step s to the end of the chunk."""
        if not self.has_decay:
            return rows
        return self._nodes.op("Mul", rows, self._nodes.unsqueezed(self._since_step(), [self.rank]))

    def _since_step(self) -> ir.Value:
        """The decay from step s to the end of the chunk; (c, g, s)."""
        if ("within", True) in self._made:  # it is the last row of that
            if "to end" not in self._made:
                row = self._nodes.scalar(STEPS - 1)
                self._made["to end"] = self._nodes.op("Gather", self.within(True), row, axis=self.rank - 1)
            return self._made["to end"]
        return self._exponential("to end", np.tril(np.ones((STEPS, STEPS)), -1))

    def whole(self) -> ir.Value:
        """The decay of a whole chunk; (c, g, 1, 1)."""
        if "whole" not in self._made:
            product = self._nodes.op(
                "Gather", self.since(True), self._nodes.ints(STEPS - 1), axis=self.rank - 1
            )
            self._made["whole"] = self._nodes.unsqueezed(product, [self.rank])
        return self._made["whole"]

    def _exponential(self, name: str, ones: np.ndarray[Any, Any]) -> ir.Value:
        key = (name, ones.tobytes())
        if key not in self._made:
            assert self._logs is not None
            self._made[key] = self._nodes.op(
                "Exp", self._nodes.op("MatMul", self._logs, self._constant(ones))
            )
        return self._made[key]

    def _constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        return self._nodes.constant(array.astype(self._dtype.numpy()))
