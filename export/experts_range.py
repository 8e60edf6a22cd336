"""Whether a routing can name an expert that does not exist: -1 or E for a token that is dropped, or padding.

What chooses among E scores by `topk` or `argmax` cannot; other indices are looked at when the graph runs, and a pair
of no expert adds nothing, as in a loop over experts that none of them takes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from moe_export.export.choice import as_choice, is_part
from moe_export.export.experts_lower import Opaque
from moe_export.export.experts_onnx import Writer

_aten = torch.ops.aten
_CARRIERS = {
    _aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.default,
    _aten.flatten.using_ints, _aten._to_copy.default, _aten.to.dtype, _aten.clone.default, _aten.expand.default,
    _aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.contiguous.default, _aten.detach.default,
    _aten.alias.default, _aten.slice.Tensor, _aten.select.int, _aten.cat.default, _aten.stack.default,
}  # fmt: skip


def is_within(indices: fx.Node, count: int) -> bool:
    """Whether every index is known to be one of 0 to `count` - 1."""
    stack, seen = [indices], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        operator = node.args[0] if is_part(node) else node
        choice = as_choice(operator) if isinstance(operator, fx.Node) else None
        if choice is not None and choice.indices is node:
            if choice.experts > count:
                return False
        elif node.target in _CARRIERS:
            stack += node.all_input_nodes
        else:
            return False
    return True


def guarded(w: Writer, block: Opaque) -> Opaque:
    """The block with indices that are all in range, and a mark for the pairs that count."""
    indices = block.indices
    zero, count = (w.op("CastLike", w.scalar(number), indices) for number in (0, block.count))
    valid = w.op("And", w.op("GreaterOrEqual", indices, zero), w.op("Less", indices, count), name="valid")
    safe = w.op("Where", valid, indices, zero)
    safe.shape, safe.type = indices.shape, indices.type
    return dataclasses.replace(block, indices=safe, valid=valid)
