"""Make the arrays of cases: the same seed, label and input name give the same array on every machine."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from moe_export.verify.inputs.known import NOTHING, Known
from moe_export.verify.inputs.meaning import Meaning, Range
from moe_export.verify.inputs.regimes import (
    EVERY_ID,
    LARGE,
    MASKS,
    NEGATIVE,
    NORMAL,
    REGIMES,
    SIGNED,
    Regime,
    mask_values,
    masked,
    one_row,
)
from moe_export.verify.inputs.sizes import shape_at
from moe_export.verify.specs import Array, DimRange, TensorSpec, is_float

EXAMPLE = "example"
_MOST_ELEMENTS = 2**22  # a maximum may be a whole engine's; beyond so many elements in all a size is left out
_PARTS = 8  # cases that a table's ids are spread over, where its dimensions can grow so far
_MOST_PARTS = 32
_ORDINARY = Meaning()


class MadeOnce(Mapping[str, Array]):
    """Read-only arrays by name, each created when it is first accessed.

    Args:
        makers: Creates each.
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
        label: What reports call it: "example", "new values", its sizes ("batch=1 sequence=15"), or its regime. With
            `seed` it says exactly which inputs these are.
        seed: The seed of its values.
        sizes: The dynamic dimensions' sizes, by name; empty where nothing is dynamic.
        inputs: Read-only arrays, by input name.
        reserve: Worth running only if the reference rejected most of the other sizes.
        regime: The kind of values (see `regimes`).
    """

    label: str
    seed: int
    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    reserve: bool = False
    regime: str = NORMAL


def label_of(sizes: Mapping[str, int]) -> str:
    """`batch=1 sequence=15`."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes the cases of one seed."""

    specs: Sequence[TensorSpec]
    example: Mapping[str, Array]
    seed: int
    known: Known = field(default=NOTHING)

    def elements(self, sizes: Mapping[str, int]) -> int:
        """The number of elements of all inputs at these sizes."""
        return sum(math.prod(shape_at(spec, sizes)) for spec in self.specs)

    def can_make(self, sizes: Mapping[str, int]) -> bool:
        """Whether the inputs have these sizes, and are not too large."""
        shapes = [shape_at(spec, sizes) for spec in self.specs]
        fits = self.elements(sizes) <= _MOST_ELEMENTS
        return fits and all(size >= 0 for shape in shapes for size in shape)

    def given(self, sizes: Mapping[str, int]) -> Case:
        """The example itself."""
        makers = {spec.name: partial(np.array, self.example[spec.name]) for spec in self.specs}
        return Case(EXAMPLE, self.seed, dict(sizes), MadeOnce(makers))

    def make(
        self, label: str, sizes: Mapping[str, int], *, reserve: bool = False, regime: str = NORMAL
    ) -> Case:
        """Ordinary values."""
        return self._case(
            label, sizes, lambda spec: self._ordinary(label, spec, sizes), reserve=reserve, regime=regime
        )

    def regimes(self, sizes: Mapping[str, int], thorough: bool, suffix: str) -> Iterator[Case]:
        """A case for each regime that applies to some input."""
        for regime in REGIMES:
            if thorough or regime.always:
                yield from self._if_any(regime.name, suffix, sizes, partial(self._followed, regime))
        yield from self._if_any(SIGNED, suffix, sizes, self._signed)
        for name in MASKS:
            yield from self._if_any(name, suffix, sizes, partial(self._marked, name))
        for name in (NEGATIVE, LARGE):
            yield from self._if_any(name, suffix, sizes, partial(self._integers, name))

    def every_id(self, dims: Sequence[DimRange]) -> Iterator[Case]:
        """Cases whose ids run through their whole tables: at the traced sizes, or larger ones that take fewer cases."""
        rows = {
            spec.name: table.high - table.low + 1
            for spec in self.specs
            if (table := self._meaning(spec).table) is not None and table.dim is None
        }
        if not rows:
            return
        sizes = {dim.name: dim.traced for dim in dims}
        for dim in reversed(dims):
            while self._parts(rows, sizes) > _PARTS:
                larger = sizes | {dim.name: dim.clamp(2 * sizes[dim.name])}
                if (
                    larger == sizes
                    or not self.can_make(larger)
                    or self._parts(rows, larger) == self._parts(rows, sizes)
                ):
                    break
                sizes = larger
        parts = self._parts(rows, sizes)
        for part in range(min(parts, _MOST_PARTS)):
            label = f"{EVERY_ID}, {part + 1} of {parts}" if parts > 1 else EVERY_ID
            yield self._case(label, sizes, partial(self._in_order, rows, part, sizes), regime=EVERY_ID)

    def _parts(self, rows: Mapping[str, int], sizes: Mapping[str, int]) -> int:
        shapes = {spec.name: shape_at(spec, sizes) for spec in self.specs if spec.name in rows}
        return max(-(-rows[name] // max(math.prod(shape), 1)) for name, shape in shapes.items())

    def _in_order(
        self, rows: Mapping[str, int], part: int, sizes: Mapping[str, int], spec: TensorSpec
    ) -> Array:
        if spec.name not in rows:
            return self._ordinary(f"{EVERY_ID}/{part}", spec, sizes)
        shape, table = shape_at(spec, sizes), self._meaning(spec).table
        count = math.prod(shape)
        places = (part * count + np.arange(count)) % rows[spec.name]
        return (
            ((0 if table is None else table.low) + places)
            .reshape(shape)
            .astype(self.example[spec.name].dtype)
        )

    def _if_any(
        self,
        name: str,
        suffix: str,
        sizes: Mapping[str, int],
        change: Callable[[str, TensorSpec, Mapping[str, int]], Array | None],
    ) -> Iterator[Case]:
        """The case of a regime, if it applies to some input."""
        label = f"{name}, {suffix}" if suffix else name
        changed = {spec.name: made for spec in self.specs if (made := change(label, spec, sizes)) is not None}
        if changed:
            yield self._case(
                label,
                sizes,
                lambda spec: (
                    changed[spec.name] if spec.name in changed else self._ordinary(label, spec, sizes)
                ),
                regime=name,
            )

    def _case(
        self,
        label: str,
        sizes: Mapping[str, int],
        make: Callable[[TensorSpec], Array],
        *,
        reserve: bool = False,
        regime: str = NORMAL,
    ) -> Case:
        """A case whose arrays are created when accessed."""
        makers = {spec.name: partial(self._within, make, spec) for spec in self.specs}
        return Case(label, self.seed, dict(sizes), MadeOnce(makers), reserve, regime)

    def _within(self, make: Callable[[TensorSpec], Array], spec: TensorSpec) -> Array:
        """An input's values, cut to those that it may have."""
        limits = self.known.limits.get(spec.name)
        return make(spec) if limits is None else np.clip(make(spec), *limits).astype(limits[0].dtype)

    def _meaning(self, spec: TensorSpec) -> Meaning:
        return self.known.meanings.get(spec.name, _ORDINARY)

    def _generator(self, label: str, spec: TensorSpec) -> np.random.Generator:
        # A generator a tensor: adding an input to a model leaves the values of the others as they were.
        return np.random.default_rng([self.seed, zlib.crc32(f"{label}/{spec.name}".encode())])

    def _ordinary(self, label: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        generator, example, shape = (
            self._generator(label, spec),
            self.example[spec.name],
            shape_at(spec, sizes),
        )
        within = self._meaning(spec).ordinary
        if within is not None:
            return _drawn(generator, example, shape, self._cut(spec, within, sizes))
        if spec.name in self.known.unfilled:
            return np.asarray(generator.standard_normal(shape)).astype(example.dtype)
        return _sample(generator, example, shape)

    def _cut(self, spec: TensorSpec, within: Range, sizes: Mapping[str, int]) -> Range:
        """The range, clipped to a table that is as long as a dimension."""
        table = self._meaning(spec).table
        if table is None or table.dim is None or within != (table.low, table.high):
            return within
        return table.low, max(table.low, table.high_at(sizes))

    def _followed(
        self, regime: Regime, label: str, spec: TensorSpec, sizes: Mapping[str, int]
    ) -> Array | None:
        example = self.example[spec.name]
        if example.dtype.kind in "iu" and regime.change is one_row:
            values = self._ordinary(label, spec, sizes)
            return np.full_like(values, values.flat[0] if values.size else 0)  # one token: an id is a token
        if not is_measured(example) and spec.name not in self.known.unfilled:
            return None
        values = self._ordinary(label, spec, sizes)
        changed = regime.change(values.astype(np.float64), self._generator(label, spec), values.dtype)
        if not (example.astype(np.float64) < 0).any() and spec.name not in self.known.unfilled:
            changed = np.abs(changed)  # lengths, times: what is never negative
        with np.errstate(over="ignore"):
            return changed.astype(values.dtype)

    def _signed(self, label: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Array | None:
        example = self.example[spec.name]
        if not is_float(example.dtype) or spec.name in self.known.unfilled:
            return None
        values = example.astype(np.float64)
        mask = mask_values(example)
        if (is_measured(example) and (values < 0).any()) or (mask is not None and mask[1]):
            return None  # of both signs as it is, or a mask of -inf
        drawn = self._generator(label, spec).standard_normal(shape_at(spec, sizes))
        return np.asarray(drawn).astype(example.dtype)

    def _marked(self, name: str, label: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Array | None:
        if self._meaning(spec) != _ORDINARY:
            return None  # ids that happen to be 0 and 1
        example = self.example[spec.name]
        mask = mask_values(example)
        if mask is None:
            return None
        return masked(
            name, shape_at(spec, sizes), mask, self._generator(f"{label}/ends", spec), example.dtype
        )

    def _integers(self, name: str, label: str, spec: TensorSpec, sizes: Mapping[str, int]) -> Array | None:
        meaning, example, shape = self._meaning(spec), self.example[spec.name], shape_at(spec, sizes)
        generator = self._generator(label, spec)
        if name == NEGATIVE:
            return None if meaning.negative is None else _drawn(generator, example, shape, meaning.negative)
        if meaning.large is None:
            return None
        sizes_of = np.exp2(generator.uniform(0, math.log2(meaning.large), shape))
        signs = generator.choice([-1, 1], shape) if meaning.negative else 1
        return np.asarray(np.floor(sizes_of) * signs).astype(np.int64).astype(example.dtype)


def _drawn(generator: np.random.Generator, example: Array, shape: tuple[int, ...], within: Range) -> Array:
    return np.asarray(generator.integers(within[0], within[1] + 1, shape)).astype(example.dtype)


def _sample(generator: np.random.Generator, example: Array, shape: tuple[int, ...]) -> Array:
    if example.size == 0:
        return np.zeros(shape, example.dtype)
    if not is_measured(example):
        return generator.choice(example.reshape(-1), shape).reshape(shape)
    values = example.astype(np.float64)
    drawn = generator.normal(values.mean(), values.std(), shape)
    signed = drawn if (values < 0).any() else np.abs(drawn)
    return np.asarray(signed).astype(example.dtype)


def is_measured(example: Array) -> bool:
    """Whether these are floats that measure something; masks (of 0 and 1, of 0 and -inf) do not."""
    if not is_float(example.dtype):
        return False
    values = example.astype(np.float64)
    return bool(np.isfinite(values).all()) and not (values.size > 2 and np.unique(values).size <= 2)
