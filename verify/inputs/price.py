"""The price of a case, known before it runs, so that the choice of cases does not depend on timing.

With a time budget, a slow or busy machine would run fewer cases, and its "equal" would mean less. So the work of the
reference is COUNTED at a few sizes, and a polynomial through the counts prices every other size:

    work  = operators, elements that they make, multiplications of their products
    units = 5,000 an operator + 1 an element + 1/20 a multiplication      (about nanoseconds on one core)

    operators   a + b n        a loop over n steps has b a step
    elements    a + b n + c n²  attention

The plan takes cases in their order while the sum stays within `BUDGET`, and leaves out one that takes more than a
third of it, or whose largest tensor does not fit. The first cases (see `inputs/cases`) are run whatever they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

Price: TypeAlias = Callable[[Mapping[str, int]], float]

BUDGET = 1.2e9  # units: about a second of the reference
MOST_OF_ONE = BUDGET / 3
_OPERATOR = 5_000.0  # what eager PyTorch needs to start one, in elements that it could make meanwhile
_PRODUCTS = 20.0  # multiplications in the time of one element
_LARGEST = 2**26  # elements of one tensor: 256 MiB of float32
_ASSUMED = 100  # operators of a model of which nothing is known


@dataclass(frozen=True)
class Work:
    """The work of running a model once.

    Attributes:
        operators: Calls of operators.
        elements: Elements of all their results.
        products: Multiplications in matrix products.
        largest: Elements of the largest tensor.
    """

    operators: float = 0.0
    elements: float = 0.0
    products: float = 0.0
    largest: float = 0.0

    @property
    def units(self) -> float:
        """The price; infinite where a tensor is too large."""
        if self.largest > _LARGEST:
            return float("inf")
        return _OPERATOR * self.operators + self.elements + self.products / _PRODUCTS


def flat_price(elements: Callable[[Mapping[str, int]], int]) -> Price:
    """The price where nothing was counted: a few operators over all inputs."""

    def price(sizes: Mapping[str, int]) -> float:
        given = elements(sizes)
        return Work(_ASSUMED, _ASSUMED * given, 0.0, given).units

    return price


def counted_price(
    base: Work, traced: Mapping[str, int], counts: Mapping[str, Sequence[tuple[int, Work]]]
) -> Price:
    """The price from counts at the traced sizes, and of each dimension at a few further ones.

    Args:
        base: At the traced sizes.
        traced: The traced sizes.
        counts: By dimension, with the others at their traced size; a dimension that could not be counted at two
            further sizes is taken to have all the work in proportion to it.
    """

    def price(sizes: Mapping[str, int]) -> float:
        found = {}
        for field in fields(Work):
            amount = getattr(base, field.name)
            known = amount
            for name, size in sizes.items():
                first = (traced[name], known)
                others = [(at, getattr(work, field.name)) for at, work in counts.get(name, ())]
                amount *= _growth([first, *others], size, square=field.name != "operators")
            found[field.name] = amount
        return Work(**found).units

    return price


def _growth(points: Iterable[tuple[int, float]], size: int, *, square: bool) -> float:
    """The ratio to the first amount at another size, by a polynomial through the points."""
    (start, first), *more = points
    if not first or size == start:
        return 1.0
    known = sorted({start: first, **dict(more)}.items())
    if len(known) < 3:
        return size / max(start, 1)
    (a, fa), (b, fb), (c, fc) = known[:3]
    low, high = (fb - fa) / (b - a), (fc - fb) / (c - b)
    bend = max((high - low) / (c - a), 0.0) if square else 0.0
    # At least a slope that would show on the way to a size that is a thousand times larger: chunks hide it at first.
    slope = max(low, high, 0.0) if not bend else low
    grown = fa + slope * (size - a) + bend * (size - a) * (size - b)
    return max(grown, first * size / max(1024, c) if size > c else 0.0, 0.0) / first
