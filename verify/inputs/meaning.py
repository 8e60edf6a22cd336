"""What the values of an input mean, and therefore which others are worth trying: ids, masks, integers, measurements.

An example shows a few values of many: three ids of a thousand, an offset of 0, a mask of ones, zeros where measurements
belong. A graph that has lost the other rows, or ignores the offset, is right there.

| input | drawn from |
|---|---|
| ids: integers that index a table (see `torch_tables`) | the whole table |
| masks: bools, 0 and 1, 0 and something far below | the example's own; then both, all and none (see `regimes`) |
| other integers | 0 to twice the example's and some more; then negative ones, then large ones |
| integers that Python reads (`int(n)`) | the example's own |
| measurements | normal with the example's mean and deviation; zeros are taken for a place that nobody filled in |

What an integer may be is asked of the reference, once, before anything is compared: a range is taken if its ends and
values between them are not refused and give no NaN that the example does not give, otherwise a narrower one is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from moe_export.verify.inputs.regimes import mask_values
from moe_export.verify.specs import Array, is_float

Range: TypeAlias = tuple[int, int]
Run: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
MOST_ASKED = 64  # runs of a reference to find out what it takes; an input of integers asks about ten times
_WIDER = 9  # an example of 0 is to become something else
_LARGE = (2**40, 2**24, 2**12)  # beyond int32; exact in float32; exact when squared


@dataclass(frozen=True)
class Table:
    """Which values have a row in every table that an input indexes.

    Attributes:
        low: The least.
        high: The greatest, at the traced sizes.
        dim: The dimension that the table grows with, if it does.
        traced: The traced size of that dimension.
    """

    low: int
    high: int
    dim: str | None = None
    traced: int = 0

    def high_at(self, sizes: Mapping[str, int]) -> int:
        """The greatest at other sizes."""
        return self.high if self.dim is None else self.high + sizes[self.dim] - self.traced


@dataclass(frozen=True)
class Meaning:
    """What an input of integers is drawn from; bounds are inclusive.

    Attributes:
        ordinary: In ordinary cases; None for the example's own values.
        table: The table that it indexes.
        negative: With negative ones; None if the reference takes none.
        large: How large the largest may be; None if the reference takes no large ones, or they would mean nothing.
    """

    ordinary: Range | None = None
    table: Table | None = None
    negative: Range | None = None
    large: int | None = None


class Asked:
    """Finds out by running it which values a reference accepts, within a budget of runs.

    Args:
        run: Runs it.
        example: Inputs that it accepts.
        times: The most runs.
    """

    def __init__(self, run: Run, example: Mapping[str, Array], times: int) -> None:
        self._run, self._example, self._left = run, example, times
        self._lost = self._not_finite(example)

    def takes(self, name: str, values: Iterable[Array], *, finite: bool = True) -> bool:
        """Whether it accepts these values of an input, with no more NaN or Inf than for the example."""
        for array in values:
            lost = self._not_finite({**self._example, name: array})
            if lost is None or (finite and lost > (self._lost or 0)):
                return False
        return True

    def _not_finite(self, inputs: Mapping[str, Array]) -> int | None:
        """How many elements are NaN or Inf; None if it rejects the values or the budget is used up."""
        if self._left <= 0:
            return None
        self._left -= 1
        try:
            outputs = self._run(inputs)
        except Exception:  # whatever a model raises
            return None
        return sum(
            int((~np.isfinite(array.astype(np.float64))).sum())
            for array in outputs.values()
            if is_float(array.dtype)
        )


def meanings_of(
    asked: Asked,
    example: Mapping[str, Array],
    tables: Mapping[str, Table],
    read: Iterable[str] = (),
) -> dict[str, Meaning]:
    """The range from which each integer input is drawn.

    Args:
        asked: Knows which values the reference accepts.
        example: The example inputs.
        tables: Of inputs that are ids.
        read: Inputs that Python reads: loops and shapes depend on them.
    """
    found = {}
    for name, array in example.items():
        if array.dtype.kind not in "iu" or not array.size:
            continue
        if (
            name in tables
        ):  # that Python reads the largest of them, too, is how `one_hot` and others look at ids
            found[name] = _ids(name, array, tables[name], asked)
        elif name in set(read):
            continue
        elif mask_values(array) is None or array.size == 1:
            found[name] = _integers(name, array, asked)
    return found


def _ids(name: str, array: Array, table: Table, asked: Asked) -> Meaning:
    whole = (table.low, table.high)
    taken = table.low <= table.high and asked.takes(name, _spread(array, whole), finite=False)
    below = (table.low - (table.high - table.low) - 1, table.low - 1)
    negative = below if taken and asked.takes(name, _spread(array, below)) else None
    return Meaning(whole if taken else None, table if taken else None, negative)


def _integers(name: str, array: Array, asked: Asked) -> Meaning:
    low, high = int(array.min()), int(array.max())
    wide = 2 * max(abs(low), abs(high)) + _WIDER
    limits = np.iinfo(array.dtype)
    top = min(wide, int(limits.max))
    tried = [(min(low, 0), top), (min(low, 1), top), (low, top), (min(low, 0), high), (low, high)]
    ordinary = next((each for each in tried if asked.takes(name, _spread(array, each))), None)
    below = (max(-wide, int(limits.min)), top)
    negative = below if below[0] < 0 and asked.takes(name, _spread(array, below), finite=False) else None
    sizes = dict.fromkeys(min(size, int(limits.max)) for size in _LARGE)
    sign = -1 if negative else 1
    large = next(
        (
            size
            for size in sizes
            if size > top and asked.takes(name, [_full(array, size), _full(array, sign * size)], finite=False)
        ),
        None,
    )
    return Meaning(ordinary, None, negative, large)


def _spread(array: Array, within: Range) -> list[Array]:
    """The ends of a range, and values between them."""
    between = np.random.default_rng(0).integers(within[0], within[1] + 1, array.shape)
    return [_full(array, within[0]), _full(array, within[1]), np.asarray(between).astype(array.dtype)]


def _full(array: Array, value: Any) -> Array:
    return np.full_like(array, value)
