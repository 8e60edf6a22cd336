"""`OperatorMode` sees every operator that runs, whoever calls it.

Why: `torch.overrides.TorchFunctionMode`, which is public, sees the functions that Python calls, not the operators that
these are made of. PyTorch's own page on extending it names `torch.utils._python_dispatch.TorchDispatchMode` for that,
and gives no other name. It is the one private name that this room needs; it imports no other room, so it has it here.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """While it is entered, `__torch_dispatch__(func, types, args, kwargs)` is called in the place of each operator."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


def leaves(value: Any) -> Iterator[Any]:
    """What an operator takes or gives, one by one: operators nest in tuples, lists and dicts only."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    else:
        yield value
