"""The inputs of a comparison: the example, then the same kind of values at other sizes, then other kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.inputs.known import NOTHING, Known
from moe_export.verify.inputs.maker import EXAMPLE, Case, MadeOnce, Maker, label_of
from moe_export.verify.inputs.price import BUDGET, MOST_OF_ONE, Price, flat_price
from moe_export.verify.inputs.regimes import LONG
from moe_export.verify.inputs.sizes import long_sizes, shape_at, sizes_to_try
from moe_export.verify.specs import Array, DimRange, TensorSpec, describe, numpy_dtype

__all__ = ["EXAMPLE", "RESAMPLED", "Case", "MadeOnce", "case_maker", "cases"]
RESAMPLED = "new values"
_FIRST_SIZES = 3  # so many sizes come before the regimes
_FEW = 3  # a dimension that is smaller in the example says little of masks and ids: they are tried at a larger one, too


def cases(
    specs: Sequence[TensorSpec],
    dims: Sequence[DimRange],
    example: Mapping[str, Array],
    seed: int = 0,
    *,
    thorough: bool = False,
    seeds: int = 1,
    at: Sequence[Mapping[str, int]] = (),
    known: Known = NOTHING,
) -> Iterator[Case]:
    """Make cases: the example, new values at its sizes, other sizes (see `sizes`), other kinds of values.

    The arguments alone decide which cases there are; arrays are created when first accessed.

    New floats are normal with the mean and deviation of the example's (and stay non-negative where it is);
    integers, bools and floats that are a mask rather than measurements are drawn from the example's own
    values. So token ids stay in range, a mask of ones stays one, and -inf stays a mask's -inf.

    Args:
        specs: The inputs.
        dims: A range for every name that the specs' shapes mention.
        example: One array a spec, of its dtype and its traced shape.
        seed: Same seed, same arrays, on every machine; each case is independent of those before it.
        thorough: Every regime, at the traced sizes, at larger and at the smallest ones; otherwise the four that
            find most, at the traced sizes.
        seeds: New values at the traced sizes under so many seeds: `seed`, `seed + 1`, ...
        at: Further sizes; a dimension that is not named keeps its traced size.
        known: What is known of the two artifacts: what cases cost, what inputs mean, which numbers are in their code.

    Raises:
        UsageError: Example and specs do not fit, or a shape names an unknown dimension.
    """
    traced = {dim.name: dim.traced for dim in dims}
    _check(specs, traced, example)  # here, not at the first next(): the mistake is in this call
    for sizes in at:
        if unknown := sorted(sizes.keys() - traced.keys()):
            raise UsageError(
                f"there is no dynamic dimension '{unknown[0]}'",
                hint=f"the dynamic dimensions: {', '.join(traced) or 'none'}",
            )
    maker = Maker(specs, {name: np.array(array) for name, array in example.items()}, seed, known)
    asked = [traced | dict(sizes) for sizes in at]
    return _affordable(
        _cases(maker, dims, traced, thorough, seeds, asked),
        known.price or flat_price(maker.elements),
        paid=thorough or seeds > 1,
    )


def _affordable(planned: Iterator[tuple[Case, bool]], price: Price, *, paid: bool) -> Iterator[Case]:
    """The mandatory cases, and as many of the others, in order, as the budget allows."""
    left = BUDGET
    for case, must in planned:
        cost = price(case.sizes)
        if not must and not (cost <= (MOST_OF_ONE if paid else min(MOST_OF_ONE, left))):
            continue
        left -= 0 if must else cost
        yield case


def case_maker(
    specs: Sequence[TensorSpec], example: Mapping[str, Array], seed: int = 0
) -> Callable[[dict[str, int]], Case]:
    """A function that makes an ordinary case of any sizes."""
    maker = Maker(specs, {name: np.array(array) for name, array in example.items()}, seed)
    return lambda sizes: maker.make(label_of(sizes), sizes)


def _cases(
    maker: Maker,
    dims: Sequence[DimRange],
    traced: dict[str, int],
    thorough: bool,
    seeds: int,
    at: Sequence[dict[str, int]],
) -> Iterator[tuple[Case, bool]]:
    """Every case, the most revealing first, and whether it is mandatory."""
    yield maker.given(traced), True
    yield maker.make(RESAMPLED, traced), True
    yield from ((maker.make(label_of(sizes), sizes), True) for sizes in at)
    known = maker.known
    tried = sizes_to_try(dims, known.numbers, known.holds)
    others = [(sizes, reserve) for sizes, reserve in tried if maker.can_make(sizes)]
    for sizes, reserve in others[:_FIRST_SIZES]:
        yield maker.make(label_of(sizes), sizes, reserve=reserve), True
    roomy = {dim.name: dim.clamp(dim.traced if dim.traced >= _FEW else 2 * dim.traced + _FEW) for dim in dims}
    larger = [roomy] if dims and max(traced.values()) < _FEW and maker.can_make(roomy) else []
    for sizes in [traced, *larger, *(sizes for sizes, _ in others[:2] if thorough)]:
        suffix = "" if sizes == traced else label_of(sizes)
        yield from ((case, True) for case in maker.regimes(sizes, thorough, suffix))
    for more in range(1, seeds):
        other = Maker(maker.specs, maker.example, maker.seed + more, maker.known)
        yield other.make(RESAMPLED, traced), True
        yield from ((case, True) for case in other.regimes(traced, thorough, ""))
    yield from ((case, False) for case in _long(maker, dims))
    yield from ((case, False) for case in maker.every_id(dims))
    for sizes, reserve in others[_FIRST_SIZES:]:
        yield maker.make(label_of(sizes), sizes, reserve=reserve), reserve


def _long(maker: Maker, dims: Sequence[DimRange]) -> Iterator[Case]:
    """One long size of each dimension, where its price is known."""
    price = maker.known.price
    if price is None:
        return
    most = MOST_OF_ONE  # a length is rather the last dimension than the first, and what is long for it finds more
    for longest in long_sizes(dims[::-1], maker.known.holds):
        paid = [sizes for sizes in longest if maker.can_make(sizes) and price(sizes) <= most]
        most /= 4
        yield from (maker.make(label_of(sizes), sizes, regime=LONG) for sizes in paid[:1])


def _check(specs: Sequence[TensorSpec], traced: Mapping[str, int], example: Mapping[str, Array]) -> None:
    names = [spec.name for spec in specs]
    if set(names) != set(example):
        raise UsageError(f"example inputs are {sorted(example)}, but the model takes {sorted(names)}")
    for spec in specs:
        array, shape = example[spec.name], shape_at(spec, traced)
        if array.shape != shape or array.dtype != numpy_dtype(spec.dtype):
            expected = f"{spec.dtype}[{', '.join(map(str, shape))}]"
            raise UsageError(
                f"example input '{spec.name}' is {describe(array)}, expected {expected} ({spec})"
            )
