"""Sizes are compared by `export/sizes`, which proves that they are equal, and nowhere as text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("export", "verify")
SIZES = ("shape", "size", "numel")


def _is_text_of_size(node: ast.expr) -> bool:
    """`str(x.shape[0])`, `str(size)`, `map(str, x.shape)`, `[str(size) for ...]`, `f"{size}"`."""
    if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
        return _is_text_of_size(node.elt)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("tuple", "list", "set") and node.args:
            return _is_text_of_size(node.args[0])
        if node.func.id == "map" and isinstance(node.args[0], ast.Name) and node.args[0].id == "str":
            return _names_size(node.args[1])
        return node.func.id == "str" and bool(node.args) and _names_size(node.args[0])
    return isinstance(node, ast.JoinedStr) and any(
        isinstance(part, ast.FormattedValue) and _names_size(part.value) for part in node.values
    )


def _names_size(node: ast.expr) -> bool:
    return any(word in ast.unparse(node) for word in SIZES)


def compared_as_text(text: str) -> Iterator[int]:
    """The lines in which the text of a size is compared, asked for its digits, or looked up."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare) and any(map(_is_text_of_size, (node.left, *node.comparators))):
            yield node.lineno
        if isinstance(node, ast.Attribute) and node.attr == "isdigit" and _is_text_of_size(node.value):
            yield node.lineno
        if isinstance(node, ast.Subscript) and _is_text_of_size(node.slice):
            yield node.lineno


def test_no_size_is_compared_as_text():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for line in compared_as_text(path.read_text())
    ]
    assert not found, "\n".join(
        ["compare it by same_size, same_shape, same_dim or fixed of export/sizes:", *found]
    )


@pytest.mark.parametrize(
    "code",
    [
        "str(x.shape[0]) == str(y.shape[0])",
        "str(size) != '1'",
        "count == str(shape_of(node)[0])",
        "str(size).isdigit()",
        "all(str(size).isdigit() for size in sizes)",
        "[str(size) for size in shape] == ['1', '2']",
        "tuple(map(str, x.shape)) == wanted",
        "str(size) in known",
        "known[str(size)]",
        "f'{size}' == other",
    ],
)
def test_a_comparison_as_text_is_seen(code):
    assert list(compared_as_text(code))


@pytest.mark.parametrize(
    "code",
    [
        "same_size(x.shape[0], y.shape[0])",
        "print(str(size))",
        "f'a size of {size}'",
        "str(node.target) == 'add'",
        "known[expression_of(size)]",
        "text.isdigit()",
        "len(x.shape) == 2",
    ],
)
def test_anything_else_is_not(code):
    assert not list(compared_as_text(code))
