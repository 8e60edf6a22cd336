"""What a float64 run shows about outputs that differ: which one is wrong, and how exact either has to be.

Values of a stress regime (16 times the ordinary, the ends of a dtype) make float32 lose digits, or overflow, on both
sides. There the reference is no truth. So both are held against a float64 run of the original:

    E = the largest |reference - float64|, what the reference itself loses in this case; it may be lucky, so it also
        runs on inputs whose last digits are changed, and the worst run counts
    a candidate is right where |candidate - float64| <= atol + rtol * |float64| + 4 E
    where the reference is NaN or Inf, the candidate is so too, or is about right by float64

In ordinary cases the error of each element is held against that of its own row (see `error_model`).

A graph in half precision is held against the float32 model, whose outputs say nothing of what half precision costs:
logits of 20 behind many layers lose more than a few roundings of 1. So the model runs with its weights rounded, and
nothing else, and

    s = 1.48 * the median of |reference with rounded weights - reference|, a standard deviation that a token which goes
        to another expert does not move
    a candidate is right where |candidate - reference| <= atol + rtol * |reference| + 16 s

unless s itself is more than 2 roundings of the largest value: such a model is too sensitive to tell. 16 s are 4 times
what the largest of some thousand elements is off: weights are rounded once, and values at each operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from moe_export.verify.inputs.cases import Case
from moe_export.verify.inputs.regimes import largest_of
from moe_export.verify.judging.error_model import ANOTHER_WAY, stand
from moe_export.verify.judging.judge import Judgement, judge
from moe_export.verify.judging.tolerance import Margin
from moe_export.verify.specs import Array, is_float, numpy_dtype

_ROOM = 4.0
NEAR_RUNS = 4
"""Runs of the reference beside the one that is compared: one may round luckily, in a row or at all."""
_ROUNDINGS, _DEVIATIONS = 2.0, 16.0
NO_TRUTH = "values at the limits of the dtype, and no float64 run to tell what is right"
OTHER_WAY = "values at the limits of the dtype, and the float64 run takes another way"


def weigh(
    found: Judgement,
    reference: Array,
    candidate: Array,
    truth: Mapping[str, Array] | None,
    *,
    stress: bool,
    nearby: Sequence[Mapping[str, Array]] = (),
    strict: bool = False,
) -> Judgement:
    """The judgement of an output that differs, given a float64 run.

    Args:
        found: What was judged without it; not equal.
        reference: The output, floats.
        candidate: Likewise, of the same form.
        truth: The outputs of the float64 run; None if there is none.
        stress: Whether the case is one in which float32 may be off.
        nearby: The reference's outputs for nearly the same inputs.
        strict: Whether the tolerance was chosen by hand, so that ordinary values have to lie within it.
    """
    true, margin = None if truth is None else truth.get(found.output), found.margin
    if not is_float(reference.dtype) or margin is None or found.kind != "float":
        return found
    if true is None or true.shape != reference.shape:
        return _excused(found, NO_TRUTH) if stress else found
    ref, ours, wide = (array.astype(np.float64) for array in (reference, candidate, true))
    off, our_off = _distance(ref, wide), _distance(ours, wide)
    found = replace(found, reference_off=off, candidate_off=our_off)
    if not stress:
        return found if strict else stand(found, reference, candidate, true, nearby)
    true = wide
    others = [outputs[found.output].astype(np.float64) for outputs in nearby if found.output in outputs]
    off = max([off, *(_distance(other, true) for other in others if other.shape == true.shape)])
    if off > ANOTHER_WAY * _largest(true) + margin.atol:
        return _excused(found, OTHER_WAY)
    return found if _wrong(ref, ours, true, off, margin, reference.dtype) else _excused(found, None)


def judge_rounded(
    found: Judgement, reference: Array, candidate: Array, rounded: Array | None, narrow: str
) -> Judgement:
    """The judgement of an output that differs, with room for the effect of rounding the weights.

    Args:
        found: What was judged without it; not equal.
        reference: The output, floats.
        candidate: Likewise.
        rounded: The reference's output with weights rounded to `narrow`; None if it has none.
        narrow: The narrowest type that the candidate computes in.
    """
    if rounded is None or found.margin is None or rounded.shape != reference.shape:
        return found
    ref = reference.astype(np.float64)
    moved = _deviation(rounded.astype(np.float64) - ref)
    epsilon = float(ml_dtypes.finfo(numpy_dtype(narrow)).eps)  # type: ignore[no-untyped-call]
    if moved > _ROUNDINGS * epsilon * _largest(ref):
        return found
    margin = Margin(found.margin.rtol, found.margin.atol + _DEVIATIONS * moved)
    return replace(judge(found.output, reference, candidate, margin), rounding=moved)


def last_digits(case: Case, narrow: str = "float32") -> Iterator[Case]:
    """The same inputs, each float changed by one rounding of its type, or of `narrow` if that is coarser."""
    for run in range(NEAR_RUNS):
        generator = np.random.default_rng([case.seed, run])
        changed = {
            name: _rounded_away(array, generator, narrow) if is_float(array.dtype) else array
            for name, array in case.inputs.items()
        }
        yield replace(case, inputs=changed)


def look_ups(case: Case, narrow: str = "float32") -> Iterator[tuple[int, float]]:
    """For inputs without a float: seeds and the step by which what they look up is changed (`run_under`)."""
    step = float(ml_dtypes.finfo(numpy_dtype(narrow)).eps)  # type: ignore[no-untyped-call]
    for run in range(NEAR_RUNS):
        yield NEAR_RUNS * case.seed + run, step


def _rounded_away(array: Array, generator: np.random.Generator, narrow: str) -> Array:
    kinds: list[Any] = [array.dtype, numpy_dtype(narrow)]
    step = max(float(ml_dtypes.finfo(kind).eps) for kind in kinds)  # type: ignore[no-untyped-call]
    factors = 1 + step * generator.choice([-1.0, 1.0], array.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((array.astype(np.float64) * factors).astype(array.dtype))


def _deviation(differences: Array) -> float:
    """The standard deviation of normal numbers with this median of their sizes."""
    known = np.abs(differences[np.isfinite(differences)])
    return 1.4826 * float(np.median(known)) if known.size else 0.0


def _distance(values: Array, true: Array) -> float:
    both = np.isfinite(values) & np.isfinite(true)
    return float(np.abs(values[both] - true[both]).max()) if both.any() else 0.0


def _wrong(ref: Array, ours: Array, true: Array, off: float, margin: Margin, dtype: np.dtype[Any]) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = margin.atol + margin.rtol * np.abs(true) + _ROOM * off
        near = np.isfinite(ours) & (np.abs(ours - true) <= allowed)
        overflows = ~(np.abs(true) < largest_of(dtype) / 16)
        # Where the reference is lost it cannot say how much float32 loses here: the right number, roughly, will do.
        better = ~np.isfinite(ref) & (np.abs(ours - true) <= ANOTHER_WAY * _largest(true))
    lost = ~np.isfinite(ours) & (~np.isfinite(ref) | overflows)
    return not bool((near | lost | better).all())


def _largest(values: Array) -> float:
    known = np.abs(values[np.isfinite(values)])
    return float(known.max()) if known.size else 0.0


def _excused(found: Judgement, undecided: str | None) -> Judgement:
    return replace(found, reason=None, bad=0, odd=0, front=(), undecided=undecided)
