"""Tokens that are cut off where an expert has too many: `rows[:limit] if len(rows) > limit else rows`.

A slice that ends behind the last entry keeps all of them, so both ways are the slice, and the question needs no answer
of the data: a trace takes the way that cuts.

    kept = rows[:limit] if rows.numel() > limit else rows
    if rows.shape[0] > limit: rows, weights = rows[:limit], weights[:limit]
    if rows.size(0) <= limit: kept = rows
    else: kept = rows[:limit]
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, NamedTuple

import torch

from moe_export.export.sizes import same_size


class _Question(NamedTuple):
    """Whether a value is longer than a limit.

    Attributes:
        value: The name of the value, and whether its entries are counted (`numel`) or its rows.
        limit: The limit, as it is written.
        yes: The answer that says "longer".
    """

    value: str
    entries: bool
    limit: str
    yes: bool


def cuts_off(frame: FrameType) -> bool | None:
    """The answer to the question on the line that runs for which a value is cut off.

    Args:
        frame: Where the question is asked.

    Returns:
        None if the two ways are not the same: something else is done, or to values of other lengths.
    """
    for test, cut, kept in _ways("".join(linecache.getlines(frame.f_code.co_filename))):
        if not test.lineno <= frame.f_lineno <= (test.end_lineno or 0):
            continue
        question = _question(test)
        if question is None:
            continue
        first, second = (cut, kept) if question.yes else (kept, cut)
        names = _cut(first, second, question.limit)
        if names and _are_as_long(frame, names, question):
            return question.yes
    return None


_Ways = tuple[ast.expr, Sequence[ast.AST], Sequence[ast.AST]]


@lru_cache(maxsize=16)  # a loop over experts asks once for each of them
def _ways(source: str) -> tuple[_Ways, ...]:
    """Each condition of a file, and what is done in both cases."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    found: list[_Ways] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            found.append((node.test, node.body, node.orelse))
        elif isinstance(node, ast.IfExp):
            found.append((node.test, [node.body], [node.orelse]))
    return tuple(found)


def _question(test: ast.expr) -> _Question | None:
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    left, right, above = test.left, test.comparators[0], isinstance(test.ops[0], (ast.Gt, ast.GtE))
    if not above and not isinstance(test.ops[0], (ast.Lt, ast.LtE)):
        return None
    for length, limit, yes in ((left, right, above), (right, left, not above)):
        measured = _measured(length)
        if measured is not None and _computes_nothing(limit):
            return _Question(*measured, ast.dump(limit), yes)
    return None


def _measured(length: ast.expr) -> tuple[str, bool] | None:
    """The name of the value that an expression is the length of; whether all of its entries are counted."""
    text = ast.unparse(length)
    for name in (each.id for each in ast.walk(length) if isinstance(each, ast.Name)):
        if text in (f"{name}.numel()", f"{name}.nelement()"):
            return name, True
        if text in (f"{name}.size(0)", f"{name}.shape[0]", f"{name}.size()[0]", f"len({name})"):
            return name, False
    return None


def _computes_nothing(limit: ast.expr) -> bool:
    """Whether an expression may be read twice: names, attributes, numbers and arithmetic."""
    plain = (
        ast.Name,
        ast.Attribute,
        ast.Constant,
        ast.BinOp,
        ast.operator,
        ast.UnaryOp,
        ast.unaryop,
        ast.expr_context,
    )
    return all(isinstance(each, plain) for each in ast.walk(limit))


def _cut(cut: Sequence[ast.AST], kept: Sequence[ast.AST], limit: str) -> list[str]:
    """The names of the values that one way cuts off at a limit, and the other keeps; none if it does more."""
    parts, whole = [list(_values(each)) for each in (cut, kept)]
    targets = dict(whole) if kept else {target: target for target, _ in parts}
    names: list[str] = []
    for target, value in parts:
        is_cut = isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name)
        name = ast.unparse(value.value) if is_cut else ""  # type: ignore[attr-defined]
        other = targets.pop(target, None)
        other = other.id if isinstance(other, ast.Name) else other
        if not name or name != other or not _ends_at(value.slice, limit):  # type: ignore[attr-defined]
            return []
        names.append(name)
    return names if not targets else []


def _values(way: Sequence[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """What is assigned, and to which name; the values of a tuple have numbers, another expression's has no name."""
    for each in way:
        if isinstance(each, ast.Tuple):
            yield from ((str(place), value) for place, value in enumerate(each.elts))
        elif isinstance(each, ast.expr):
            yield "", each
        elif isinstance(each, ast.Assign) and len(each.targets) == 1:
            target, value = each.targets[0], each.value
            if (
                isinstance(target, ast.Tuple)
                and isinstance(value, ast.Tuple)
                and len(target.elts) == len(value.elts)
            ):
                yield from ((ast.unparse(one), two) for one, two in zip(target.elts, value.elts, strict=True))
            else:
                yield ast.unparse(target), value
        elif not isinstance(each, ast.Pass):
            yield ast.unparse(each), each  # no value that is cut off


def _ends_at(part: ast.expr, limit: str) -> bool:
    return (
        isinstance(part, ast.Slice)
        and part.lower is None
        and part.step is None
        and part.upper is not None
        and ast.dump(part.upper) == limit
    )


def _are_as_long(frame: FrameType, names: Sequence[str], question: _Question) -> bool:
    values: list[Any] = [frame.f_locals.get(name) for name in (question.value, *names)]
    if not all(isinstance(value, torch.Tensor) and value.dim() for value in values):
        return False
    first, *others = values
    if question.entries and first.dim() != 1:
        return False
    return all(same_size(first.shape[0], other.shape[0]) for other in others)
