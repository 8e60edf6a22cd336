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

A state that is fed has such a system, too:

    h(t) = a(t) h(t-1) + b(t) x(t)^T + k(t) v(t)^T          x(t) = c(t)^T h(t-1)
    (I - M) X = N V + (d C) h          M(t, s) = c(t)^T D(t-1, s) b(s), N(t, s) = c(t)^T D(t-1, s) k(s) for s < t
    h' = d(T) h + (e B)^T X + (e K)^T V

A sum of powers of -L takes as many products, but loses all digits where keys are alike, because the powers grow.

Source of the form: arXiv:2406.06484 (UT transform), arXiv:2412.06464 (with decay), arXiv:2503.14456 (fed).

Letters: c chunks, g batch axes of the state, t, s steps of a chunk, n axes read over (keys), p the others (values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from moe_export.export.scans.key_decays import KeyDecays
from moe_export.export.scans.segments import Segments
from moe_export.graph_builder import GraphBuilder


@dataclass(frozen=True)
class Correction:
    """The system that the columns of a chunk solve: `W = inverse (value - read h)`, or `+` if they are fed.

    Attributes:
        inverse: (I + L)^-1, (c, g, t, s).
        read: d K, (c, g, t, n).
        value: V, (c, g, t, p).
        rows: What the columns are stored under, decayed to the end of the chunk, (c, g, s, n).
        known: For a state that is fed: rows like these and columns that do not depend on the state.
    """

    inverse: ir.Value
    read: ir.Value
    value: ir.Value
    rows: ir.Value
    known: tuple[ir.Value, ir.Value] | None = None

    def scan(
        self,
        nodes: GraphBuilder,
        first: ir.Value,
        decay: ir.Value | None,
        shape: Sequence[int | ir.SymbolicDim],
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Pass the states on, chunk by chunk.

        Args:
            nodes: Where nodes are written.
            first: The state before the first chunk, (g, n, p).
            decay: Of whole chunks, (c, g, 1 or n, 1); None for no decay.
            shape: Of a state.

        Returns:
            The last state; the states at the start of each chunk, (c, g, n, p); the columns W, (c, g, t, p).
        """
        body = nodes.inner("chunk")
        sequences = {"inverse": self.inverse, "read": self.read, "rows": self.rows, "value": self.value}
        if decay is not None:
            sequences["decay"] = decay
        if self.known is not None:
            sequences["known_rows"], sequences["known"] = self.known
        state = ir.Value(name=f"{body.prefix}.state", type=first.type)
        step = {name: ir.Value(name=f"{body.prefix}.{name}", type=first.type) for name in sequences}
        sign = "Sub" if self.known is None else "Add"
        left = body.op(sign, step["value"], body.op("MatMul", step["read"], state))
        column = body.op("MatMul", step["inverse"], left)
        kept = body.op("Mul", state, step["decay"]) if decay is not None else state
        # Runtimes fuse a transpose with the product behind it; in front of the Scan it would be a copy.
        swapped = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        following = body.op("Add", kept, body.op("MatMul", body.transposed(step["rows"], swapped), column))
        if self.known is not None:
            known = body.op("MatMul", body.transposed(step["known_rows"], swapped), step["known"])
            following = body.op("Add", following, known)
        outputs = [following, body.op("Identity", state), column]
        for value in (state, *outputs[:2]):
            value.shape = ir.Shape(shape)
        graph = ir.Graph([state, *step.values()], outputs, nodes=body.nodes, name=body.prefix)
        last, starts, columns = nodes.many(
            "Scan", first, *sequences.values(), outputs=3, body=graph, num_scan_inputs=len(sequences)
        )
        last.shape, last.type, starts.type, columns.type = ir.Shape(shape), first.type, first.type, first.type
        return last, starts, columns


def correction(
    nodes: GraphBuilder,
    keys: ir.Value,
    rows: ir.Value,
    rate: ir.Value,
    value: ir.Value,
    decays: Segments | KeyDecays,
) -> Correction:
    """The system of a delta rule's columns.

    Args:
        nodes: Where nodes are written.
        keys: K, (c, g, s, n).
        rows: rate K.
        rate: (c, g, s, 1).
        value: V, (c, g, s, p).
        decays: Of the chunks.
    """
    # What is transposed is neither K nor rate K: with either, runtimes would merge this transpose with another one, and
    # fuse it with no product.
    less = nodes.op("Mul", keys, nodes.op("Neg", rate))  # (c, g, s, n)
    minus = decays.pairs(keys, less, True, earlier=True)  # (c, g, t, s)
    read = decays.from_start(keys, True)
    return Correction(inverse_of_unit(nodes, minus, decays.steps), read, value, decays.to_end(rows))


def feedback(
    nodes: GraphBuilder,
    read: ir.Value,
    again: ir.Value,
    stored: tuple[ir.Value, ir.Value],
    decays: Segments | KeyDecays,
) -> Correction:
    """The system of what a step reads and stores again under other rows.

    Args:
        nodes: Where nodes are written.
        read: B, (c, g, t, n).
        again: A, (c, g, s, n).
        stored: K, (c, g, s, n), and V, (c, g, s, p).
        decays: Of the chunks.
    """
    rows, column = stored
    value = nodes.op("MatMul", decays.pairs(read, rows, False), column)  # what it reads of V in the chunk
    inverse = inverse_of_unit(nodes, decays.pairs(read, again, False, earlier=True), decays.steps)
    known = (decays.to_end(rows), column)
    return Correction(inverse, decays.from_start(read, False), value, decays.to_end(again), known)


def inverse_of_unit(nodes: GraphBuilder, minus: ir.Value, steps: int) -> ir.Value:
    """(I + L)^-1, with -L below the diagonal of `minus` (…, steps, steps); the rest of that is not read."""
    dtype = minus.dtype
    assert dtype is not None
    inverse = nodes.constant(np.eye(steps, dtype=dtype.numpy()))
    size = 1
    while size < steps:
        block = np.arange(steps) // size
        between = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
        change = nodes.op("Mul", minus, nodes.constant(between.astype(dtype.numpy())))
        if size > 1:  # blocks of one row are ones
            change = nodes.op("MatMul", nodes.op("MatMul", inverse, change), inverse)
        inverse = nodes.op("Add", change, inverse)
        size *= 2
    return inverse
