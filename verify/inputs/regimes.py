"""Kinds of values that find what ordinary ones do not: ties, repeated token, decay, extremes, padding.

A regime changes values that were drawn as ordinary ones (see `inputs/cases`), so an input keeps its mean and deviation
where the regime does not say otherwise. A row is the last axis of an input: the features of one token.

| regime | values | finds |
|---|---|---|
| `bfloat16 values`, `grid` | few distinct ones | order among equal scores |
| `zeros`, `one value` | all the same | ties of all experts; a mean or a variance of nothing |
| `repeated token` | one row, repeated | every token at one expert: a capacity, a slice of the wrong length |
| `small` | 1/64 of the ordinary | an epsilon; a recurrence that hardly decays |
| `large values` | 16 times the ordinary | overflow; a recurrence that forgets at once |
| `held up`, `held down` | one large row, repeated, and its negative | sums over a long time; decay to nothing |
| `largest`, `smallest` | at the ends of the dtype (a row can just be added up) | overflow, subnormal numbers |
| `normal values` | normal, of both signs, whatever the example was | what only holds for ones or positive numbers |
| `padded`, `padded left` | open, then closed; closed, then open | a mask that is not looked at, or read the other way |
| `all true`, `all false` | open throughout, closed throughout | a flag that is not looked at |
| `random mask` | each by chance | a mask that is taken for a length |
| `long` | ordinary ones, at the longest size that its price allows | a loop that ends, a limit, a sum that drifts |
| `every id` | ids that run through their whole table | rows that are wrong |
| `negative integers` | of both signs; ids count from the end | remainders, quotients, clipped indices |
| `large integers` | up to 2**40, or what the type holds and the model takes | int32 in place of int64 |

Where the reference gives NaN for a kind that its author need not have thought of (`UNASKED`), nothing is compared,
and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from moe_export.verify.specs import Array, is_float

NORMAL = "normal"
SIGNED = "normal values"
LONG = "long"
EVERY_ID, NEGATIVE, LARGE = "every id", "negative integers", "large integers"


@dataclass(frozen=True)
class Regime:
    """A kind of values.

    Args:
        name: What reports call it.
        change: Ordinary floats, float64, a generator and the input's dtype → floats of this kind.
        ties: Equal scores are what it is for; such flips do not count against a budget.
        stress: float32 itself may come far from the truth, so a float64 run says what may be asked.
        always: Whether it is tried without `thorough`.
    """

    name: str
    change: Callable[[Array, np.random.Generator, np.dtype[Any]], Array]
    ties: bool = False
    stress: bool = False
    always: bool = False


def _rounded(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def _grid(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    step = float(values.std()) if values.size else 0.0
    return np.asarray(np.round(values / step) * step) if step else values


def _zeros(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    return np.zeros_like(values)


def _one_value(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    return np.full_like(values, values.flat[0] if values.size else 0.0)


def one_row(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    """The first row in place of every row; of a vector, the first value."""
    if not values.size:
        return values
    row = values.reshape(-1, values.shape[-1])[0] if values.ndim > 1 else values.flat[0]
    return np.array(np.broadcast_to(row, values.shape))


def _times(factor: float) -> Callable[..., Array]:
    return lambda values, generator, dtype: values * factor


def _held(factor: float) -> Callable[..., Array]:
    return lambda values, generator, dtype: one_row(values, generator, dtype) * factor


def _largest(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    # A row can just be added up: where it cannot, the order of the sum decides what is NaN, and engines have their own.
    length = values.shape[-1] if values.ndim else 1
    return np.asarray(np.sign(values) * largest_of(dtype) / (2 * max(1, length)))


def largest_of(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def _smallest(values: Array, _: np.random.Generator, dtype: np.dtype[Any]) -> Array:
    tiny: Any = ml_dtypes.finfo(dtype).tiny  # type: ignore[no-untyped-call]
    return np.asarray(values * float(tiny))


REGIMES = (
    Regime("bfloat16 values", _rounded, ties=True, always=True),
    Regime("zeros", _zeros, ties=True, always=True),
    Regime("repeated token", one_row, always=True),
    Regime("large values", _times(16.0), stress=True, always=True),
    Regime("grid", _grid, ties=True),
    Regime("one value", _one_value, ties=True),
    Regime("small", _times(1 / 64)),
    Regime("held up", _held(8.0), stress=True),
    Regime("held down", _held(-8.0), stress=True),
    Regime("largest", _largest, stress=True),
    Regime("smallest", _smallest),
)
TIES = frozenset(regime.name for regime in REGIMES if regime.ties)


def mask_values(values: Array) -> tuple[Any, Any] | None:
    """What stands where a mask is open and where it is closed; None if `values` are no mask.

    A mask is of bools, of the integers 0 and 1, or of floats that are 0 and 1, or 0 and something far below.
    """
    if values.dtype.kind == "b":
        return True, False
    if not values.size or not (values.dtype.kind in "iu" or is_float(values.dtype)):
        return None
    found = np.unique(values.astype(np.float64))
    if set(found) <= {0.0, 1.0}:
        return (1, 0) if 1.0 in found else None
    closed = len(found) == 2 and found[1] == 0 and found[0] < -100
    return (0.0, float(found[0])) if closed else None


def _marks_end(shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Whether a mark stands, each row ending after its own number; at least one of each row stays."""
    ends = generator.integers(1, shape[-1], (*shape[:-1], 1))
    return np.asarray(np.broadcast_to(np.arange(shape[-1]) < ends, shape))


Shape = tuple[int, ...]
MASKS: dict[str, Callable[[Shape, np.random.Generator], Array]] = {
    "padded": _marks_end,
    "padded left": lambda shape, generator: np.flip(_marks_end(shape, generator), -1),
    "all true": lambda shape, generator: np.ones(shape, bool),
    "all false": lambda shape, generator: np.zeros(shape, bool),
    "random mask": lambda shape, generator: np.asarray(generator.random(shape) < 0.5),
}
PADDED, PADDED_LEFT, _, ALL_FALSE, RANDOM_MASK = MASKS


def masked(
    name: str, shape: Shape, mask: tuple[Any, Any], generator: np.random.Generator, dtype: np.dtype[Any]
) -> Array | None:
    """A mask of one of these kinds; None if it is too short for that.

    Args:
        name: The kind.
        shape: Of the mask.
        mask: Its values where it is open and where it is closed.
        generator: Of where it ends.
        dtype: Of the mask.
    """
    if name in {PADDED, PADDED_LEFT} and (not shape or shape[-1] < 2):
        return None
    return np.asarray(np.where(MASKS[name](shape, generator), *mask)).astype(dtype)


# Kinds that an author need not have thought of: where the reference is NaN for them, nothing is compared.
UNASKED = frozenset({SIGNED, NEGATIVE, LARGE, PADDED_LEFT, ALL_FALSE, RANDOM_MASK})
STRESS = frozenset(regime.name for regime in REGIMES if regime.stress) | UNASKED
