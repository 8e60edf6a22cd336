"""Pieces of syntax trees that converted code is made of (`branch_code`, `loop_code`)."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TypeVar

BOTH = "_moe_export_both_"  # a global name of each function while it is traced
OURS = "_moe_export_"
RESULT = "_moe_export_result_"

Block = list[ast.stmt]
_Node = TypeVar("_Node", bound=ast.AST)


def at(node: _Node, place: ast.expr) -> _Node:
    """A node with all of its parts that have no line at the place of another."""
    for each in ast.walk(node):
        if isinstance(each, (ast.expr, ast.stmt, ast.arg)) and not hasattr(each, "lineno"):
            ast.copy_location(each, place)
    return node


def call(name: str, *args: ast.expr) -> ast.Call:
    """A call of what stands for both sides."""
    return ast.Call(ast.Attribute(ast.Name(BOTH, ast.Load()), name, ast.Load()), list(args), [])


def of(name: str, attribute: str) -> ast.expr:
    """An attribute of a local name."""
    return ast.Attribute(ast.Name(name, ast.Load()), attribute, ast.Load())


def names_of(names: Sequence[str]) -> ast.expr:
    """A tuple of names, as texts."""
    return ast.Tuple([ast.Constant(name) for name in names], ast.Load())


def local_names() -> ast.expr:
    """`locals()`."""
    return ast.Call(ast.Name("locals", ast.Load()), [], [])


def given(names: Sequence[str], values: ast.expr, holder: str) -> Block:
    """Let names be values; those that have none are unbound, as `holder` says."""
    targets = ast.Tuple([ast.Name(each, ast.Store()) for each in names], ast.Store())
    made: Block = [ast.Assign([targets], values)]
    for each in names:
        unbound = ast.Call(of(holder, "is_unbound"), [ast.Name(each, ast.Load())], [])
        made.append(ast.If(unbound, [ast.Delete([ast.Name(each, ast.Del())])], []))
    return made


def waiting(node: ast.expr) -> ast.Lambda:
    """An expression that is computed when it is called."""
    return ast.Lambda(ast.arguments([], [], None, [], [], None, []), node)


def can_wait(node: ast.AST) -> bool:
    """Whether code means the same in a function of its own."""
    return not any(
        isinstance(each, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom))
        or (isinstance(each, ast.Name) and each.id in ("super", "__class__", "locals"))
        for each in ast.walk(node)
    )


def assigned(block: Sequence[ast.stmt]) -> set[str]:
    """The local names that statements give values to."""
    found: set[str] = set()
    waiting_for: list[ast.AST] = list(block)
    while waiting_for:
        node = waiting_for.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and _is_kept(node.id):
            found.add(node.id)
        inner = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.FunctionDef)
        if not isinstance(node, inner):
            waiting_for += ast.iter_child_nodes(node)
    return found


def _is_kept(name: str) -> bool:
    return name == RESULT or not name.startswith(OURS)
