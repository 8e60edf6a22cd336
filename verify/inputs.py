"""The inputs of a comparison: the example, then the same kind of values at other sizes, then other kinds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.known import NOTHING, Known
from moe_export.verify.price import BUDGET, MOST_OF_ONE, Price, flat_price
from moe_export.verify.regimes import NORMAL, PADDED, REGIMES, Regime, one_row, padded
from moe_export.verify.sizes import shape_at, sizes_to_try
from moe_export.verify.specs import Array, DimRange, TensorSpec, describe, is_float, numpy_dtype

EXAMPLE = "example"
RESAMPLED = "new values"


# A dimension's maximum may be a whole engine's; beyond so many elements in all a size is left out.
_MOST_ELEMENTS = 2**22
_FIRST_SIZES = 3  # so many sizes come before the regimes


class MadeOnce(Mapping[str, Array]):
    """Read-only arrays by name, each made when it is first looked at.

    Args:
        makers: What makes each.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Array]]) -> None:
        self._makers = makers
        self._made: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._made:
            array = self._makers[name]()
            array.setflags(write=False)
            self._made[name] = array
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True, eq=False)
class Case:
    """One set of inputs.

    Args:
        label: What reports call it: "example", "new values", its sizes ("batch=1 seq=15"), or its regime. With
            `seed` it says exactly which inputs these are.
        seed: The seed of its values.
        sizes: The dynamic dimensions' sizes, by name; empty where nothing is dynamic.
        inputs: Read-only arrays, by input name.
        reserve: Only worth running if the reference refused most of the other sizes.
        regime: The kind of values (see `regimes`).
    """

    label: str
    seed: int
    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    reserve: bool = False
    regime: str = NORMAL


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

    Which cases there are is decided by the arguments alone; their arrays are made when they are first looked at.

    New floats are normal with the mean and deviation of the example's (and stay non-negative where it is);
    integers, bools and floats that are marks rather than measurements are drawn from the example's own
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
        known: What is known of the two sides: what cases cost.

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
    maker = _Maker(specs, {name: np.array(array) for name, array in example.items()}, seed)
    asked = [traced | dict(sizes) for sizes in at]
    return _affordable(
        _cases(maker, dims, traced, thorough, seeds, asked),
        known.price or flat_price(maker.elements),
        paid=thorough or seeds > 1,
    )


def _affordable(planned: Iterator[tuple[Case, bool]], price: Price, *, paid: bool) -> Iterator[Case]:
    """The cases that must be, and of the others, in their order, as many as the budget has room for."""
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
    """What makes an ordinary case of any sizes."""
    maker = _Maker(specs, {name: np.array(array) for name, array in example.items()}, seed)
    return lambda sizes: maker.make(_label(sizes), sizes)


def _cases(
    maker: _Maker,
    dims: Sequence[DimRange],
    traced: dict[str, int],
    thorough: bool,
    seeds: int,
    at: Sequence[dict[str, int]],
) -> Iterator[tuple[Case, bool]]:
    """Every case, in the order of what they find, and whether it must be run whatever it costs."""
    yield maker.given(traced), True
    yield maker.make(RESAMPLED, traced), True
    yield from ((maker.make(_label(sizes), sizes), True) for sizes in at)
    others = [(sizes, reserve) for sizes, reserve in sizes_to_try(dims) if maker.can_make(sizes)]
    for sizes, reserve in others[:_FIRST_SIZES]:
        yield maker.make(_label(sizes), sizes, reserve=reserve), True
    for sizes in [traced, *(sizes for sizes, _ in others[:2] if thorough)]:
        suffix = "" if sizes == traced else _label(sizes)
        yield from ((case, True) for case in maker.regimes(sizes, thorough, suffix))
    for more in range(1, seeds):
        other = _Maker(maker.specs, maker.example, maker.seed + more)
        yield other.make(RESAMPLED, traced), True
        yield from ((case, True) for case in other.regimes(traced, thorough, ""))
    for sizes, reserve in others[_FIRST_SIZES:]:
        yield maker.make(_label(sizes), sizes, reserve=reserve), reserve


def _label(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes the cases of one seed."""

    specs: Sequence[TensorSpec]
    example: Mapping[str, Array]
    seed: int

    def elements(self, sizes: Mapping[str, int]) -> int:
        """Of all inputs at these sizes."""
        return sum(math.prod(shape_at(spec, sizes)) for spec in self.specs)

    def can_make(self, sizes: Mapping[str, int]) -> bool:
        shapes = [shape_at(spec, sizes) for spec in self.specs]
        fits = self.elements(sizes) <= _MOST_ELEMENTS
        return fits and all(size >= 0 for shape in shapes for size in shape)

    def given(self, sizes: dict[str, int]) -> Case:
        """The example itself."""
        return self._case(EXAMPLE, sizes, lambda spec: np.array(self.example[spec.name]))

    def make(self, label: str, sizes: dict[str, int], *, reserve: bool = False) -> Case:
        return self._case(label, sizes, lambda spec: self._ordinary(label, spec, sizes), reserve=reserve)

    def _case(
        self,
        label: str,
        sizes: dict[str, int],
        make: Callable[[TensorSpec], Array],
        *,
        reserve: bool = False,
        regime: str = NORMAL,
    ) -> Case:
        """A case whose arrays are made when they are looked at."""
        makers = {spec.name: partial(make, spec) for spec in self.specs}
        return Case(label, self.seed, sizes, MadeOnce(makers), reserve, regime)

    def regimes(self, sizes: dict[str, int], thorough: bool, suffix: str) -> Iterator[Case]:
        """A case for each regime that some input can follow."""
        floats = [name for name, array in self.example.items() if _is_measured(array)]
        ids = [name for name, array in self.example.items() if array.dtype.kind in "iu"]
        for regime in REGIMES:
            follows = floats + (ids if regime.change is one_row else [])
            if follows and (thorough or regime.always):
                label = f"{regime.name}, {suffix}" if suffix else regime.name
                yield self._case(
                    label,
                    sizes,
                    partial(self._followed, label, sizes, regime, frozenset(follows)),
                    regime=regime.name,
                )
        yield from self._padded(sizes, suffix)

    def _followed(
        self, label: str, sizes: dict[str, int], regime: Regime, follows: frozenset[str], spec: TensorSpec
    ) -> Array:
        if spec.name in follows:
            return self._changed(label, spec, sizes, regime)
        return self._ordinary(label, spec, sizes)

    def _padded(self, sizes: dict[str, int], suffix: str) -> Iterator[Case]:
        label = f"{PADDED}, {suffix}" if suffix else PADDED
        inputs, masks = {}, 0
        for spec in self.specs:
            values = self._ordinary(label, spec, sizes)
            ended = padded(values, self._generator(f"{label}/ends", spec))
            masks += ended is not None
            inputs[spec.name] = values if ended is None else ended
        if masks:
            yield self._case(label, sizes, lambda spec: inputs[spec.name], regime=PADDED)

    def _generator(self, label: str, spec: TensorSpec) -> np.random.Generator:
        # A generator a tensor: adding an input to a model leaves the values of the others as they were.
        return np.random.default_rng([self.seed, zlib.crc32(f"{label}/{spec.name}".encode())])

    def _ordinary(self, label: str, spec: TensorSpec, sizes: dict[str, int]) -> Array:
        return _sample(self._generator(label, spec), self.example[spec.name], shape_at(spec, sizes))

    def _changed(self, label: str, spec: TensorSpec, sizes: dict[str, int], regime: Regime) -> Array:
        values = self._ordinary(label, spec, sizes)
        if values.dtype.kind in "iu":
            return np.full_like(values, values.flat[0] if values.size else 0)  # one token: an id is a token
        changed = regime.change(values.astype(np.float64), self._generator(label, spec), values.dtype)
        if not (self.example[spec.name].astype(np.float64) < 0).any():
            changed = np.abs(changed)  # lengths, times: what is never negative
        with np.errstate(over="ignore"):
            return changed.astype(values.dtype)


def _sample(generator: np.random.Generator, example: Array, shape: tuple[int, ...]) -> Array:
    if example.size == 0:
        return np.zeros(shape, example.dtype)
    if not _is_measured(example):
        return generator.choice(example.reshape(-1), shape).reshape(shape)
    values = example.astype(np.float64)
    drawn = generator.normal(values.mean(), values.std(), shape)
    signed = drawn if (values < 0).any() else np.abs(drawn)
    return np.asarray(signed).astype(example.dtype)


def _is_measured(example: Array) -> bool:
    """Whether these are floats that measure something; marks (a mask of 0 and 1, of 0 and -inf) do not."""
    if not is_float(example.dtype):
        return False
    values = example.astype(np.float64)
    return bool(np.isfinite(values).all()) and not (values.size > 2 and np.unique(values).size <= 2)


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
