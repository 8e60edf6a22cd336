"""What a traced node reads: a path of views applied to a base value, as plain data.

Views by constant indices (`select`, `slice`, an element of a tuple) are not nodes of their own here, but steps of a
path. So `x[:, 3, 0]` reads the base `x` by `select(1, 3)`, `select(1, 0)`, and the iterations of a loop differ in one
number only.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_export.export.sizes import expression_of, fixed

aten = torch.ops.aten

SELECT, SLICE, PART = "select", "slice", "part"
SIZE = "size of inputs"  # in the metadata of a node that is a sum or product of sizes of inputs, or a float of such


@dataclass(frozen=True)
class View:
    """One step of a path.

    Attributes:
        kind: `select` (axis, index), `slice` (axis, start, end, step) or `part` of a tuple (index).
        numbers: Integers or nodes; negative indices and open ends are resolved where the size is known.
        size: The size of the axis before the step; None if it is symbolic or there is no axis.
        written: The numbers as the model has them (`-1`, an open end), which may hold for other sizes too.
    """

    kind: str
    numbers: tuple[Any, ...]
    size: int | None = None
    written: tuple[Any, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Read:
    """A value that a node reads: `path` applied to `base`; `fact` is its shape and dtype."""

    base: fx.Node
    path: tuple[View, ...] = ()
    fact: Any = field(default=None, compare=False)


def is_view(node: fx.Node) -> bool:
    """Whether a node is a step of a path rather than a computation."""
    return node.op == "call_function" and (
        node.target in (aten.select.int, aten.slice.Tensor) or node.target is operator.getitem
    )


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number of the shape arithmetic."""
    return SIZE in node.meta or isinstance(node.meta.get("val"), (int, torch.SymInt))


def read_of(node: fx.Node) -> Read:
    """Follow views back to the value that they are views of."""
    path: list[View] = []
    fact = _fact(node)
    while is_view(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        path.append(_step(node, source))
        node = source
    return Read(node, tuple(reversed(path)), fact)


def _fact(node: fx.Node) -> tuple[tuple[Any, ...], torch.dtype] | None:
    value = node.meta.get("val")
    return (tuple(map(expression_of, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


def _step(node: fx.Node, source: fx.Node) -> View:
    if node.target is operator.getitem:
        return View(PART, (node.args[1],))
    value = source.meta["val"]
    arguments: list[Any] = [*node.args[1:], *(None,) * 4][:4]
    axis, numbers = (arguments[0] or 0) % value.dim(), arguments[1:]
    size = fixed(value.shape[axis])
    written: tuple[Any, ...] | None = (axis, *numbers[:2], 1 if numbers[2] is None else numbers[2])
    if any(isinstance(number, fx.Node) for number in numbers):
        written = None
    if node.target is aten.select.int:
        return View(SELECT, (axis, _resolved(numbers[0], size)), size, written and written[:2])
    start, end, step = numbers
    start = 0 if start is None else _clamped(start, size)
    end = size if end is None and size is not None else _clamped(end, size)
    return View(SLICE, (axis, start, end, 1 if step is None else step), size, written)


def _resolved(index: Any, size: int | None) -> Any:
    return index % size if isinstance(index, int) and size else index


def _clamped(index: Any, size: int | None) -> Any:
    if not isinstance(index, int) or size is None:
        return index
    return max(0, min(index + size if index < 0 else index, size))


def atoms(argument: Any) -> list[Any]:
    """The leaves of nested arguments in a fixed order, nodes as `Read`s."""
    if isinstance(argument, fx.Node):
        return [read_of(argument)]
    if isinstance(argument, Mapping):
        return [atom for value in argument.values() for atom in atoms(value)]
    if isinstance(argument, (tuple, list)):
        return [atom for value in argument for atom in atoms(value)]
    return [argument]


def layout(argument: Any) -> Any:
    """The nesting of arguments, with the kind of each leaf: all nodes are equal, all integers are, all floats are.

    A size of the inputs counts as an integer, and what is computed of sizes as a float: in a trace where they are not
    free, a number is in its place.
    """
    if isinstance(argument, fx.Node):
        if SIZE not in argument.meta:
            return "node"
        return "float" if isinstance(argument.meta.get("val"), torch.SymFloat) else "int"
    if isinstance(argument, Mapping):
        return tuple((key, layout(value)) for key, value in argument.items())
    if isinstance(argument, (tuple, list)):
        return tuple(layout(value) for value in argument)
    if isinstance(argument, int) and not isinstance(argument, bool):
        return "int"
    return "float" if isinstance(argument, float) else str(argument)


def filled(argument: Any, leaves: Iterator[Any]) -> Any:
    """The same nesting as plain tuples and dicts, with other leaves, in the order of `atoms`."""
    if isinstance(argument, Mapping):
        return {key: filled(value, leaves) for key, value in argument.items()}
    if isinstance(argument, (tuple, list)):
        return tuple(filled(value, leaves) for value in argument)
    return next(leaves)


def operator_name(target: Any) -> str:
    """An operator by the name that the model's code calls it by: `add`."""
    return str(getattr(target, "__name__", target)).split(".")[0]
