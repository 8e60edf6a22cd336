"""Libraries that compile a program for the shapes of a call, traced with symbols in place of the sizes.

einx solves an equation such as `b h (n k) d` for the integers of a call, and writes a Python function for them, which
it then calls. So the trace would hold for these sizes alone. While a model is traced, such a library reads a large
prime for each symbol, and where its function hands PyTorch a number made of these primes, PyTorch gets the symbols:

    x (s0, s1, 16)   the library reads   (1300021, 1300037, 16)
                     and calls           torch.reshape(x, (1300021 * 1300037, 16))
                     PyTorch gets        torch.reshape(x, (s0 * s1, 16))

What the library computes is thereby what it computes at any size of more than a few. A number that is no product of
the primes, such as a sum of two sizes, is handed on as it is, and fails there like any wrong size; the dimensions are
then fixed by one of the next attempts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import sympy
import torch
from torch.overrides import TorchFunctionMode

_COMPILERS = ("einx",)
_BETWEEN = ("torch", "moe_export")  # the tracer has a mode of its own, through which calls come
_FIRST = 1_300_000
"""The primes are greater: no width is, and three of them are still an integer of 64 bits when multiplied."""


class _Primes(TorchFunctionMode):
    """Tells compilers primes for sizes, and PyTorch sizes for primes."""

    def __init__(self) -> None:
        super().__init__()
        self._symbols: dict[int, torch.SymInt] = {}  # by prime
        self._primes: dict[sympy.Expr, int] = {}  # by what a symbol stands for

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == _SHAPE:
            shape = func(*args, **kwargs)
            return self._as_primes(shape) if _asked_by_compiler(inspect.currentframe()) else shape
        if self._symbols:
            args = self._with_sizes(args)
            kwargs = {name: self._with_sizes(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _as_primes(self, shape: Sequence[Any]) -> tuple[int, ...]:
        return tuple(self._stand_in(size) if isinstance(size, torch.SymInt) else size for size in shape)

    def _stand_in(self, size: torch.SymInt) -> int:
        """The number for a size: its own prime, or the product of those of its factors if all have one."""
        whole = size.node.expr
        number = 1
        for factor, power in whole.as_powers_dict().items():
            known = factor if factor.is_Integer else self._primes.get(factor)
            if known is None or not power.is_Integer or power < 1:
                break
            number *= int(known) ** int(power)
        else:
            return number
        prime = int(sympy.nextprime(max(self._symbols, default=_FIRST)))
        self._primes[whole], self._symbols[prime] = prime, size
        return prime

    def _with_sizes(self, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and value > _FIRST:
            return self._size(value)
        if type(value) in (tuple, list):
            return type(value)(self._with_sizes(each) for each in value)
        if isinstance(value, torch.Size):
            return tuple(self._with_sizes(each) for each in value)
        if isinstance(value, slice):
            return slice(*(self._with_sizes(each) for each in (value.start, value.stop, value.step)))
        return value

    def _size(self, number: int) -> Any:
        result: Any = 1
        for prime, symbol in self._symbols.items():
            while number % prime == 0:
                number, result = number // prime, result * symbol
        return number * result


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


def _asked_by_compiler(frame: FrameType | None) -> bool:
    """Whether the code that reads a shape belongs to a library that compiles for shapes."""
    while frame is not None and _package(frame) in _BETWEEN:
        frame = frame.f_back
    return frame is not None and _package(frame) in _COMPILERS


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


@contextmanager
def sizes_for_compilers() -> Iterator[None]:
    """While it runs, libraries that compile for shapes are traced with symbols."""
    if not any(name in sys.modules for name in _COMPILERS):
        yield
        return
    with _Primes():
        yield
