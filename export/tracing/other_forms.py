"""Calls of PyTorch's functions, made in another form while a model is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


class InOtherForms(TorchFunctionMode):
    """While it is entered, every call of a function in a table, from wherever, is made in its other form.

    Args:
        forms: By function: what is called with its arguments instead. It returns `NotImplemented` for arguments that it
            has no form for; the call is then made as it was written.
    """

    def __init__(self, forms: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        form = self._forms.get(func)
        result = NotImplemented if form is None else form(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result
