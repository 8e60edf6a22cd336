"""For which sizes a graph is right: a conjunction of conditions over its named dimensions.

    sequence <= 64        sequence % 8 == 0        batch*sequence <= 256        (sequence + 63)//64 != 1

`export` collects them (the tracer's guards, what folding assumed), a graph's metadata stores them, `verify` compares
at sizes on both sides of each, and engines' profiles stay within them. A condition is text: a Python expression of
integers and the names of dimensions, so that a person, a file and a program read the same thing.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import pairwise
from typing import Any

from moe_export.errors import UsageError

Sizes = Mapping[str, Any]  # of each dimension, an integer, or an array of them


@dataclass(frozen=True)
class Condition:
    """What must hold of some sizes.

    Attributes:
        text: A Python expression: names of dimensions, numbers, + - * / // %, comparisons, and, or, not, max, min,
            int, floor, ceil.
        caution: Whether a tracer wrote it down only because it treats the sizes 0 and 1, and equal sizes, as special:
            the graph may well be right where it does not hold, which a comparison there finds out.

    Example:
        >>> Condition("batch*sequence <= 256").holds({"batch": 4, "sequence": 65})
        False
    """

    text: str
    caution: bool = False

    def __post_init__(self) -> None:
        _check(self._tree, self.text)

    @cached_property
    def _tree(self) -> ast.expr:
        return parsed(self.text)

    @cached_property
    def names(self) -> frozenset[str]:
        """The dimensions that it is about."""
        return frozenset(
            node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name) and node.id not in _CALLS
        )

    @cached_property
    def constants(self) -> frozenset[int]:
        """The integers in it: what it says changes at or near them."""
        return frozenset(
            node.value
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, int)
        )

    def holds(self, sizes: Sizes) -> Any:
        """Whether it holds: a bool, or an array of bools where sizes are arrays; never where it divides by zero."""
        try:
            return _value(self._tree, self.text, sizes)
        except ZeroDivisionError:
            return False

    def gaps(self, sizes: Sizes) -> list[Any]:
        """How far apart things are that must not be equal, `height*width - 576` of `height*width != 576`.

        Few sizes make such a condition fail. Where a gap changes its sign between some sizes, others may close it.
        """
        try:
            return [
                _value(left, self.text, sizes) - _value(right, self.text, sizes)
                for left, right in _unequal(self._tree)
            ]
        except ZeroDivisionError:
            return []

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Domain:
    """The sizes for which a graph is right: those for which every condition holds.

    Example:
        >>> domain = Domain.of("sequence >= 1", "sequence % 8 == 0")
        >>> domain.holds({"sequence": 16}), domain.holds({"sequence": 17})
        (True, False)
    """

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def of(cls, *texts: str) -> Domain:
        """The domain of some conditions, as text."""
        return cls(tuple(Condition(text) for text in texts))

    def holds(self, sizes: Sizes) -> Any:
        """Whether a graph is right at these sizes."""
        return reduce(operator.and_, (condition.holds(sizes) for condition in self.conditions), True)

    def near(self, name: str) -> tuple[int, ...]:
        """The sizes of a dimension at which a condition may change: each constant, one less and one more, and twice."""
        constants = {
            number
            for condition in self.conditions
            if name in condition.names
            for constant in condition.constants
            for number in (constant - 1, constant, constant + 1, 2 * constant, 2 * constant + 1)
        }
        return tuple(sorted(number for number in constants if number > 0))

    def __str__(self) -> str:
        parts = [f"({each})" if " or " in each.text else each.text for each in self.conditions]
        return " and ".join(parts)


def parsed(text: str) -> ast.expr:
    """An expression of sizes as a tree.

    Raises:
        UsageError: It is no expression.
    """
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise UsageError(f"dimension '{text}' is neither a name nor an expression of names") from None


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The size that an expression of dimension names comes to: `batch`, `2*s0 + 1`, `sequence // 4`.

    A string that is a name as a whole counts as that name, whatever it looks like ("batch-size").

    Raises:
        UsageError: An unknown name, or something that is no expression of sizes, or no size.
    """
    if expression in sizes:
        return sizes[expression]
    tree = parsed(expression)
    _check(tree, expression)
    size = _value(tree, expression, sizes)
    if not isinstance(size, int) or isinstance(size, bool):
        raise UsageError(f"dimension '{expression}': only integers are sizes")
    return size


_Binary = Callable[[Any, Any], Any]
ARITHMETIC: dict[type[ast.AST], _Binary] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
"""What Python's operators between numbers compute, by their place in a syntax tree."""
_OPERATORS = {
    **ARITHMETIC,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def _each(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """A function of a number, or of each number of an array."""

    def apply(value: Any) -> Any:
        if isinstance(value, (int, float)):
            return function(value)
        import numpy as np

        return getattr(np, name)(value).astype(np.int64)

    return apply


def _extreme(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        if all(isinstance(value, (int, float)) for value in values):
            return function(values)
        import numpy as np

        return reduce(getattr(np, name), values)

    return apply


_CALLS: dict[str, Callable[..., Any]] = {
    "max": _extreme(max, "maximum"),
    "min": _extreme(min, "minimum"),
    "int": _each(int, "trunc"),
    "floor": _each(math.floor, "floor"),
    "ceil": _each(math.ceil, "ceil"),
}


def _check(tree: ast.AST, text: str) -> None:
    """Refuse what is no expression of sizes: a graph's metadata is somebody's text, and nothing in it is run."""
    fits = False
    match tree:
        case ast.Constant(value=value):
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name():
            fits = True
        case ast.BinOp(op=op):
            fits = type(op) in _OPERATORS
        case ast.Compare(ops=ops):
            fits = all(type(op) in _OPERATORS for op in ops)
        case ast.Call(func=ast.Name(id=name), keywords=[]):
            fits = name in _CALLS
        case ast.UnaryOp(op=ast.USub() | ast.Not()) | ast.BoolOp():
            fits = True
    if not fits:
        raise UsageError(
            f"dimension '{text}': only names, integers, arithmetic and comparisons are understood"
        )
    for child in _parts(tree):
        _check(child, text)


def _unequal(tree: ast.expr, *, negated: bool = False) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The sides of each comparison by which a condition fails if they are equal."""
    match tree:
        case ast.Compare(left=left, ops=ops, comparators=rights):
            for op, (here, there) in zip(ops, pairwise([left, *rights]), strict=True):
                if isinstance(op, ast.Eq if negated else ast.NotEq):
                    yield here, there
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from _unequal(operand, negated=not negated)
        case ast.BoolOp(values=values):
            for value in values:
                yield from _unequal(value, negated=negated)


def _parts(tree: ast.AST) -> Iterator[ast.AST]:
    match tree:
        case ast.Call(args=arguments):
            yield from arguments
        case _:
            yield from (child for child in ast.iter_child_nodes(tree) if isinstance(child, ast.expr))


def _value(node: ast.AST, text: str, sizes: Sizes) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            if name not in sizes:
                known = ", ".join(sizes) or "none"
                raise UsageError(f"dimension '{name}' has no range", hint=f"dimensions with a range: {known}")
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, text, sizes)
        case ast.UnaryOp(operand=operand):
            return _negated(_value(operand, text, sizes))
        case ast.BinOp(op=op, left=left, right=right):
            return _OPERATORS[type(op)](_value(left, text, sizes), _value(right, text, sizes))
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(part, text, sizes) for part in (left, *others)]
            found = [_OPERATORS[type(op)](*pair) for op, pair in zip(ops, pairwise(values), strict=True)]
            return reduce(operator.and_, found)
        case ast.BoolOp(op=op, values=parts):
            both = operator.and_ if isinstance(op, ast.And) else operator.or_
            return reduce(both, (_value(part, text, sizes) for part in parts))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _CALLS[name](*(_value(argument, text, sizes) for argument in arguments))
    raise UsageError(f"dimension '{text}' cannot be evaluated")


def _negated(value: Any) -> Any:
    return not value if isinstance(value, bool) else ~value
