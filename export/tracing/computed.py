"""`computed_in`: the integers that a function computes of constants, and of what its modules hold.

    t >= 17 * self.n        2 * self.window + 1        self.cfg.block ** 2        self.limits["long"] - 1

They are worked out from the function's source and its arguments. Nothing of the model is run: attributes are read as
they are stored, and what comes from a tensor, a loop or another function is left out.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import nn

from moe_export.domain import ARITHMETIC

_DEEP = 8  # names that stand for one another; more is a circle
_LARGE = 2**32  # no size, nor what one is computed of
_KINDS = (int, float, str, list, tuple, dict)
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    **{("", function.__name__): function for function in (min, max, int, float, round, abs, len)},
    **{("math", function.__name__): function for function in (math.ceil, math.floor, math.sqrt, math.log2)},
}
_FAILURES = (LookupError, ArithmeticError, TypeError, ValueError, AttributeError)


def computed_in(code: CodeType, arguments: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[int]:
    """The integers that a function computes.

    Args:
        code: The function.
        arguments: Its arguments and free variables, as it is called.
        names: Its global names.
    """
    function = _function(code)
    if function is not None:
        known = _Known(function, arguments, names)
        waiting: list[ast.AST] = list(function.body)
        while waiting:
            node = waiting.pop(0)
            found: Any = None
            if isinstance(node, (ast.BinOp, ast.Call, ast.Subscript, ast.Attribute)):
                with suppress(*_FAILURES):
                    found = known.value(node)
            if type(found) is int:
                yield found
            else:
                waiting += ast.iter_child_nodes(node)


@dataclass(frozen=True)
class _Function:
    """A function's statements, and the expressions of the names that it assigns once."""

    body: tuple[ast.stmt, ...]
    once: Mapping[str, ast.expr]
    stored: frozenset[str]


@cache
def _function(code: CodeType) -> _Function | None:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, SyntaxError, ValueError):
        return None  # no file, a lambda, text that is indented otherwise
    if not isinstance(tree, ast.FunctionDef) or tree.name != code.co_name:
        return None
    stored = Counter(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    once = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and len(node.targets) == 1
    }
    return _Function(
        tuple(tree.body), {name: once[name] for name in once if stored[name] == 1}, frozenset(stored)
    )


class _Known:
    """What expressions of a function come to."""

    def __init__(self, function: _Function, arguments: Mapping[str, Any], names: Mapping[str, Any]) -> None:
        self._function, self._arguments, self._names = function, arguments, names

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of an expression.

        Raises:
            Exception: One of `_FAILURES`: it is not known.
        """
        match node:
            case ast.Constant(value=int() | float() | str() as value):
                return value
            case ast.Name(id=name):
                return self._named(name, depth)
            case ast.Attribute(value=owner, attr=name):
                return _stored(self.value(owner, depth), name)
            case ast.Subscript(value=owner, slice=key):
                return _entry(self.value(owner, depth), self.value(key, depth))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -_number(self.value(operand, depth))
            case ast.BinOp(op=op, left=left, right=right) if type(op) in ARITHMETIC:
                pair = [_number(self.value(part, depth)) for part in (left, right)]
                if isinstance(op, ast.Pow) and abs(pair[1]) > 32:
                    raise ValueError(pair)
                return _number(ARITHMETIC[type(op)](*pair))
            case ast.Call(func=function, args=arguments, keywords=[]):
                return self._called(function)(*(self.value(argument, depth) for argument in arguments))
        raise TypeError(node)

    def _named(self, name: str, depth: int) -> Any:
        if name in self._function.once and depth < _DEEP:
            return self.value(self._function.once[name], depth + 1)
        if name in self._function.stored:
            raise LookupError(name)  # it is something else from time to time
        return self._arguments[name] if name in self._arguments else self._names[name]

    def _called(self, function: ast.expr) -> Callable[..., Any]:
        match function:
            case ast.Name(id=name) if self._means(name, getattr(builtins, name, None)):
                return _CALLS["", name]
            case ast.Attribute(value=ast.Name(id="math"), attr=name) if self._names.get("math") is math:
                return _CALLS["math", name]
        raise TypeError(function)

    def _means(self, name: str, builtin: Any) -> bool:
        others = (self._arguments, self._names, self._function.stored)
        return ("", name) in _CALLS and builtin is not None and not any(name in each for each in others)


def _stored(owner: Any, name: str) -> Any:
    """An attribute that is stored as it is; what a property or a tensor would compute is not known."""
    if isinstance(owner, torch.Tensor):
        raise AttributeError(name)
    own = vars(owner)
    if isinstance(owner, nn.Module) and name in own["_modules"]:
        return own["_modules"][name]
    if name in own:
        return own[name]
    value = next((vars(base)[name] for base in type(owner).__mro__ if name in vars(base)), None)
    if not isinstance(value, _KINDS):
        raise AttributeError(name)
    return value


def _entry(owner: Any, key: Any) -> Any:
    if not isinstance(owner, (list, tuple, dict, nn.ModuleList)):
        raise TypeError(owner)
    return owner[key]


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or abs(value) > _LARGE:
        raise TypeError(value)
    return value
