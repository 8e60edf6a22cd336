"""Sizes that may stay symbols: what holds of them, and what is answered where only the data knows.

- `require` notes a condition that the code itself does not ask for. Why: `torch._check` is what PyTorch's own pages on
  torch.export name for it, underscore and all.
- `undecided` answers a condition on numbers that only the data knows. Why: the tracer stops there and asks nobody.
  `answers_given` tells whether one was asked for meanwhile.
- `has_remainder` tells "can be divided by" from other conditions. Why: the classes of its symbolic expressions are
  private; by their names they would be told, too, but not whether one is inside another.
- `conditions_noted` tells a condition as soon as it is noted. Why: what a trace keeps with it names no line of a model.
- `fake_results_cached`. Why: the setting is documented as an environment variable only, which is read at import.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import sympy
import torch
import torch._dynamo.config as dynamo_config
from torch.fx.experimental import symbolic_shapes
from torch.utils._sympy.functions import Mod, PythonMod

_ANSWERED = [0]  # how many


def require(condition: bool | torch.SymBool) -> None:
    """Raise if a condition does not hold; a trace notes it instead."""
    torch._check(condition)  # type: ignore[no-untyped-call]


def has_remainder(expression: sympy.Basic) -> bool:
    """Whether the remainder of a division is in an expression of the tracer's."""
    return bool(expression.has(Mod, PythonMod))


def is_remainder(expression: sympy.Basic) -> bool:
    """Whether an expression of the tracer's is the remainder of one division."""
    return isinstance(expression, (Mod, PythonMod))


@contextmanager
def undecided(answer: Callable[[Any, Any], bool | None]) -> Iterator[None]:
    """While it runs, a condition that a trace cannot decide is answered.

    Args:
        answer: Is given the shape environment and the condition (sympy); None for "cannot be decided".
    """
    original = symbolic_shapes.ShapeEnv.evaluate_expr

    def evaluate(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, expression, *args, **kwargs)
        except symbolic_shapes.GuardOnDataDependentSymNode:
            _ANSWERED[0] += 1
            value = answer(self, expression)
            if value is None:
                raise
            return value

    with mock.patch.object(symbolic_shapes.ShapeEnv, "evaluate_expr", evaluate):
        yield


def answers_given() -> int:
    """How often a condition has been put to somebody so far, since the process began."""
    return _ANSWERED[0]


@contextmanager
def sizes_fixed(note: Callable[[int, int], None]) -> Iterator[None]:
    """While it runs, say where a trace takes a free size of an input for a number, as soon as it does.

    Args:
        note: Is given the number of the input and the axis, within the operator that was the reason.
    """
    original = symbolic_shapes.ShapeEnv._set_replacement

    def replace(self: Any, symbol: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        original(self, symbol, value, *args, **kwargs)
        if value.is_Integer:
            for source in self.var_to_sources.get(symbol, ()):
                number, axis = (
                    getattr(getattr(source, "base", None), "index", None),
                    getattr(source, "idx", None),
                )
                if isinstance(number, int) and isinstance(axis, int):
                    note(number, axis)

    with mock.patch.object(symbolic_shapes.ShapeEnv, "_set_replacement", replace):
        yield


@contextmanager
def conditions_noted(note: Callable[[sympy.Basic], None]) -> Iterator[None]:
    """While it runs, say which conditions a trace notes, within the operator or the line that is the reason."""
    original = symbolic_shapes.ShapeEnv._log_guard

    def log(self: Any, prefix: str, guard: Any, *args: Any, **kwargs: Any) -> None:
        original(self, prefix, guard, *args, **kwargs)
        note(guard)

    with mock.patch.object(symbolic_shapes.ShapeEnv, "_log_guard", log):
        yield


def fake_results_cached(cached: bool) -> AbstractContextManager[Any]:
    """Whether a trace remembers what an operator gives for tensors of a shape, while it runs."""
    setting: AbstractContextManager[Any] = dynamo_config.patch(fake_tensor_cache_enabled=cached)
    return setting
