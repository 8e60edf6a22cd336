"""Cumulative operators step by step while loops are folded: `logcumsumexp` and `cumprod`.

minGRU and its like compute h(t) = a(t) h(t - 1) + b(t) by cumulative sums of logarithms. The exporter writes
`logcumsumexp(x)` as `log(cumsum(exp(x - max(x))))`, which is -inf wherever x is 88 below the maximum over all time, and
has no form of `cumprod`. As loops both fold into a Scan that computes what PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def cumulative_step_by_step() -> Iterator[None]:
    """While it runs, cumulative operators run as loops over their axis."""
    with _StepByStep():
        yield


class _StepByStep(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        step = _STEPS.get(func)
        if step is not None:
            given = dict(zip(("input", "dim"), args, strict=False)) | (kwargs or {})
            if given.keys() == {"input", "dim"} and given["input"].dim() and isinstance(given["dim"], int):
                return _cumulative(step, given["input"], given["dim"])
        return func(*args, **(kwargs or {}))


def _cumulative(step: Callable[[Tensor, Tensor], Tensor], values: Tensor, axis: int) -> Tensor:
    state = values.select(axis, 0)
    states = [state]
    for place in range(1, values.shape[axis]):
        state = step(state, values.select(axis, place))
        states.append(state)
    return torch.stack(states, axis)


_STEPS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    torch.logcumsumexp: torch.logaddexp,
    torch.Tensor.logcumsumexp: torch.logaddexp,
    torch.cumprod: torch.mul,
    torch.Tensor.cumprod: torch.mul,
}
