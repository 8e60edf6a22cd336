"""`KeyDecays`: the decays of a chunk where each key has its own, without a division and without a logarithm.

    pairs(t, s) = sum over n of q(t, n) a(s+1, n) … a(t, n) k(s, n)          0 for s > t

The decay stands inside of the sum, so no matrix of decays can be multiplied by afterwards. As one product of matrices,
`q(t) d(t)` by `k(s) / d(s)` with `d(t) = a(1) … a(t)`, it overflows where the decay is strong. Here the decays between
two steps meet in the middle of a block that has s in its left half and t in its right half:

    block of 8      s ─── a(s+1) … ──▶ │ ◀── … a(t) ─── t          k(s) times the first part, q(t) times the second

Both parts are products of decays, at most 1 if these are, and a strong decay makes them 0, as it should. A pair of
steps has one block in which they are in different halves, so blocks of 2, 4, 8, … steps make one product of matrices
each, of which only the pairs in different halves are taken. From blocks of b steps to those of 2 b, what is read in the
right half is multiplied by the decay of the left half, and what is stored in the left half by that of the right half.
So each number is a product of log2 of the chunk's size of rounded factors, whatever the sign of a decay.

Source of the problem: gated linear attention, arXiv:2312.06635, section 4, which divides chunks twice to the same end.

Letters: c chunks, g batch axes of the state, t, s steps of a chunk, n axes read over (keys), b steps of half a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.graph_builder import GraphBuilder

KEY_STEPS = 16
"""How many steps a chunk has: 32 took a tenth longer for gated linear attention, a quarter longer for RWKV-7."""


@dataclass(frozen=True)
class _Level:
    """What blocks of 2 b steps multiply by: the decay of their other half on one side, 1 on the other.

    Attributes:
        size: b.
        read: [1, decay of the left half], (c, g, blocks, 2, 1, n).
        stored: [decay of the right half, 1], (c, g, blocks, 2, 1, n).
    """

    size: int
    read: ir.Value
    stored: ir.Value


class KeyDecays:
    """The decays of a chunk, each written once.

    Attributes:
        steps: How many steps a chunk has.
        has_decay: As of `Segments`.
        rank: How many axes (c, g, t) has.

    Args:
        nodes: Where nodes are written.
        decay: Of each step, (c, g, t, n).
        rank: See above.
    """

    steps = KEY_STEPS
    has_decay = True

    def __init__(self, nodes: GraphBuilder, decay: ir.Value, rank: int) -> None:
        self._nodes, self._decay, self.rank = nodes, decay, rank
        self._kept = [0] * (rank - 1)  # c and g, as a Reshape copies them
        self._scaled: dict[tuple[ir.Value, bool], list[ir.Value]] = {}
        self._levels: list[_Level] = []
        dtype = decay.dtype
        assert dtype is not None
        self._dtype = dtype.numpy()
        whole, size, one = decay, 1, nodes.constant(np.ones((), self._dtype))
        while size < KEY_STEPS:
            halves = nodes.op("Reshape", whole, nodes.ints(*self._kept, KEY_STEPS // size // 2, 2, -1))
            left, right = nodes.many("Split", halves, nodes.ints(1, 1), outputs=2, axis=rank)
            front = nodes.ints(*[0] * rank, 1, *[0] * (rank + 3))
            behind = nodes.ints(*[0] * (rank + 2 + rank), 1, 0)
            read, stored = nodes.op("Pad", left, front, one), nodes.op("Pad", right, behind, one)
            axes = [rank + 1]
            self._levels.append(_Level(size, nodes.unsqueezed(read, axes), nodes.unsqueezed(stored, axes)))
            whole, size = nodes.op("Mul", left, right), 2 * size
        self._whole = whole  # (c, g, 1, 1, n)

    def pairs(self, read: ir.Value, rows: ir.Value, new: bool, earlier: bool = False) -> ir.Value:
        """What step t reads of what step s stored, (c, g, t, s); 0 for steps that it does not see.

        Args:
            read: q, (c, g, t, n).
            rows: k, (c, g, s, n).
            new: Whether a step reads the state behind it, rather than the one before it.
            earlier: Whether only pairs with s < t are looked at: others may be anything.
        """
        nodes = self._nodes
        place = np.arange(KEY_STEPS)
        swapped = [*range(self.rank - 1), self.rank, self.rank - 1]
        total: ir.Value | None = None
        # Runtimes would merge the transpose of the rows with one that made them, which then takes ten times as long as
        # one that is fused with the product: so these are multiplied by something first.
        left = nodes.constant(np.array([1, 0], self._dtype).reshape(2, 1, 1))
        stored = [self._times(rows, 1, left), *self._rows(rows)[1:]]
        for level, late, early in zip(self._levels, self._reads(read, new), stored, strict=False):
            half = place // level.size
            between = (half[:, None] % 2 == 1) & (half[:, None] == half[None, :] + 1)
            product = nodes.op("MatMul", late, nodes.transposed(early, swapped))
            product = nodes.op("Mul", product, nodes.constant(between.astype(self._dtype)))
            total = product if total is None else nodes.op("Add", total, product)
        assert total is not None
        if new and not earlier:
            own = nodes.op("ReduceSum", nodes.op("Mul", read, rows), nodes.ints(-1), keepdims=1)
            own = nodes.op("Mul", own, nodes.constant(np.eye(KEY_STEPS, dtype=self._dtype)))
            total = nodes.op("Add", total, own)
        return total

    def from_start(self, read: ir.Value, new: bool) -> ir.Value:
        """Q times the decay from the start of the chunk, (c, g, t, n)."""
        return self._reads(read, new)[-1]

    def to_end(self, rows: ir.Value) -> ir.Value:
        """K times the decay to the end of the chunk, (c, g, s, n)."""
        return self._rows(rows)[-1]

    def whole(self) -> ir.Value:
        """The decay of a whole chunk; (c, g, n, 1)."""
        return self._nodes.op("Reshape", self._whole, self._nodes.ints(*self._kept, -1, 1))

    def _reads(self, read: ir.Value, new: bool) -> list[ir.Value]:
        """What each level reads by. The state behind a step is the one before it times the step's decay."""
        key = (read, new)
        if key not in self._scaled:
            if new:
                read = self._nodes.op("Mul", read, self._decay)
            self._scaled[key] = self._grown(read, [level.read for level in self._levels])
        return self._scaled[key]

    def _rows(self, rows: ir.Value) -> list[ir.Value]:
        """What each level has stored."""
        key = (rows, True)
        if key not in self._scaled:
            self._scaled[key] = self._grown(rows, [level.stored for level in self._levels])
        return self._scaled[key]

    def _grown(self, value: ir.Value, factors: Sequence[ir.Value]) -> list[ir.Value]:
        """A value in blocks of 1, 2, 4, … steps."""
        found = [value]
        for level, factor in zip(self._levels, factors, strict=True):
            value = self._times(value, level.size, factor)
            found.append(value)
        return found

    def _times(self, value: ir.Value, size: int, factor: ir.Value) -> ir.Value:
        """A value, (c, g, t, n), times a factor of each half block of `size` steps, (…, 2, 1, n or 1)."""
        nodes = self._nodes
        blocks = nodes.ints(*self._kept, KEY_STEPS // size // 2, 2, size, -1)
        product = nodes.op("Mul", nodes.op("Reshape", value, blocks), factor)
        return nodes.op("Reshape", product, nodes.ints(*self._kept, KEY_STEPS, -1))
