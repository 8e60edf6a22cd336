"""Count the operators, elements and multiplications of one run of a PyTorch model: the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moe_export.verify.inputs.cases import Case
from moe_export.verify.inputs.price import Price, Work, counted_price
from moe_export.verify.specs import Array, DimRange
from moe_export.verify.torch_compat import OperatorMode, leaves

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "convolution"}
_MOST_COUNTED = (
    200_000  # operators; a model that has more at its example's sizes is not run again to be counted
)
Run = Callable[[Mapping[str, Array]], Any]


class WorkCounter(OperatorMode):
    """Adds up the work of everything that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.elements = self.products = self.largest = 0

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        made = result.numel() if isinstance(result, torch.Tensor) else _elements(result)
        self.operators += 1
        self.elements += made
        self.largest = max(self.largest, made)
        name = func.__name__.partition(".")[0]
        if "scaled_dot_product" in name:
            self._add_scores(*args[:3])
        if name in _PRODUCTS:
            self.products += made * _contracted(name, args)
        return result

    def _add_scores(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Queries times keys, which a kernel of PyTorch keeps to itself, and another engine may have as a tensor."""
        scores = queries.numel() // queries.shape[-1] * keys.shape[-2] if queries.numel() else 0
        self.elements += scores
        self.largest = max(self.largest, scores)
        self.products += scores * (keys.shape[-1] + values.shape[-1])

    @property
    def work(self) -> Work:
        """The sum."""
        return Work(self.operators, self.elements, self.products, self.largest)


def _elements(result: Any) -> int:
    return sum(leaf.numel() for leaf in leaves(result) if isinstance(leaf, torch.Tensor))


def _contracted(name: str, args: Sequence[Any]) -> int:
    """How many multiplications make one element."""
    if name == "convolution":
        return math.prod(args[1].shape[1:])
    place = 1 if name in {"addmm", "baddbmm"} else 0
    return int(args[place].shape[-1]) if len(args) > place else 1


def count(run: Run, case: Case) -> Work | None:
    """The work of one run; None if the model rejects the case."""
    counter = WorkCounter()
    with counter:
        try:
            run(case.inputs)
        except Exception:  # whatever a model raises; it is recorded where the case is compared
            return None
    return counter.work


def price_of(run: Run, dims: Sequence[DimRange], case_at: Callable[[dict[str, int]], Case]) -> Price | None:
    """The price of a model's cases; None if its example does not run.

    Args:
        run: Runs it.
        dims: Its free dimensions.
        case_at: Makes a case of given sizes.
    """
    traced = {dim.name: dim.traced for dim in dims}
    base = count(run, case_at(traced))
    if base is None:
        return None
    counts: dict[str, list[tuple[int, Work]]] = {}
    for dim in dims if base.operators < _MOST_COUNTED else ():
        found = ((size, count(run, case_at(traced | {dim.name: size}))) for size in _sizes(dim))
        counts[dim.name] = [(size, work) for size, work in found if work is not None]
    return counted_price(base, traced, counts)


def _sizes(dim: DimRange) -> list[int]:
    """Two further sizes: larger if they are cheap, else smaller."""
    near = (2 * dim.traced, 3 * dim.traced) if dim.traced <= 32 else (dim.traced // 2, dim.traced // 4)
    return [size for size in dict.fromkeys(map(dim.clamp, near)) if size != dim.traced]
