"""`correction`: what the steps of a delta rule store, for all steps of a chunk at once.

    w(t) = v(t) - k(t)^T a(t) h(t-1)                  within a chunk of T steps, from its state h at the start:
    h(t) = a(t) h(t-1) + rate(t) k(t) w(t)^T          (I + L) W = V - (d K) h
                                                      L(t, s) = D(t, s) k(t)^T k(s) rate(s) for s < t, else 0
                                                      h' = d(T) h + (e rate K)^T W

So this is a linear recurrence (`chunked`, with its D, d and e) whose rows are rate K and whose columns are W, and only
W and h' are computed chunk by chunk. The inverse of I + L is computed for all chunks at once. With X the inverse of its
diagonal blocks of s rows, and C what L has between the first and the second of each two of them:

    (A 0)^-1   ( A^-1           0   )
    (C D)    = (-D^-1 C A^-1   D^-1 )        the inverse of the diagonal blocks of 2 s rows is X - X C X

A sum of powers of -L takes as many products, but loses all digits where keys are alike, because the powers grow.

Source of the form: arXiv:2406.06484 (UT transform), arXiv:2412.06464 (with decay).

Letters: c chunks, g batch axes of the state, t, s steps of a chunk, n axes read over (keys), p the others (values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.export.scans.segments import STEPS, Segments
from moe_export.graph_builder import GraphBuilder


@dataclass(frozen=True)
class Correction:
    """The system that the columns W of a chunk solve: `W = inverse (V - read h)`.

    Attributes:
        inverse: (I + L)^-1, (c, g, t, s).
        read: d K, (c, g, t, n).
    """

    inverse: ir.Value
    read: ir.Value

    def scan(
        self,
        nodes: GraphBuilder,
        first: ir.Value,
        decay: ir.Value | None,
        added: tuple[ir.Value, ir.Value],
        shape: Sequence[int | ir.SymbolicDim],
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Pass the states on, chunk by chunk.

        Args:
            nodes: Where nodes are written.
            first: The state before the first chunk, (g, n, p).
            decay: Of whole chunks, (c, g, 1, 1); None for no decay.
            added: e rate K, (c, g, s, n), and V, (c, g, s, p).
            shape: Of a state.

        Returns:
            The last state; the states at the start of each chunk, (c, g, n, p); the columns W, (c, g, t, p).
        """
        body = nodes.inner("chunk")
        sequences = {"inverse": self.inverse, "read": self.read, "rows": added[0], "value": added[1]}
        if decay is not None:
            sequences["decay"] = decay
        state = ir.Value(name=f"{body.prefix}.state", type=first.type)
        step = {name: ir.Value(name=f"{body.prefix}.{name}", type=first.type) for name in sequences}
        left = body.op("Sub", step["value"], body.op("MatMul", step["read"], state))
        column = body.op("MatMul", step["inverse"], left)
        kept = body.op("Mul", state, step["decay"]) if decay is not None else state
        # Runtimes fuse a transpose with the product behind it; in front of the Scan it would be a copy.
        rows = body.transposed(step["rows"], [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2])
        following = body.op("Add", kept, body.op("MatMul", rows, column))
        outputs = [following, body.op("Identity", state), column]
        for value in (state, *outputs[:2]):
            value.shape = ir.Shape(shape)
        graph = ir.Graph([state, *step.values()], outputs, nodes=body.nodes, name=body.prefix)
        last, starts, columns = nodes.many(
            "Scan", first, *sequences.values(), outputs=3, body=graph, num_scan_inputs=len(sequences)
        )
        last.shape, last.type, starts.type, columns.type = ir.Shape(shape), first.type, first.type, first.type
        return last, starts, columns


def correction(nodes: GraphBuilder, keys: ir.Value, rate: ir.Value, segments: Segments) -> Correction:
    """The system of a delta rule's columns.

    Args:
        nodes: Where nodes are written.
        keys: K, (c, g, s, n).
        rate: (c, g, s, 1).
        segments: The decays.
    """
    rank = segments.rank + 1
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    # What is transposed is neither K nor rate K: with either, runtimes would merge this transpose with another one, and
    # fuse it with no product.
    less = nodes.op("Mul", keys, nodes.op("Neg", rate))  # (c, g, s, n)
    minus = nodes.op("MatMul", keys, nodes.transposed(less, swapped))  # (c, g, t, s)
    read = keys
    if segments.has_decay:
        minus = nodes.op("Mul", minus, segments.within(True))
        read = nodes.op("Mul", keys, nodes.unsqueezed(segments.since(True), [rank - 1]))
    return Correction(inverse_of_unit(nodes, minus), read)


def inverse_of_unit(nodes: GraphBuilder, minus: ir.Value) -> ir.Value:
    """(I + L)^-1, with -L below the diagonal of `minus` (…, STEPS, STEPS); the rest of that is not read."""
    dtype = minus.dtype
    assert dtype is not None
    inverse = nodes.constant(np.eye(STEPS, dtype=dtype.numpy()))
    size = 1
    while size < STEPS:
        block = np.arange(STEPS) // size
        between = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
        change = nodes.op("Mul", minus, nodes.constant(between.astype(dtype.numpy())))
        if size > 1:  # blocks of one row are ones
            change = nodes.op("MatMul", nodes.op("MatMul", inverse, change), inverse)
        inverse = nodes.op("Add", change, inverse)
        size *= 2
    return inverse
