"""Mutants of constants: weights, biases, tables."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import onnx

from moe_export.verify.mutants.mutant import Constants, Mutant, replace_constants
from moe_export.verify.specs import Array, is_float

STEP = 1e-3
_SMALL = 1e-3
"""A positive constant below this is an epsilon, which has mutants of its own."""


def weight_mutants(model: onnx.ModelProto, seed: int = 0) -> Iterator[Mutant]:
    """Mutants of every float constant that a node reads."""
    constants = Constants.of(model)
    floats = {
        name: array
        for name, array in constants.arrays.items()
        if is_float(array.dtype) and array.size and constants.readers[name] and not is_epsilon(array)
    }
    for name, array in floats.items():
        yield from _of_one(name, array, constants.reader(name), seed)
    yield from _swapped(floats, constants)
    yield from _stacked(floats, constants)
    yield from _numbered(floats, constants)


def is_epsilon(array: Array) -> bool:
    """Whether a constant is a small positive number that keeps something from being zero."""
    return array.size == 1 and is_float(array.dtype) and 0 < float(array.reshape(-1)[0]) < _SMALL


def _of_one(name: str, array: Array, reader: str, seed: int) -> Iterator[Mutant]:
    finite = np.flatnonzero(np.isfinite(array.astype(np.float64)))
    if not finite.size:
        return
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    at = np.unravel_index(int(generator.choice(finite)), array.shape)
    place = f"{name}{[int(index) for index in at]}"
    yield _changed("weight", reader, f"{place} off by {STEP:g}", name, _put(array, at, array[at] + STEP))
    yield _changed("NaN", reader, f"{place} is NaN", name, _put(array, at, np.nan))
    if array.ndim == 2 and array.shape[0] == array.shape[1] and not np.array_equal(array, array.T):
        yield _changed("transposed", reader, name, name, array.T)
    if array.ndim == 1 and array.size > 1 and np.unique(array).size > 1:
        yield _changed("broadcast", reader, f"{name}[0] for all of it", name, np.full_like(array, array[0]))


def _put(array: Array, at: tuple[np.intp, ...], value: object) -> Array:
    copy = array.copy()
    copy[at] = value
    return copy


def _changed(kind: str, reader: str, what: str, name: str, array: Array) -> Mutant:
    return Mutant(kind, reader, what, replace_constants({name: array.reshape(array.shape)}))


def _swapped(floats: dict[str, Array], constants: Constants) -> Iterator[Mutant]:
    """Two weights of one shape, read by operators of one kind, one after the other in the graph."""
    groups: dict[object, list[str]] = defaultdict(list)
    for name, array in floats.items():
        if array.size > 1:
            node, index = constants.readers[name][0]
            groups[(array.shape, array.dtype.name, node.op_type, index)].append(name)
    for names in groups.values():
        for first, second in pairwise(names):
            if not np.array_equal(floats[first], floats[second]):
                new = {first: floats[second], second: floats[first]}
                yield Mutant(
                    "swapped", constants.reader(first), f"{first} and {second}", replace_constants(new)
                )


def _stacked(floats: dict[str, Array], constants: Constants) -> Iterator[Mutant]:
    """The first two of the experts that are stacked in one weight."""
    for name, array in floats.items():
        if array.ndim == 3 and array.shape[0] > 1 and not np.array_equal(array[0], array[1]):
            other = array.copy()
            other[[0, 1]] = array[[1, 0]]
            what = f"{name}: the first and the second"
            yield _changed("experts swapped", constants.reader(name), what, name, other)


def _numbered(floats: dict[str, Array], constants: Constants) -> Iterator[Mutant]:
    """All weights of two modules that differ in a number alone: `experts.0.up`, `experts.1.up`, ..."""
    groups: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in floats:
        for match in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            groups[name[: match.start()]][int(match[0])][name[match.end() :]] = name
    for prefix, members in groups.items():
        numbers = sorted(members)
        for first, second in pairwise(numbers):
            mine, theirs = members[first], members[second]
            same = mine.keys() == theirs.keys() and all(
                floats[mine[rest]].shape == floats[theirs[rest]].shape for rest in mine
            )
            if same and any(not np.array_equal(floats[mine[rest]], floats[theirs[rest]]) for rest in mine):
                new = {mine[rest]: floats[theirs[rest]] for rest in mine}
                new |= {theirs[rest]: floats[mine[rest]] for rest in mine}
                reader = constants.reader(next(iter(mine.values())))
                what = f"{prefix}{first} and {prefix}{second}"
                yield Mutant("experts swapped", reader, what, replace_constants(new))
