"""Values of the right shapes for a traced program whose weights are not in memory.

They answer what does not depend on the numbers: whether a computation runs, and which rows depend on which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_export.export.tracing.trace import Traced


def values_of_shapes(traced: Traced, nodes: tuple[fx.Node, ...]) -> list[torch.Tensor]:
    """For each node a value of its shape at the example sizes: the example itself, random floats, zero integers.

    A weight is random in its last axes and the same along its first, so that a stack of experts takes no more memory
    than one of them.
    """
    given = set(traced.program.graph_signature.user_inputs)
    inputs = [node for node in traced.program.graph.nodes if node.op == "placeholder" and node.name in given]
    examples = dict(zip(inputs, traced.example.values(), strict=True))
    generator = torch.Generator().manual_seed(0)
    return [examples[node] if node in examples else _value(node, generator) for node in nodes]


def _value(node: fx.Node, generator: torch.Generator) -> torch.Tensor:
    like = node.meta["val"]
    shape = [_size(size) for size in like.shape]
    if not like.dtype.is_floating_point:
        return torch.zeros(shape, dtype=like.dtype)
    if node.op == "placeholder" and len(shape) > 1:
        return _random(shape[1:], like.dtype, generator).expand(shape)
    return _random(shape, like.dtype, generator)


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _size(size: Any) -> int:
    """The size that an axis has in the example; 2, which is never broadcast, if the trace does not say."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return 2 if hint is None else int(hint)
