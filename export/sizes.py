"""Whether two sizes are the same: of a traced program, and of an ONNX graph.

    2*s0 and s0*2      s0 + s1 and s1 + s0      4*(s0//4) and s0, where 4 divides s0      s0 and 3, where s0 is 3

are the same however they are written; s0 and s1 are not, although both were 8 in the example. `True` means proved, for
every size that the program or the graph takes. No guard is added, and the sizes of the example have no say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size: TypeAlias = int | torch.SymInt


def expression_of(size: Any) -> Any:
    """A size, or another number, of a trace as a key for tables: a plain number, or its simplified expression.

    Symbols of one name are one symbol here, even of two traces; `same_size` proves more, within one trace.
    """
    number = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    if number is not None:
        return int(number)
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def fixed(size: object) -> int | None:
    """The one number that a size of a trace can be; None if there are several, or if it is no size."""
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    if not isinstance(size, torch.SymInt):
        return None
    expression = expression_of(size)
    if isinstance(expression, int):
        return expression
    bounds = size.node.shape_env.bound_sympy(expression)
    return int(bounds.lower) if bounds.lower == bounds.upper else None


def same_size(left: object, right: object) -> bool:
    """Whether two sizes of a trace are equal for every input that the trace holds for.

    Args:
        left: An integer or a `SymInt`; anything else is no size, and never the same.
        right: Likewise.
    """
    if not (_is_size(left) and _is_size(right)):
        return False
    one, other = expression_of(left), expression_of(right)
    if one == other:
        return True
    if isinstance(one, int) and isinstance(other, int):
        return False
    environments = {id(size.node.shape_env) for size in (left, right) if isinstance(size, torch.SymInt)}
    # Of two traces only what is written the same can be compared.
    return len(environments) == 1 and statically_known_true(left == right)


def is_at_most(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether a size of a trace is no greater than another for every input that the trace holds for."""
    return bool(statically_known_true(size <= other))


def same_shape(left: Sequence[object], right: Sequence[object]) -> bool:
    """Whether two shapes of a trace have the same sizes, axis by axis."""
    return len(left) == len(right) and all(map(same_size, left, right))


def same_dim(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions of one ONNX graph are equal whenever the graph runs; an unknown one never is."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    texts = [None if isinstance(dim, int) else dim.value for dim in (left, right)]
    if any(text is None and not isinstance(dim, int) for text, dim in zip(texts, (left, right), strict=True)):
        return False
    if texts[0] == texts[1]:
        return True
    try:
        difference = (left - right).simplify()  # type: ignore[union-attr]  # at least one is symbolic
    except (TypeError, ValueError):  # a name that is no expression: it is equal to itself alone
        return False
    return str(difference) == "0"


def _is_size(size: object) -> bool:
    return isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool)
