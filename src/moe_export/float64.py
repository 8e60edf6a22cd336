"""A PyTorch model run in float64: what its code casts to a narrower float is float64, too.

In float32 a thousand steps add up a thousand roundings, and whether two orders of a sum agree depends on the machine.
In float64 what differs is another formula.

A copy of a large model in float64 would be twice as large as the model. So its weights are not copied: each is widened
where an operator takes it, and only while it does.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
_Found = TypeVar("_Found")
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


_COPIED = 2**28
"""Bytes of weights up to which a model is copied to float64; a copy is faster to run, and runs code of any kind."""
_SMALL = 2**16  # bytes of a weight that is copied anyway

_shared: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
"""Weights that are widened where they are taken, by their ids."""
_UNREAD = {"size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "is_complex", "__len__"}
"""Methods that ask nothing of a tensor's values."""
_PROPERTIES = {"T", "mT", "H", "mH", "data", "real"}
"""Properties that are tensors with its values."""


def _grouped_mm(
    rows: torch.Tensor, stack: torch.Tensor, offs: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """`grouped_mm`, which has no kernel for float64: each group of rows (S, a) by its own matrix of (E, a, b)."""
    if offs is None or rows.dim() != 2 or stack.dim() != 3:
        raise NotImplementedError("grouped_mm in float64 takes rows and stacked matrices")
    ends = offs.tolist()
    groups = zip([0, *ends], ends, stack, strict=False)
    found = torch.cat([rows[start:end] @ matrix for start, end, matrix in groups])
    rest = rows.new_zeros(len(rows) - len(found), stack.shape[-1])
    return torch.cat([found, rest])


class _Wide(TorchFunctionMode):
    """Where the model's code names a narrower float, float64 is meant."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            func = torch.Tensor.double
        elif (
            getattr(func, "__name__", "").lstrip("_") == "grouped_mm"
        ):  # PyTorch's, and the one that this calls
            func = _grouped_mm
        if any(map(_is_shared, args)):
            name = getattr(func, "__name__", "")
            if name == "__get__":  # of a property
                name = getattr(getattr(func, "__self__", None), "__name__", "")
                if name == "dtype":
                    return torch.float64
                if name not in _PROPERTIES:
                    return func(*args)
            if name in _UNREAD:
                return func(*args, **(kwargs or {}))
            if name == "__getitem__" and not _is_shared(args[1]):
                return doubled(func(*args))
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if _is_shared(value):
        return doubled(value)
    if isinstance(value, (list, tuple)) and any(map(_is_shared, value)):
        return type(value)(map(_widened, value))
    return value


def _is_shared(value: Any) -> bool:
    return bool(_shared) and isinstance(value, torch.Tensor) and _shared.get(id(value)) is value


@contextmanager
def in_float64() -> Iterator[None]:
    """Floats that are made here, or cast to a narrower float, are float64. Weights are the caller's to cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def doubled(value: torch.Tensor) -> torch.Tensor:
    """A tensor of floats in float64, of complex numbers in complex128; any other as it is."""
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def wide_if_possible(run: Callable[[bool], _Found]) -> tuple[_Found, bool]:
    """What a computation gives in float64; in the types that it has where an operator does not support float64.

    Args:
        run: The computation. Its argument says whether values are to be `doubled`.

    Returns:
        What it gives, and whether that is in float64.

    Raises:
        Exception: What the computation raises in the types that it has.
    """
    with torch.no_grad():
        try:
            with in_float64():
                return run(True), True
        except Exception:
            return run(False), False


def double_module(module: nn.Module) -> nn.Module:
    """A copy of a module in float64, to be run inside `in_float64`: it shares the weights of a large one.

    `module.double()` leaves complex weights in complex64, and tensors that are neither weights nor buffers as they are:
    a matrix or a table in an attribute, or in a list or a dictionary there.
    """
    weights = [*module.parameters(), *module.buffers()]
    large = {
        id(weight): weight for weight in weights if weight.nbytes > _SMALL and weight.is_floating_point()
    }
    if sum(weight.nbytes for weight in weights) <= _COPIED:
        large = {}
    wide = copy.deepcopy(module, dict(large))
    if large:
        _shared.update(large)
    else:
        wide = wide.double()
    for part in wide.modules():
        own = itertools.chain(part.parameters(recurse=False), part.buffers(recurse=False))
        for weight in own:
            if id(weight) not in large:
                weight.data = doubled(weight.data)
        for name, value in vars(part).items():
            if not name.startswith("_"):
                part.__dict__[name] = _doubled_within(value)
    ours = zip(_weights_of(module), _weights_of(wide), strict=True)
    carry_attributes([(old, new) for old, new in ours if old is not new])
    return wide


def carry_attributes(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set on new tensors what Python code set on old ones: copies of weights have none of it.

    Args:
        pairs: Old and new; an attribute that is an old one of another pair becomes the new one.
    """
    instead = {id(old): new for old, new in pairs}
    for old, new in pairs:
        for name, value in vars(old).items():
            if name not in vars(new):
                setattr(new, name, instead.get(id(value), value))


def _weights_of(module: nn.Module) -> list[torch.Tensor]:
    """Every weight and buffer, once for each place where it stands: a copy may hold two of what was shared."""
    named = (module.named_parameters, module.named_buffers)
    return [weight for each in named for _, weight in each(remove_duplicate=False)]


def _doubled_within(value: Any) -> Any:
    """A value whose tensors are doubled; a list or a dictionary stays the one that other modules may hold, too."""
    if isinstance(value, torch.Tensor):
        return doubled(value)
    if type(value) is list:
        value[:] = [_doubled_within(one) if isinstance(one, torch.Tensor) else one for one in value]
    if type(value) is dict:
        value.update({key: doubled(one) for key, one in value.items() if isinstance(one, torch.Tensor)})
    if type(value) is tuple and any(isinstance(one, torch.Tensor) for one in value):
        return tuple(map(_doubled_within, value))
    return value


def agree(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], near: float) -> bool:
    """Whether tensors are the same, floats up to a share of the largest of them."""
    return len(wanted) == len(found) and all(_close(a, b, near) for a, b in zip(wanted, found, strict=True))


def _close(wanted: torch.Tensor, found: torch.Tensor, near: float) -> bool:
    if wanted.shape != found.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    wanted, found = wanted.double(), found.double()
    known = wanted[wanted.isfinite()].abs()
    scale = float(known.max()) if known.numel() else 0.0
    return torch.allclose(wanted, found, rtol=near, atol=near * scale, equal_nan=True)
