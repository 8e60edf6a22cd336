"""Checks of values that only end a model, taken as passed while it is traced.

    assert torch.isfinite(logits).all(), "logits hold NaN"        nothing is left of it
    if not mask.any(dim=-1).all(): raise ValueError(...)          nothing
    if x.min() < 0: x = x - x.min()                               no check: it computes something

Where a check fails, the model ends and has no result that a graph could differ from. The graph goes on there, so the
report names each check.
"""

from __future__ import annotations

import ast
import linecache
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moe_export.export.torch_compat.proxies import node_of
from moe_export.export.tracing.not_hit import asking_frame


class _Passing(TorchFunctionMode):
    """Answers what checks ask of tensors whose values a trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[str] = []  # file:line of each check, in order

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__bool__ and node_of(args[0]) is not None:
            frame = asking_frame()
            answer = _answer(frame) if frame is not None else None
            if frame is not None and answer is not None:
                place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                if place not in self.passed:
                    self.passed.append(place)
                return answer
        return func(*args, **(kwargs or {}))


@contextmanager
def checks_passed() -> Iterator[list[str]]:
    """While it runs, checks pass.

    Yields:
        Where the checks are that were asked for.
    """
    with _Passing() as checks:
        yield checks.passed


def _answer(frame: FrameType) -> bool | None:
    """What lets the check on the line that runs pass; None if there is none, or if it is put together of more."""
    for statement in _checks(frame.f_code.co_filename):
        if statement.test.lineno <= frame.f_lineno <= (statement.test.end_lineno or 0):
            test, wanted = statement.test, isinstance(statement, ast.Assert)
            while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
                test, wanted = test.operand, not wanted
            mixed = any(isinstance(each, (ast.BoolOp, ast.Not, ast.IfExp)) for each in ast.walk(test))
            return None if mixed else wanted
    return None


@cache
def _checks(path: str) -> tuple[ast.Assert | ast.If, ...]:
    """The statements of a file that do nothing but end the model: `assert`, `if` with nothing but `raise`.

    An error that the file may catch again does not end the model.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return ()
    caught = {id(node) for each in ast.walk(tree) if isinstance(each, ast.Try) for node in ast.walk(each)}
    found = [
        node for node in ast.walk(tree) if isinstance(node, (ast.Assert, ast.If)) and id(node) not in caught
    ]
    return tuple(node for node in found if isinstance(node, ast.Assert) or _only_raises(node))


def _only_raises(node: ast.If) -> bool:
    return not node.orelse and len(node.body) == 1 and isinstance(node.body[0], ast.Raise)
