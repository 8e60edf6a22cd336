"""`share_buffers`: keys and values in buffers that stay where they are, by `com.microsoft.GroupQueryAttention`.

    present = Concat(past, new)          present = past, and behind its p entries the new ones

A `Concat` copies all that was kept for each token. The operator takes keys and values in a buffer that may be longer
than they are; where a runtime hands in one memory as past and as present, it writes what is new and copies nothing.
Without, `present` is as long as it has to be: `max(buffer, p + n)`, which is that of `Concat` if the buffer is full.
p is what the mask's length leaves of n, because a buffer's size does not say it.

The mask that the model makes is added to scores as it is, so padding and windows are what they were. Beside it the
operator is causal, which a decoder is: what it gives in parts is what it gives at once.

The kernel refuses several tokens of several rows that have a past, and no tokens at all. These are computed by the
nodes that were found, from the entries of the buffer that count. So each layer has an `If`, with nothing but the kernel
on one side: what leads to it and away from it is outside, where onnxruntime joins it with what is around.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft.GroupQueryAttention);
what the kernel of the CPU refuses was seen in onnxruntime 1.31.

Letters as in `cached_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.export.decoder.cached_attention import (
    CachedAttention,
    NoAttentionError,
    find_attention,
    sized,
)
from moe_export.export.decoder.whole import MASK
from moe_export.export.tracing.dims import PAST, SEQUENCE
from moe_export.graph_builder import GraphBuilder

DOMAIN = "com.microsoft"
BUFFER = "buffer"
"""The axis of `present.*` that grows, where it is as long as the buffer that goes in."""
_TIME, _END = 2, np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Sizes:
    """Sizes that all layers read.

    Attributes:
        past, new, total: p, n and t, each (1,) of int64.
        last: t - 1 for each row: int32 (b,).
        count: t: int32 ().
        taken: Whether the kernel takes them: bool (1,).
    """

    past: ir.Value
    new: ir.Value
    total: ir.Value
    last: ir.Value
    count: ir.Value
    taken: ir.Value


def share_buffers(model: ir.Model) -> str:
    """Rewrite the attention of all layers, in place, or of none.

    Returns:
        What was done, or why nothing was.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    pasts = [value for value in graph.inputs if PAST in _names(value) and value.name != MASK]
    tokens = next((value for value in graph.inputs if _names(value)[1:2] == [SEQUENCE]), None)
    try:
        if MASK not in inputs or tokens is None:
            raise NoAttentionError("it takes no attention_mask, whose length says what of a buffer counts")
        if not pasts:
            raise NoAttentionError("it keeps no keys")
        found = find_attention(graph, pasts)
    except NoAttentionError as reason:
        return f"keys and values are copied for each token, not kept in one buffer: {reason}"
    first = next(iter(graph))
    w = GraphBuilder(graph, "buffers", before=first, typed=True)
    sizes = _sizes(w, inputs[MASK], tokens)
    for past in pasts:
        _read_from(past, sizes.past)
    masks: dict[ir.Value, ir.Value] = {}
    for number, attention in enumerate(found):
        for join in (attention.key, attention.value):
            _read_from(join.outputs[0], sizes.total)
        _write(graph, attention, sizes, masks, number)
    model.opset_imports.setdefault(DOMAIN, 1)
    layers = f"{len(found)} layer{'s' * (len(found) > 1)}"
    return f"keys and values of {layers} may stay in one buffer (GroupQueryAttention)"


def in_buffers(graph: ir.Graph) -> bool:
    """Whether one buffer of the greatest length may be handed in as past and as present."""
    return any(BUFFER in _names(value) for value in graph.outputs)


def _names(value: ir.Value) -> list[str | None]:
    return [size.value if isinstance(size, ir.SymbolicDim) else None for size in value.shape or ()]


def _sizes(w: GraphBuilder, mask: ir.Value, tokens: ir.Value) -> _Sizes:
    total, new = w.op("Shape", mask, start=1, end=2), w.op("Shape", tokens, start=1, end=2)
    batch, one, none = w.op("Shape", tokens, start=0, end=1), w.ints(1), w.ints(0)
    past = w.op("Sub", total, new)
    plain = w.op("Or", w.op("Equal", past, none), w.op("Equal", batch, one))
    several = w.op("And", w.op("Greater", new, none), plain)
    last = w.op("Cast", w.op("Sub", total, one), to=ir.DataType.INT32.value)
    return _Sizes(
        past=past,
        new=new,
        total=total,
        last=w.op("Expand", last, batch),
        count=w.op("Squeeze", w.op("Cast", total, to=ir.DataType.INT32.value), none),
        taken=w.op("Or", w.op("Equal", new, one), several, name="taken"),
    )


def _read_from(value: ir.Value, size: ir.Value) -> None:
    """Let nodes that read how long keys or values are read it from elsewhere: a buffer is longer."""
    for node in list(value.consumers()):
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        if sized(node) and start % 4 == _TIME:
            node.outputs[0].replace_all_uses_with(size)
            assert node.graph is not None
            node.graph.remove(node)


def _write(
    graph: ir.Graph,
    attention: CachedAttention,
    sizes: _Sizes,
    masks: dict[ir.Value, ir.Value],
    number: int,
) -> None:
    last = attention.inner[-1]
    w = GraphBuilder(graph, f"{last.name}.buffers", last, before=last, typed=True)
    if attention.mask not in masks:  # the kernel broadcasts rows and heads of a mask only
        ones = w.ints(1, 1)
        masks[attention.mask] = w.op(
            "Expand", attention.mask, w.op("Concat", ones, sizes.new, sizes.total, axis=0), name="mask"
        )
    heads, key_heads = attention.heads
    joins = [attention.key, attention.value]
    given = [_rows(w, attention.query, heads * attention.width)]
    given += [_rows(w, join.inputs[1], key_heads * attention.width) for join in joins]
    branches: dict[str, Any] = {
        "then_branch": _in_buffers(w.inner("kernel"), attention, given, sizes, masks[attention.mask], number),
        "else_branch": _as_found(w.inner("nodes"), attention, sizes, number),
    }
    results = [attention.result, *(join.outputs[0] for join in joins)]
    rows, *presents = w.many("If", sizes.taken, outputs=len(results), name="if", **branches)
    split = w.op("Reshape", rows, w.ints(0, 0, heads, attention.width))
    new = [w.transposed(split, (0, 2, 1, 3)), *presents]
    for old, made in zip(results, new, strict=True):
        made.type, made.shape = old.type, old.shape
        made.name, old.name = old.name, f"{old.name}.found"
    for made in new[1:]:
        assert made.shape is not None
        made.shape = ir.Shape([BUFFER if axis == _TIME else size for axis, size in enumerate(made.shape)])
    for old, made in zip(results, new, strict=True):
        old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove([*attention.inner, *joins])


def _in_buffers(
    w: GraphBuilder,
    attention: CachedAttention,
    given: Sequence[ir.Value],
    sizes: _Sizes,
    mask: ir.Value,
    number: int,
) -> ir.Graph:
    """The branch of the kernel: rows of y, and the buffers of keys and values, from rows of q, k and v."""
    heads, key_heads = attention.heads
    options: dict[str, Any] = {"softcap": attention.softcap} if attention.softcap else {}
    sinks = None if attention.sinks is None else w.constant(attention.sinks)
    rows, *presents = w.many(
        "GroupQueryAttention", *given, attention.key.inputs[0], attention.value.inputs[0], sizes.last, sizes.count,
        None, None, None, mask, sinks, outputs=3, name="attention", domain=DOMAIN,
        num_heads=heads, kv_num_heads=key_heads, scale=attention.scale, **options,
    )  # fmt: skip
    kind = attention.result.type
    for each in (rows, *presents):
        each.type = kind
    return ir.Graph([], [rows, *presents], nodes=w.nodes, name=f"kernel_{number}")


def _rows(w: GraphBuilder, value: ir.Value | None, width: int) -> ir.Value:
    """(b, h, n, w) → (b, n, h w)."""
    assert value is not None
    return w.op("Reshape", w.transposed(value, (0, 2, 1, 3)), w.ints(0, 0, width))


def _as_found(w: GraphBuilder, attention: CachedAttention, sizes: _Sizes, number: int) -> ir.Graph:
    """The branch of the nodes that were found, which read what counts of a buffer."""
    made: dict[ir.Value | None, ir.Value] = {}
    presents = []
    for join in (attention.key, attention.value):
        past, new = join.inputs
        kept = w.op("Slice", past, w.ints(0), sizes.past, w.ints(_TIME))
        rest = w.op("Slice", past, sizes.total, w.ints(_END), w.ints(_TIME))
        made[join.outputs[0]] = w.op("Concat", kept, new, axis=_TIME)
        presents.append(w.op("Concat", made[join.outputs[0]], rest, axis=_TIME))
    for node in attention.inner:
        copies = w.copy(node, [made.get(value, value) for value in node.inputs])
        made.update(zip(node.outputs, copies, strict=True))
    result = _rows(w, made[attention.result], attention.heads[0] * attention.width)
    return ir.Graph([], [result, *presents], nodes=w.nodes, name=f"nodes_{number}")
