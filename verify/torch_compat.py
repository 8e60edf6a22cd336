"""`OperatorMode` sees every operator that runs, whoever calls it.

Why: `torch.overrides.TorchFunctionMode`, which is public, sees the functions that Python calls, not the operators that
these are made of. PyTorch's own page on extending it names `torch.utils._python_dispatch.TorchDispatchMode` for that,
and gives no other name. It is the one private name that this room needs; it imports no other room, so it has it here.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """While it is entered, `ran` is called after each operator.

    A mode that runs something else in an operator's place has a `__torch_dispatch__(func, types, args, kwargs)` itself.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return self.ran(func, args, kwargs, func(*args, **kwargs))

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        """What the caller of an operator gets: here, its result."""
        return result


def leaves(value: Any) -> Iterator[Any]:
    """What an operator takes or gives, one by one: operators nest in tuples, lists and dicts only."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    else:
        yield value
