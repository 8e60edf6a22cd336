"""`OperatorMode` sees every operator that runs, whoever calls it; `no_modes` runs something unseen.

Why: `torch.overrides.TorchFunctionMode`, which is public, sees the functions that Python calls, not the operators that
these are made of. PyTorch's own page on extending it names `torch.utils._python_dispatch.TorchDispatchMode` for that,
and gives no other name. That a mode can be left while others run it does not say at all.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


class OperatorMode(TorchDispatchMode):
    """While it is entered, `__torch_dispatch__(func, types, args, kwargs)` is called in the place of each operator."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


def no_modes() -> AbstractContextManager[Any]:
    """Inside, operators run as they do outside all modes: a trace that is under way does not see them."""
    left: AbstractContextManager[Any] = _disable_current_modes()
    return left
