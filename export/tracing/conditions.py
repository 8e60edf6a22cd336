"""Sizes that a trace only looks free in: it noted a condition on them, and goes one way through the model.

    for _ in range((height // 4) * (width // 4))      (height // 4) * (width // 4) == 6
    for chunk in range(padded // 8)                   padded // 8 == 3
    while span < length: ...; span *= 2               9 <= length <= 16

A size that became a number by itself is fixed by the tracer; of what is computed from sizes, it only notes the
condition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from moe_export.export.torch_compat.sizes import has_remainder
from moe_export.export.tracing.dims import Dim

AxisRef = tuple[int, int]  # which input, and an axis of it
Shape = tuple[int | str, ...]
_NEAREST = 512  # squares of numbers up to 256 are that close together, and most windows are smaller
_FEW = 8  # each is a run of the model
_LARGEST = 16  # a range is looked past at sizes up to so many times the example's


def only_there(
    program: ExportedProgram,
    dims: Sequence[Dim],
    shapes: Sequence[Shape],
    takes: Callable[[Mapping[AxisRef, int]], bool],
) -> dict[AxisRef, sympy.Basic]:
    """Places whose sizes are not free: the model takes others, and the trace does not hold for them.

    Args:
        program: The trace.
        dims: What is free in it.
        shapes: Of its inputs: sizes, names of dimensions, or expressions of them.
        takes: Whether the model runs with other sizes at these places.

    Returns:
        By place, the tracer's condition that fails at other sizes.
    """
    places = {
        dim.name: [
            (place, axis)
            for place, shape in enumerate(shapes)
            for axis, size in enumerate(shape)
            if size == dim.name
        ]
        for dim in dims
    }

    def takes_size(dim: Dim, size: int) -> bool:
        return bool(places[dim.name]) and takes(dict.fromkeys(places[dim.name], size))

    broken = _at_a_number(program, dims, takes_size)
    for dim in dims:
        if dim.name not in broken and _is_within(dim):
            assert dim.maximum is not None
            for other in (dim.maximum + 1, dim.minimum - 1):
                if takes_size(dim, other):
                    broken.setdefault(dim.name, _bound(program, dim, other))
    return {
        (place, axis): broken[name]
        for place, shape in enumerate(shapes)
        for axis, size in enumerate(shape)
        if isinstance(size, str)
        for name in re.findall(r"[A-Za-z_]\w*", size)
        if name in broken
    }


def _is_within(dim: Dim) -> bool:
    """Whether the trace bounds a size on both sides: a table of positions does so on one."""
    return dim.minimum > 1 and dim.maximum is not None and dim.maximum < _LARGEST * dim.traced


def _at_a_number(
    program: ExportedProgram, dims: Sequence[Dim], takes: Callable[[Dim, int], bool]
) -> dict[str, sympy.Basic]:
    """Dimensions that break a condition at other sizes, and which condition.

    One batch of two inputs does not, in `8 * batch // batch == 8`.

    Of one dimension, other sizes are its multiples: that it can be divided is no number. What fails only where the
    model fails, too, is no number either, if both take another size: windows of 4 x 4, a root that has to be whole.
    """
    of_symbol = {symbol: dim for dim in dims for symbol in (dim.symbol, *dim.also)}
    sizes_at: dict[str, list[tuple[sympy.Basic, dict[sympy.Basic, int], list[sympy.Basic]]]] = {}
    failing: dict[str, dict[int, sympy.Basic]] = {}
    for noted, condition in _numbers(program):
        within = [symbol for symbol in condition.free_symbols if str(symbol) in of_symbol]
        sizes = {symbol: of_symbol[str(symbol)].traced for symbol in within}
        for dim in {of_symbol[str(symbol)] for symbol in within}:
            own = [symbol for symbol in within if of_symbol[str(symbol)] is dim]
            sizes_at.setdefault(dim.name, []).append((condition, sizes, own))
            others = (dim.traced + 1, 2 * dim.traced + 3)
            if len(condition.free_symbols) == 1:
                others = (2 * dim.traced, 3 * dim.traced)
            for other in others:
                if not _holds(condition, sizes, own, other):
                    failing.setdefault(dim.name, {}).setdefault(other, noted)
    return {
        dim.name: next(iter(failing[dim.name].values()))
        for dim in dims
        if failing.get(dim.name)
        and (
            any(takes(dim, other) for other in sorted(failing[dim.name]))
            or not _holds_elsewhere(dim, sizes_at[dim.name], takes)
        )
    }


def _holds(
    condition: sympy.Basic, sizes: Mapping[sympy.Basic, int], own: Sequence[sympy.Basic], other: int
) -> bool:
    return bool(condition.subs({**sizes, **dict.fromkeys(own, other)}) == sympy.true)


def _holds_elsewhere(
    dim: Dim,
    conditions: Sequence[tuple[sympy.Basic, Mapping[sympy.Basic, int], Sequence[sympy.Basic]]],
    takes: Callable[[Dim, int], bool],
) -> bool:
    """Whether the model takes another size at which all conditions hold: one of the next few."""
    others = range(dim.traced + 1, dim.traced + _NEAREST)
    holding = (each for each in others if all(_holds(*condition, each) for condition in conditions))
    return any(takes(dim, each) for each in islice(holding, _FEW))


def _numbers(program: ExportedProgram) -> Iterator[tuple[sympy.Basic, sympy.Basic]]:
    """The conditions that something computed from sizes is a number, as noted and as they are now.

    That several sizes can be divided is none.
    """
    for noted, condition in _noted(program):
        if not isinstance(condition, sympy.Eq) or not condition.rhs.is_Integer:
            continue
        if len(condition.free_symbols) == 1 or (condition.free_symbols and not has_remainder(condition.lhs)):
            yield noted, condition


def _bound(program: ExportedProgram, dim: Dim, other: int) -> sympy.Basic:
    """The condition on one dimension alone that fails at another size."""
    for noted, condition in _noted(program):
        own = [symbol for symbol in condition.free_symbols if str(symbol) in (dim.symbol, *dim.also)]
        if own and len(own) == len(condition.free_symbols) and not _holds(condition, {}, own, other):
            return noted
    return sympy.true


def _noted(program: ExportedProgram) -> Iterator[tuple[sympy.Basic, sympy.Basic]]:
    """Each condition of a trace, and the same with sizes that came out equal under one symbol."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    free = [size for size in sizes if isinstance(size, torch.SymInt)]
    if free:
        known = free[0].node.shape_env
        yield from ((guard.expr, known.replace(guard.expr)) for guard in known.guards)
