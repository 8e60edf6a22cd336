"""`AskedNumber`: a Python number that only the graph knows, `x.max().item()`, in code that goes on computing with it.

    if loss.item() > 0.5:               loss.double() > 0.5                         as exact as Python's
    y = x / x.norm().item()             x / x.norm().double().to(x.dtype)           as a number divides a tensor
    k = int(x.sum()); x[:k]             refused: a size

The tracer has symbols for such numbers, and stops where one is compared. A trace that stopped there is made again with
these instead; where code needs a true number, it stops once more, and the first reason is given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class NeedsNumberError(TypeError):
    """Code needs a number that only the graph knows: a size, or how many times it does something."""


class AskedNumber:
    """A number as a tensor () of float64 or int64; comparisons give tensors () of bool.

    Args:
        value: A tensor of one element.
    """

    def __init__(self, value: torch.Tensor) -> None:
        single = value.reshape(())
        self.value = single.to(torch.float64 if single.dtype.is_floating_point else torch.int64)

    @property
    def is_float(self) -> bool:
        """Whether Python would have a float."""
        return self.value.dtype is torch.float64

    def beside(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """As an operand next to a tensor, whose dtype a number does not change."""
        if tensor is None:
            return self.value
        if self.is_float and not (tensor.dtype.is_floating_point or tensor.is_complex()):
            return self.value.to(torch.get_default_dtype())
        return self.value if tensor.dtype is torch.bool else self.value.to(tensor.dtype)

    def as_float(self) -> AskedNumber:
        """`float(number)`."""
        return AskedNumber(self.value.to(torch.float64))

    def as_int(self) -> AskedNumber:
        """`int(number)`."""
        return AskedNumber(self.value.trunc().to(torch.int64)) if self.is_float else self

    def __bool__(self) -> bool:
        return bool(self.value != 0)

    def __neg__(self) -> AskedNumber:
        return AskedNumber(-self.value)

    def __abs__(self) -> AskedNumber:
        return AskedNumber(self.value.abs())

    def __index__(self) -> int:
        raise NeedsNumberError

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*without_numbers(args), **without_numbers(kwargs or {}))


_ASKED = ContextVar("asked numbers", default=False)


@contextmanager
def numbers_asked(asked: bool) -> Iterator[None]:
    """While it runs, `number_of` gives numbers, or none."""
    before = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(before)


def number_of(tensor: torch.Tensor) -> AskedNumber | None:
    """The number that a tensor of one element holds; None where the tracer's own symbols stand for such."""
    single = all(isinstance(size, int) and size == 1 for size in tensor.shape)
    plain = not (tensor.is_complex() or tensor.dtype is torch.bool)
    return AskedNumber(tensor) if _ASKED.get() and single and plain else None


def truth_of(value: torch.Tensor | AskedNumber) -> torch.Tensor:
    """The truth of a tensor of one element or of a number, as a tensor () of bool.

    A copy, since the model may write into its own.
    """
    single = value.value if isinstance(value, AskedNumber) else value.reshape(())
    return single.clone() if single.dtype is torch.bool else single != 0


def without_numbers(arguments: Any) -> Any:
    """Arguments of a function of PyTorch with tensors in the place of such numbers."""
    values = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
    if not any(isinstance(value, AskedNumber) for value in values):
        return arguments
    first = next((value for value in values if isinstance(value, torch.Tensor)), None)
    found = [value.beside(first) if isinstance(value, AskedNumber) else value for value in values]
    return dict(zip(arguments, found, strict=True)) if isinstance(arguments, dict) else tuple(found)


def call_with(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Call a function of PyTorch, some of whose arguments may be such numbers."""
    if function is torch.Tensor.__getitem__:
        return element(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
    return function(*without_numbers(args), **without_numbers(kwargs or {}))


def element(tensor: torch.Tensor, index: tuple[Any, ...]) -> torch.Tensor:
    """`tensor[index]`; where a number stands, the axis is looked up in and goes."""
    places = [place for place, each in enumerate(index) if isinstance(each, AskedNumber)]
    if not places:
        return torch.Tensor.__getitem__(tensor, index[0] if len(index) == 1 else index)
    others = [slice(None) if place in places else each for place, each in enumerate(index)]
    if any(isinstance(each, torch.Tensor | list) for each in others):
        raise NeedsNumberError
    found = tensor[tuple(others)]
    for place in reversed(places):
        if any(each is Ellipsis for each in index[:place]):
            axis = found.dim() - sum(not isinstance(each, int) for each in others[place:])
        else:
            axis = sum(not isinstance(each, int) for each in others[:place])
        number = index[place].value.reshape(1)
        number = torch.where(number < 0, number + found.shape[axis], number)
        found = found.index_select(axis, number).squeeze(axis)
        others[place] = 0
    return found


def _operands(one: AskedNumber, other: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two numbers as tensors of one type; None if the other is no number."""
    if isinstance(other, AskedNumber):
        right = other.value
    elif isinstance(other, (int, float)):
        # As a constant: an exporter writes the number that `full` is given in float32.
        right = torch.tensor(other, dtype=torch.float64 if isinstance(other, float) else torch.int64)
    else:
        return None
    if one.value.dtype is right.dtype:
        return one.value, right
    return one.value.to(torch.float64), right.to(torch.float64)


def _compared(compare: Callable[[Any, Any], Any]) -> Callable[[AskedNumber, Any], Any]:
    def method(self: AskedNumber, other: Any) -> Any:
        pair = _operands(self, other)
        return NotImplemented if pair is None else compare(*pair)

    return method


def _computed(
    compute: Callable[[Any, Any], Any], *, turned: bool = False, floats: bool = False
) -> Callable[[AskedNumber, Any], Any]:
    def method(self: AskedNumber, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            mine = self.beside(other)
            return compute(other, mine) if turned else compute(mine, other)
        pair = _operands(self, other)
        if pair is None:
            return NotImplemented
        one, two = (each.to(torch.float64) if floats else each for each in pair)
        return AskedNumber(compute(two, one) if turned else compute(one, two))

    return method


_COMPARISONS = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
}  # fmt: skip
for _name, _function in _COMPARISONS.items():
    setattr(AskedNumber, f"__{_name}__", _compared(_function))
for _name, _function, _floats in (
    ("add", operator.add, False),
    ("sub", operator.sub, False),
    ("mul", operator.mul, False),
    ("truediv", operator.truediv, True),
):
    setattr(AskedNumber, f"__{_name}__", _computed(_function, floats=_floats))
    setattr(AskedNumber, f"__r{_name}__", _computed(_function, turned=True, floats=_floats))
