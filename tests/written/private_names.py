"""`found_in`: where a file names what a library does not promise, or replaces what a library defines.

    import torch._dynamo                     from torch.utils import _pytree         torch.fx.proxy.TracerBase._filter
    program._graph_module_flat_inputs        getattr(module, "_orig_mod")            from unittest import mock
    torch.nn.Module.to = ...                 setattr(torch.nn.Module, "to", ...)     builtins.len = ...

Operators are no private names, whatever they are called: `torch.ops.aten._to_copy` has a schema.
"""

from __future__ import annotations

import ast
import sys
from collections import namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_PUBLIC = set(dir(namedtuple("Any", "")))  # `_replace`, `_fields`: documented, underscore and all
_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}
_OPERATORS = "torch.ops."


def is_private(name: str) -> bool:
    return (
        name.startswith("_") and name.strip("_") != "" and not (name.startswith("__") and name.endswith("__"))
    )


def own_names(tree: ast.AST) -> set[str]:
    """The private names that a file defines itself, as functions, classes, variables or attributes."""
    found = set(_PUBLIC)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and _root(node)[0] in ("self", "cls")
        ):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def found_in(files: Iterable[tuple[str, str]], apart: Iterable[str] = ()) -> list[str]:
    """What is private or replaced in a project, each with its place.

    Args:
        files: Names and texts of all its files.
        apart: Of these, the ones that may name what is private.
    """
    own: set[str] = set()
    found: list[tuple[str, str | None]] = []
    excepted = set(apart)
    for name, text in files:
        tree = ast.parse(text)  # one at a time: all of them are a million objects
        own |= own_names(tree)
        if name not in excepted:
            found += [(f"{name}:{what}", unless) for what, unless in _File(tree).findings()]
    return sorted({what for what, unless in found if unless is None or unless not in own})


@dataclass(repr=False)
class _File:
    tree: ast.AST
    known: dict[str, str] = field(default_factory=dict)  # name in the file → what it stands for, dotted
    nodes: list[ast.AST] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = list(ast.walk(self.tree))
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    self.known[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom):
                self.known |= {
                    alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
                }
        for node in self.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                full = self._full(node.value)
                if full is not None and _is_library(full):
                    self.known.setdefault(node.targets[0].id, full)

    def findings(self) -> Iterator[tuple[str, str | None]]:
        """What is found, and the name that may be the project's own, where that is not known here."""
        for node in self.nodes:
            for what, unless in self._of(node):
                yield f"{getattr(node, 'lineno', 0)}: {what}", unless

    def _of(self, node: ast.AST) -> Iterator[tuple[str, str | None]]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from self._of_import(node)
        elif isinstance(node, ast.Attribute):
            full = self._full(node)
            if not isinstance(node.ctx, ast.Load) and full is not None and _is_replaceable(full):
                yield f"replaces {full}", None
            elif is_private(node.attr) and full is None:
                yield f"private name {node.attr}", node.attr
            elif is_private(node.attr) and _is_library(full) and not full.startswith(_OPERATORS):
                yield f"private name {full}", None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
            yield from self._of_name(node, node.func.id)

    def _of_import(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str | None]]:
        start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in (start + alias.name for alias in node.names):
            if name.startswith("unittest."):
                yield f"patches with {name}", None
            if _is_library(name) and any(map(is_private, name.split("."))):
                yield f"private name {name}", None

    def _of_name(self, call: ast.Call, how: str) -> Iterator[tuple[str, str | None]]:
        full = self._full(call.args[0])
        if how in ("setattr", "delattr") and full is not None and _is_replaceable(full):
            yield f"replaces an attribute of {full}", None
        name = call.args[1]
        if isinstance(name, ast.Constant) and is_private(str(name.value)):
            yield f"private name {name.value}", str(name.value)

    def _full(self, node: ast.AST) -> str | None:
        name, parts = _root(node)
        return ".".join([self.known[name], *parts]) if name in self.known else None


def _root(node: ast.AST) -> tuple[str, list[str]]:
    """`a.b.c` → `a`, [`b`, `c`]; an empty name where it begins with anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else ""), parts


def _is_library(full: str) -> bool:
    """Whether a dotted name is neither Python's nor this project's."""
    first = full.partition(".")[0]
    return first not in sys.stdlib_module_names and first != "moe_export"


def _is_replaceable(full: str) -> bool:
    return _is_library(full) or full.startswith("builtins")
