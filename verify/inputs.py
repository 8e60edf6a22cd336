"""The inputs of a comparison: the example as it is, then the same kind of values at other sizes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.sizes import shape_at, sizes_to_try
from moe_export.verify.specs import Array, DimRange, TensorSpec, describe, is_float, numpy_dtype

EXAMPLE = "example"
RESAMPLED = "new values"


@dataclass(frozen=True, eq=False)
class Case:
    """One set of inputs.

    Args:
        label: What reports call it: "example", "new values", or its sizes ("batch=1 seq=15"). With `seed` it
            says exactly which inputs these are.
        seed: The seed that was given to `cases`.
        sizes: The dynamic dimensions' sizes, by name; empty where nothing is dynamic.
        inputs: Read-only arrays, by input name.
        reserve: Only worth running if the reference refused most of the other sizes.
    """

    label: str
    seed: int
    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    reserve: bool = False


def cases(
    specs: Sequence[TensorSpec], dims: Sequence[DimRange], example: Mapping[str, Array], seed: int = 0
) -> Iterator[Case]:
    """Make cases, lazily: the example itself, new values at its sizes, then other sizes (see `sizes`).

    New floats are normal with the mean and deviation of the example's (and stay non-negative where it is);
    integers, bools and floats that are marks rather than measurements are drawn from the example's own
    values. So token ids stay in range, a mask of ones stays one, and -inf stays a mask's -inf.

    Args:
        specs: The inputs.
        dims: A range for every name that the specs' shapes mention.
        example: One array a spec, of its dtype and its traced shape.
        seed: Same seed, same arrays, on every machine; each case is independent of those before it.

    Raises:
        UsageError: Example and specs do not fit, or a shape names an unknown dimension.
    """
    traced = {dim.name: dim.traced for dim in dims}
    _check(specs, traced, example)  # here, not at the first next(): the mistake is in this call
    return _cases(specs, dims, traced, example, seed)


def _cases(
    specs: Sequence[TensorSpec],
    dims: Sequence[DimRange],
    traced: dict[str, int],
    example: Mapping[str, Array],
    seed: int,
) -> Iterator[Case]:
    yield Case(EXAMPLE, seed, traced, _frozen({spec.name: np.array(example[spec.name]) for spec in specs}))
    yield _sampled(RESAMPLED, seed, traced, specs, example)
    for sizes, reserve in sizes_to_try(dims):
        if all(size >= 0 for spec in specs for size in shape_at(spec, sizes)):
            label = " ".join(f"{name}={size}" for name, size in sizes.items())
            yield _sampled(label, seed, sizes, specs, example, reserve=reserve)


def _sampled(
    label: str,
    seed: int,
    sizes: dict[str, int],
    specs: Sequence[TensorSpec],
    example: Mapping[str, Array],
    *,
    reserve: bool = False,
) -> Case:
    inputs = {}
    for spec in specs:
        # A generator a tensor: adding an input to a model leaves the values of the others as they were.
        generator = np.random.default_rng([seed, zlib.crc32(f"{label}/{spec.name}".encode())])
        inputs[spec.name] = _sample(generator, example[spec.name], shape_at(spec, sizes))
    return Case(label, seed, sizes, _frozen(inputs), reserve)


def _sample(generator: np.random.Generator, example: Array, shape: tuple[int, ...]) -> Array:
    if example.size == 0:
        return np.zeros(shape, example.dtype)
    if not is_float(example.dtype) or _is_marks(example):
        return generator.choice(example.reshape(-1), shape).reshape(shape)
    values = example.astype(np.float64)
    drawn = generator.normal(values.mean(), values.std(), shape)
    signed = drawn if (values < 0).any() else np.abs(drawn)
    return np.asarray(signed).astype(example.dtype)


def _is_marks(example: Array) -> bool:
    """Whether floats are marks (a mask of 0 and 1, of 0 and -inf) rather than measurements."""
    values = example.astype(np.float64)
    return not np.isfinite(values).all() or (values.size > 2 and np.unique(values).size <= 2)


def _frozen(arrays: dict[str, Array]) -> dict[str, Array]:
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


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
