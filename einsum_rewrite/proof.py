"""The proof of one site: the new steps and the equation, computed apart, give the same integers.

The steps run exactly as they are written into the graph, on small integers, whose sums and products are exact.
The equation is evaluated by `brute_force`, which shares nothing with the planner: it indexes every operand by
every label, multiplies, and sums. Sizes are distinct primes (so that no two axes can be mistaken for one
another), then others, then 1 and 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.notation import ELLIPSIS
from moe_export.einsum_rewrite.plan import Plan
from moe_export.errors import EquationError, MoeExportError

Array = npt.NDArray[np.int64]
Compute = Callable[[Plan, Sequence[Array]], Any]

LARGEST_SPACE = 8_000
"""How many combinations of indices one evaluation may have."""

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23)

_POOL: Array = np.random.default_rng(0).integers(-3, 4, 2 * LARGEST_SPACE)

KNOWN = 2
"""What stands for a known size in the key of a proof: which number it is changes no step."""


class ProofError(MoeExportError):
    """A rewritten einsum does not compute what it should (exit code 1): a defect of this tool."""

    exit_code = 1


@dataclass(frozen=True)
class Proof:
    """The evidence for one plan.

    Attributes:
        equation: What was computed.
        form: In which form: ONNX operators of an opset, or torch operators.
        sizes: The sizes of the labels in each trial.
        numbers: How many numbers were compared, all equal.
    """

    equation: str
    form: str
    sizes: tuple[tuple[tuple[str, int], ...], ...]
    numbers: int

    def __str__(self) -> str:
        trials = "; ".join(" ".join(f"{label}={size}" for label, size in trial) for trial in self.sizes)
        return f"{self.equation!r} as {self.form}: {self.numbers:,} numbers equal, at {trials or 'no sizes'}"


def prove_onnx(plan: Plan, opset: int, where: str) -> Proof:
    """Prove a plan as it is written into ONNX.

    Args:
        plan: What was planned.
        opset: The opset that it is written for.
        where: The site, for the error.

    Raises:
        ProofError: The results differ, or the steps cannot be run.
    """
    try:
        return _prove_onnx(_pattern(plan), min(opset, 15))
    except ProofError as error:
        raise ProofError(error.what, where=where, hint=error.hint) from error


def prove_torch(plan: Plan, where: str) -> Proof:
    """Prove a plan as it is run with torch operators; otherwise like `prove_onnx`."""
    try:
        return _prove_torch(_pattern(plan))
    except ProofError as error:
        raise ProofError(error.what, where=where, hint=error.hint) from error


@lru_cache(maxsize=4096)
def _prove_onnx(pattern: Plan, opset: int) -> Proof:
    from moe_export.einsum_rewrite.onnx_numpy import NumpyEngine
    from moe_export.einsum_rewrite.onnx_ops import run

    return prove(
        pattern,
        lambda plan, arrays: run(plan, arrays, NumpyEngine(opset)),
        f"ONNX operators (opset {opset}{' and newer' if opset == 15 else ''})",
        # Before opset 14 a Reshape cannot say 0, so sizes that are looked up must not be 0.
        empty=opset >= 14,
    )


@lru_cache(maxsize=4096)
def _prove_torch(pattern: Plan) -> Proof:
    import torch

    from moe_export.einsum_rewrite.torch_ops import run

    def compute(plan: Plan, arrays: Sequence[Array]) -> Any:
        return run(plan, [torch.from_numpy(array) for array in arrays]).numpy()

    return prove(pattern, compute, "torch operators")


def prove(plan: Plan, compute: Compute, form: str, *, empty: bool = True) -> Proof:
    """Compare `compute` with the brute force, over several sizes.

    Args:
        plan: The plan; its known sizes are replaced by those of each trial, unknown ones stay unknown.
        compute: Runs a plan on arrays.
        form: What `compute` stands for.
        empty: Whether sizes of 0 are tried too.

    Raises:
        ProofError: As `prove_onnx`.
    """
    trials, numbers = [], 0
    for sizes in _trials(plan, empty):
        known: tuple[tuple[str, Size], ...] = tuple(
            (label, sizes[label] if isinstance(size, int) else size) for label, size in plan.label_sizes
        )
        shapes = [tuple(sizes[axis[0]] if axis else 1 for axis in layout) for layout in plan.operands]
        arrays = [_integers(shape, seed) for seed, shape in enumerate(shapes)]
        expected = brute_force(plan.equation, arrays)
        try:
            found = np.asarray(compute(replace(plan, label_sizes=known), arrays))
        except EquationError:
            raise  # what cannot be expressed is refused, not disproved
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
            raise _failed(plan, form, sizes, f"cannot be run: {error}") from error
        if found.shape != expected.shape or not np.array_equal(found, expected):
            raise _failed(plan, form, sizes, "computes other numbers")
        trials.append(tuple(sizes.items()))
        numbers += expected.size
    return Proof(plan.equation.text, form, tuple(trials), numbers)


def brute_force(equation: Equation, arrays: Sequence[Array]) -> Array:
    """Evaluate an equation over the whole space of its labels.

    A label that is 1 in one operand and longer in another is broadcast, as torch has it.
    """
    terms, output = _spelled(equation, [array.ndim for array in arrays])
    sizes: dict[str, int] = {}
    for labels, array in zip(terms, arrays, strict=True):
        for label, size in zip(labels, array.shape, strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = size
    order = [*output, *(label for label in sizes if label not in output)]
    grid = dict(zip(order, np.ogrid[tuple(slice(sizes[label]) for label in order)], strict=True))
    product = np.ones([sizes[label] for label in order], dtype=np.int64)
    for labels, array in zip(terms, arrays, strict=True):
        index = tuple(
            grid[label] if size != 1 else np.zeros_like(grid[label][:1])
            for label, size in zip(labels, array.shape, strict=True)
        )
        product = product * array[index]
    total: Array = np.asarray(product.sum(axis=tuple(range(len(output), len(order)))))
    return total


def _spelled(equation: Equation, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The labels with every ellipsis spelled out, aligned from the right."""
    dots = [
        rank - sum(x != ELLIPSIS for x in term) for term, rank in zip(equation.inputs, ranks, strict=True)
    ]
    widest = max(dots, default=0)

    def spell(term: Sequence[str], count: int) -> list[str]:
        names = [f"<{i}>" for i in range(widest - count, widest)]
        return [name for label in term for name in (names if label == ELLIPSIS else [label])]

    terms = [spell(term, count) for term, count in zip(equation.inputs, dots, strict=True)]
    return terms, spell(equation.output, widest)


def _pattern(plan: Plan) -> Plan:
    """The plan without the numbers that its steps do not depend on."""
    sizes: tuple[tuple[str, Size], ...] = tuple(
        (label, (KNOWN if size else 0) if isinstance(size, int) else None) for label, size in plan.label_sizes
    )
    return replace(plan, label_sizes=sizes)


def _trials(plan: Plan, empty: bool) -> Iterator[dict[str, int]]:
    """Sizes for every label; a size that is known to be 0 stays 0."""
    labels = list(plan.sizes)
    always = {label for label, size in plan.sizes.items() if size == 0}
    kept = [label for label in labels if label in plan.output]
    summed = [label for label in labels if label not in plan.output]
    sizes = _sizes(len(labels))
    first = dict(zip(labels, sizes, strict=True))
    trials = [first, dict(zip(labels, reversed(sizes), strict=True))]
    if labels:
        trials += [{**first, **dict.fromkeys(labels[start::2], 1)} for start in (0, 1)]
        trials += [{**first, group[0]: 0} for group in (kept, summed) if group and empty]
    unique = {tuple({**trial, **dict.fromkeys(always, 0)}.items()): None for trial in trials}
    return (dict(items) for items in unique)


def _sizes(count: int) -> list[int]:
    """As many different primes as the space of all labels has room for; 1 where it has no more room at all."""
    for different in range(min(count, len(PRIMES)), 1, -1):
        sizes = [PRIMES[i % different] for i in range(count)]
        if math.prod(sizes) <= LARGEST_SPACE:
            return sizes
    room = int(math.log2(LARGEST_SPACE))
    return [2 if i < room else 1 for i in range(count)]


def _integers(shape: tuple[int, ...], seed: int) -> Array:
    """Small integers without a pattern that two axes could share."""
    return np.resize(_POOL[61 * seed % LARGEST_SPACE :], shape)


def _failed(plan: Plan, form: str, sizes: dict[str, int], what: str) -> ProofError:
    at = ", ".join(f"{label}={size}" for label, size in sizes.items())
    return ProofError(
        f"{plan.equation.text!r} as {form} ({plan.summary}) {what}, at {at}",
        hint="this is a defect of moe-export: please report the equation and the sizes",
    )
