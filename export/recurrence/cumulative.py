"""Cumulative operators step by step while loops are folded: `logcumsumexp` and `cumprod`.

minGRU and its like compute h(t) = a(t) h(t - 1) + b(t) by cumulative sums of logarithms. The exporter writes
`logcumsumexp(x)` as `log(cumsum(exp(x - max(x))))`, which is -inf in float32 wherever x is 88 below the maximum over
all time, and cannot write `cumprod`. As loops, both fold into a Scan that computes what PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_export.export.tracing.other_forms import InOtherForms


def cumulative_step_by_step() -> InOtherForms:
    """A context manager in which cumulative operators run as loops over their axis."""
    return InOtherForms(_FORMS)


def _cumulative(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def form(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
        if given.keys() != {"input", "dim"} or not given["input"].dim() or not isinstance(given["dim"], int):
            return NotImplemented
        values, axis = given["input"], given["dim"]
        state = values.select(axis, 0)
        states = [state]
        for place in range(1, values.shape[axis]):
            state = step(state, values.select(axis, place))
            states.append(state)
        return torch.stack(states, axis)

    return form


_FORMS: dict[Any, Callable[..., Any]] = {
    torch.logcumsumexp: _cumulative(torch.logaddexp),
    torch.Tensor.logcumsumexp: _cumulative(torch.logaddexp),
    torch.cumprod: _cumulative(torch.mul),
    torch.Tensor.cumprod: _cumulative(torch.mul),
}
