"""Does an expert mix rows? What it gives for a token must not depend on the other tokens that it is run with.

Decided by running the body on five pairs together and one by one, in float64 whatever the model's type: in float16 the
two differ by the rounding of matrix products, which says nothing about the model and varies between processors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from moe_export.errors import RefusedError
from moe_export.export.experts.body import Experts
from moe_export.export.experts.notes import named
from moe_export.float64 import agree, doubled, wide_if_possible

_PAIRS = 5
_EXACT = 1e-9  # of the largest value: float64 rounds at 1e-16, and mixed rows differ by far more
_ROUNDED = 1e-4  # if an operator does not support float64


def check_rows(experts: Experts, values: Mapping[fx.Node, torch.Tensor]) -> None:
    """Make sure that each row of the body depends on its own pair only: together and one by one give the same.

    Args:
        experts: The block.
        values: The values of its indices, shared nodes and weights on the example inputs.

    Raises:
        RefusedError: The body mixes rows, or cannot be run on these pairs.
    """
    indices = values[experts.indices]
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, max(1, indices.shape[0]), (_PAIRS,), generator=generator)
    slot = torch.randint(0, experts.slots, (_PAIRS,), generator=generator)
    first = [
        values[weight.separate[0]] if weight.stack is None else values[weight.stack][0]
        for weight in experts.weights
    ]
    rest = [torch.zeros(1, dtype=torch.int64), *(values[node] for node in experts.shared), *first]

    def agrees_in(wide: bool) -> bool:
        body = copy.deepcopy(experts.body).double() if wide else experts.body
        given = list(map(doubled, rest)) if wide else rest
        return _agrees(body, token, slot, given, _EXACT if wide else _ROUNDED)

    try:
        agrees, _ = wide_if_possible(agrees_in)
    except Exception as error:
        raise RefusedError(f"the expert cannot be run on other rows: {error}") from error
    if not agrees:
        known: nn.Module = experts.body
        node = _first_mixing(known, token, slot, rest) if isinstance(known, fx.GraphModule) else None
        after = f", after {named(node)}" if node is not None else ""
        raise RefusedError(
            f"the expert mixes rows: what it gives for a token depends on the other tokens{after}"
        )


def _agrees(
    body: fx.GraphModule,
    token: torch.Tensor,
    slot: torch.Tensor,
    rest: Sequence[torch.Tensor],
    near: float,
) -> bool:
    together = body(token, slot, *rest)
    alone = torch.cat([body(token[row : row + 1], slot[row : row + 1], *rest) for row in range(_PAIRS)])
    return agree([alone], [together], near)


@torch.no_grad()
def _first_mixing(
    body: fx.GraphModule, token: torch.Tensor, slot: torch.Tensor, rest: Sequence[torch.Tensor]
) -> fx.Node | None:
    """The first value whose rows differ with the other rows, or that has no rows, and differs; None if not known."""
    try:
        return _mixing_value(body, token, slot, rest)
    except Exception:  # an operator takes float64 only, or only so many rows: the reason stands without it
        return None


def _mixing_value(
    body: fx.GraphModule, token: torch.Tensor, slot: torch.Tensor, rest: Sequence[torch.Tensor]
) -> fx.Node | None:
    def values(token: torch.Tensor, slot: torch.Tensor) -> Mapping[fx.Node, object]:
        interpreter = fx.Interpreter(body, garbage_collect_values=False)
        interpreter.run(token, slot, *rest)
        return interpreter.env

    together = values(token, slot)
    alone = [values(token[row : row + 1], slot[row : row + 1]) for row in range(_PAIRS)]
    for node, value in together.items():
        parts = [each[node] for each in alone]
        tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.dim()]
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or len(tensors) < _PAIRS:
            continue
        rows = len(value) == _PAIRS and all(len(part) == 1 for part in tensors)
        whole = all(part.shape == value.shape for part in tensors)
        same = [torch.cat(tensors)] if rows else tensors
        if (rows or whole) and not agree(same, [value] * len(same), _ROUNDED):
            return node
    return None
