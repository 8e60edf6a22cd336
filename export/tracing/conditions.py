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
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from moe_export.export.torch_compat.sizes import has_remainder
from moe_export.export.tracing.dims import Dim

AxisRef = tuple[int, int]  # which input, and an axis of it
Shape = tuple[int | str, ...]
_LARGEST = 16  # a range is looked past at sizes up to so many times the example's


def only_there(
    program: ExportedProgram,
    dims: Sequence[Dim],
    shapes: Sequence[Shape],
    takes: Callable[[Mapping[AxisRef, int]], bool],
) -> set[AxisRef]:
    """Places whose sizes are not free: the model takes others, and the trace does not hold for them.

    Args:
        program: The trace.
        dims: What is free in it.
        shapes: Of its inputs: sizes, names of dimensions, or expressions of them.
        takes: Whether the model runs with other sizes at these places.
    """
    broken = _at_a_number(program, dims)
    for dim in dims:
        if dim.name not in broken and _is_within(dim):
            assert dim.maximum is not None
            places = [
                (place, axis)
                for place, shape in enumerate(shapes)
                for axis, size in enumerate(shape)
                if size == dim.name
            ]
            others = (dim.maximum + 1, dim.minimum - 1)
            if places and any(takes(dict.fromkeys(places, other)) for other in others):
                broken.add(dim.name)
    return {
        (place, axis)
        for place, shape in enumerate(shapes)
        for axis, size in enumerate(shape)
        if isinstance(size, str) and broken & set(re.findall(r"[A-Za-z_]\w*", size))
    }


def _is_within(dim: Dim) -> bool:
    """Whether the trace bounds a size on both sides: a table of positions does so on one."""
    return dim.minimum > 1 and dim.maximum is not None and dim.maximum < _LARGEST * dim.traced


def _at_a_number(program: ExportedProgram, dims: Sequence[Dim]) -> set[str]:
    """Dimensions that break a condition at other sizes: one batch of two inputs does not, in `8 * batch // batch == 8`.

    Of one dimension, other sizes are its multiples: that it can be divided is no number.
    """
    of_symbol = {symbol: dim for dim in dims for symbol in (dim.symbol, *dim.also)}
    broken = set[str]()
    for condition in _numbers(program):
        within = [symbol for symbol in condition.free_symbols if str(symbol) in of_symbol]
        sizes = {symbol: of_symbol[str(symbol)].traced for symbol in within}
        for dim in {of_symbol[str(symbol)] for symbol in within}:
            own = [symbol for symbol in within if of_symbol[str(symbol)] is dim]
            others = (dim.traced + 1, 2 * dim.traced + 3)
            if len(condition.free_symbols) == 1:
                others = (2 * dim.traced, 3 * dim.traced)
            if any(condition.subs(sizes | dict.fromkeys(own, other)) != sympy.true for other in others):
                broken.add(dim.name)
    return broken


def _numbers(program: ExportedProgram) -> Iterator[sympy.Basic]:
    """The conditions that something computed from sizes is a number; that several can be divided is none."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    free = [size for size in sizes if isinstance(size, torch.SymInt)]
    if not free:
        return
    known = free[0].node.shape_env
    for guard in known.guards:
        condition = known.replace(guard.expr)
        if not isinstance(condition, sympy.Eq) or not condition.rhs.is_Integer:
            continue
        if len(condition.free_symbols) == 1 or (condition.free_symbols and not has_remainder(condition.lhs)):
            yield condition
