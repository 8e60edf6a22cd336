"""Sizes without names that ONNX's shape inference counts: `unk__8`. They say nothing to a reader, so they go."""

from __future__ import annotations

import re

import onnx_ir as ir

_COUNTED = re.compile(r"unk__\d+")


def without_counted(shape: ir.Shape | None, known: ir.Shape | None = None) -> ir.Shape | None:
    """A shape in which no size has a name that inference counted.

    Args:
        shape: As inferred.
        known: As it was before, for what has a name there.

    Example:
        >>> list(map(str, without_counted(ir.Shape(["batch", "unk__8", 4]))))
        ['batch', 'None', '4']
    """
    if shape is None or not any(map(_is_counted, shape)):
        return shape
    if known is None or len(known) != len(shape):
        known = ir.Shape([None] * len(shape))
    kept = [
        (None if _is_counted(old) else old) if _is_counted(dim) else dim
        for dim, old in zip(shape, known, strict=True)
    ]
    return ir.Shape(kept)


def _is_counted(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and _COUNTED.fullmatch(dim.value or "") is not None
