"""Optimisation profiles: from ranges of named dimensions to a least, best and greatest shape of every input.

An engine with dynamic shapes takes the shapes of its profiles only, and is fastest at the best one. A range belongs
to a dimension's name (`sequence`), so that inputs which share it agree; `2*sequence + 1` follows from `sequence`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from moe_export.domain import Condition, Domain
from moe_export.errors import UsageError

DIM_PREFIX = "moe_export.dim."
_BATCH, _OTHER = (1, 1, 8), (1, 128, 1024)
_NAME = re.compile(r"[A-Za-z_]\w*")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min, "Max": max, "Min": min, "floor": int}


@dataclass(frozen=True)
class Range:
    """Sizes of a dimension, or values that decide one: the least, the one to be fast at, and the greatest.

    Raises:
        UsageError: They are not in order.
    """

    minimum: int
    best: int
    maximum: int

    def __post_init__(self) -> None:
        if not self.minimum <= self.best <= self.maximum:
            raise UsageError(
                f"range {self}: not min <= opt <= max", hint="for example: --range sequence=1:512:4096"
            )

    def __str__(self) -> str:
        return f"{self.minimum}:{self.best}:{self.maximum}"


@dataclass(frozen=True)
class FreeDim:
    """A dimension of a graph that the caller chooses.

    Attributes:
        name: Its name in the graph; `<input>_dim<axis>` where it has none.
        minimum, maximum: What the graph's metadata says it is right for; 1 and None where it says nothing.
        used: The inputs and axes that have it, `x:1`.
        stated: Whether the metadata says something. Otherwise a size may be 0, as a cache's, if that is asked for.
    """

    name: str
    minimum: int
    maximum: int | None
    used: tuple[str, ...]
    stated: bool = True


Ranges = Mapping[str, "Range | tuple[int, int, int]"]
Shape = tuple["int | str", ...]


def parse_range(text: str) -> tuple[str, Range]:
    """`sequence=1:512:4096`, or `sequence=512` for one size.

    Raises:
        UsageError: It is not of that form, or the sizes are not in order.
    """
    name, equals, sizes = text.partition("=")
    parts = sizes.split(":")
    if (
        not equals
        or len(parts) not in {1, 3}
        or not all(re.fullmatch(r"\s*-?\d+\s*", part) for part in parts)
    ):
        raise UsageError(
            f"--range {text!r} is not NAME=MIN:OPT:MAX", hint="for example: --range sequence=1:512:4096"
        )
    numbers = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
    try:
        return name.strip(), Range(*numbers)
    except UsageError as error:
        raise UsageError(f"--range {text!r}: the sizes are not in order", hint=error.hint) from error


def input_shapes(model: ir.Model) -> dict[str, Shape]:
    """The shape of every input: a size, a name, or an expression of names on each axis."""
    shapes: dict[str, Shape] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name in model.graph.initializers:
            continue
        shapes[name] = tuple(
            dim if isinstance(dim, int) else dim.value or f"{name}_dim{axis}"
            for axis, dim in enumerate(value.shape or ())
        )
    return shapes


def free_dims(model: ir.Model) -> tuple[FreeDim, ...]:
    """The dimensions of a graph's inputs that are not numbers, with what the graph's metadata says of them."""
    shapes = input_shapes(model)
    plain = {
        size for shape in shapes.values() for size in shape if isinstance(size, str) and _NAME.fullmatch(size)
    }
    used: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            for dim in _names_in(size, plain):
                used.setdefault(dim, []).append(f"{name}:{axis}")
    found = []
    for name, places in used.items():
        text = model.metadata_props.get(DIM_PREFIX + name, "")
        minimum, maximum = parse_bounds(text)
        found.append(FreeDim(name, minimum, maximum, tuple(places), stated=bool(text)))
    return tuple(found)


def parse_bounds(text: str) -> tuple[int, int | None]:
    """`16:` or `16:4096`, as `dim_facts` writes them."""
    match = re.fullmatch(r"(\d+):(\d*)", text)
    if match is None:
        return 1, None
    return int(match[1]), int(match[2]) if match[2] else None


def dim_facts(dims: Sequence[Any], conditions: Sequence[Condition] = ()) -> dict[str, str]:
    """The sizes that a graph is right for, as its metadata has them: `dim.sequence` → `16:`, `domain` → `batch < 9`."""
    facts = {"domain": str(Domain(tuple(conditions)))} if conditions else {}
    return facts | {
        f"dim.{dim.name}": f"{dim.minimum}:{'' if dim.maximum is None else dim.maximum}" for dim in dims
    }


def complete_ranges(dims: Sequence[FreeDim], ranges: Ranges) -> dict[str, Range]:
    """A range for every free dimension: the one asked for, else a default within what the graph is right for.

    Defaults: `batch` 1:1:8, any other 1:128:1024.

    Raises:
        UsageError: There is no such dimension; or a range goes beyond what the graph says it is right for.
    """
    known = {dim.name for dim in dims}
    for name in ranges:
        if name not in known:
            there = ", ".join(f"{dim.name} ({', '.join(dim.used)})" for dim in dims)
            raise UsageError(
                f"no dynamic dimension {name!r}",
                hint=f"the graph's are: {there}" if there else "every size of the graph's inputs is fixed",
            )
    return {dim.name: _range_of(dim, ranges.get(dim.name)) for dim in dims}


def _range_of(dim: FreeDim, asked: Range | tuple[int, int, int] | None) -> Range:
    top = dim.maximum
    if asked is None:
        low, best, high = _BATCH if dim.name == "batch" else _OTHER
        high = max(high, dim.minimum) if top is None else max(min(high, top), dim.minimum)
        low = max(low, dim.minimum)
        return Range(low, min(max(best, low), high), high)
    found = asked if isinstance(asked, Range) else Range(*asked)
    if not dim.stated:
        if found.minimum < 0:
            raise UsageError(
                f"range {dim.name}={found}: a size is not negative", hint="--range sequence=1:512:4096"
            )
        return found
    if found.minimum < dim.minimum or (top is not None and found.maximum > top):
        limit = f"{dim.minimum} or more" if top is None else f"{dim.minimum} to {top}"
        raise UsageError(
            f"range {dim.name}={found}: the graph is right for {dim.name} = {limit}",
            hint="the graph's metadata says so: it was verified there, and the model takes no other size",
        )
    return found


def shapes_at(
    shapes: Mapping[str, Shape], ranges: Mapping[str, Range]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The least, best and greatest shape of every input."""
    corners = [
        {name: getattr(found, corner) for name, found in ranges.items()}
        for corner in ("minimum", "best", "maximum")
    ]
    return {
        name: tuple(tuple(_size(dim, sizes, name) for dim in shape) for sizes in corners)
        for name, shape in shapes.items()
    }


def _size(dim: int | str, sizes: Mapping[str, int], where: str) -> int:
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    return _evaluate(ast.parse(dim, mode="eval").body, sizes, dim, where)


def _evaluate(node: ast.expr, sizes: Mapping[str, int], text: str, where: str) -> int:
    def inner(part: ast.expr) -> int:
        return _evaluate(part, sizes, text, where)

    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -inner(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](inner(node.left), inner(node.right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*map(inner, node.args))
    raise UsageError(f"input {where}: the size {text!r} is no arithmetic of dimensions")


def _names_in(size: int | str, plain: set[str]) -> list[str]:
    """The dimensions that a size is made of; the size itself unless it is arithmetic of names that stand alone too.

    So `2*sequence` follows from `sequence`, and another exporter's `batch-size` is a name.
    """
    if isinstance(size, int):
        return []
    try:
        tree = ast.parse(size, mode="eval")
    except SyntaxError:
        return [size]
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions)
    names = list(dict.fromkeys(found))
    return names if set(names) <= plain else [size]
