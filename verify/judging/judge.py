"""Judge one output: are two arrays equal, by the rules for their kind?

Name, dtype and shape first (no broadcasting: (3, 1) is not (1, 3)). Then floats within a margin, with NaN and
Inf in the same places; everything else exactly. The arithmetic of the judgement is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from moe_export.verify.judging.sketch import Decades, Front, decades_of, front_of
from moe_export.verify.judging.tolerance import Margin
from moe_export.verify.specs import Array, describe, is_float

Scalar: TypeAlias = "float | int | bool | str"


@dataclass(frozen=True)
class Worst:
    """The element furthest beyond its tolerance; in equal arrays, the one that differs most."""

    index: tuple[int, ...]
    candidate: Scalar
    reference: Scalar


@dataclass(frozen=True)
class Standing:
    """How an output beyond its tolerance compares with a float64 run (see `error_model`).

    Args:
        own: The candidate's error, at the element where it is worst relative to the reference's.
        theirs: The reference's error in that row, as far as it excuses one.
        ratio: `own / theirs`.
        beyond: How many elements are beyond the tolerance.
        another_way: How far the reference is off in that row, where it is so far that this excuses nothing; else None.
    """

    own: float
    theirs: float
    ratio: float
    beyond: int
    another_way: float | None = None


Kind = Literal["float", "exact", "routing", "presence"]
"""How an output is compared: within a margin; exactly (integers and bools); as expert ids; not at all, as it is missing
or extra."""


@dataclass(frozen=True)
class Judgement:
    """The judgement of one output in one case.

    Args:
        output: Its name.
        kind: How it was compared (see `Kind`).
        dtype: The reference's dtype; the candidate's if the output is extra.
        reason: Why it is not equal; None if it is.
        max_abs: Largest |candidate - reference| where both are finite; NaN if nothing could be compared.
        max_rel: Largest difference relative to |reference|, where that is not 0.
        bad: How many elements are out of tolerance.
        total: How many elements there are.
        worst: The worst element; None if nothing could be compared.
        margin: The tolerance that held, for floats.
        nans: How many elements are NaN in the reference.
        flips: For expert ids: tokens that went to another expert in a tie.
        tokens: For expert ids: how many tokens there are.
        odd: Elements that are wrong at every tolerance: a NaN or Inf of one side only, an expert without a
            score to excuse it. All of them, where the form is wrong and nothing can be measured.
        front: The elements that decide at any tolerance (see `sketch`); for expert ids, the (score, gap) of
            the experts that moved.
        decades: How many differences lie in [10**n, 10**(n+1)), by n.
        reference_off: The reference's largest distance from a float64 run; NaN if there was none.
        candidate_off: The candidate's.
        undecided: Why this case can say nothing of the output, either way; None if it can.
        rounding: How far rounding the reference's weights to the candidate's type moves the output, where the
            margin has room for it; 0 where it has not.
        standing: For floats beyond the tolerance, what either side is off by; None where nobody asked.
    """

    output: str
    kind: Kind
    dtype: str
    reason: str | None
    max_abs: float = float("nan")
    max_rel: float = float("nan")
    bad: int = 0
    total: int = 0
    worst: Worst | None = None
    margin: Margin | None = None
    nans: int = 0
    flips: int = 0
    tokens: int = 0
    odd: int = 0
    front: Front = ()
    decades: Decades = ()
    reference_off: float = float("nan")
    candidate_off: float = float("nan")
    undecided: str | None = None
    rounding: float = 0.0
    standing: Standing | None = None

    @property
    def ok(self) -> bool:
        """Whether the output is equal."""
        return self.reason is None


LOST = "the reference is NaN"


def lost_of(array: Array) -> Array:
    """Where a float array is NaN."""
    if not is_float(array.dtype):
        return np.zeros(array.shape, bool)
    return np.isnan(array.astype(np.float64))


def without(array: Array, lost: Array) -> Array:
    """An array with 0 where the reference is NaN."""
    return np.where(lost, np.zeros((), array.dtype), array) if lost.any() else array


def judge(output: str, reference: Array | None, candidate: Array | None, margin: Margin) -> Judgement:
    """Judge one output.

    Args:
        output: Its name.
        reference: The expected array, of any shape and dtype; None if the reference has no such output.
        candidate: The actual array; None if it is missing.
        margin: Used for floats only.
    """
    if reference is None or candidate is None:
        return _presence(output, reference, candidate)
    if mismatch := form_mismatch(reference, candidate):
        return refused(output, reference, mismatch)
    if is_float(reference.dtype):
        return _floats(output, reference, candidate, margin)
    return _exact(output, reference, candidate)


def form_mismatch(reference: Array, candidate: Array) -> str | None:
    """How the dtypes or shapes differ, in words; None if they do not."""
    if reference.dtype != candidate.dtype:
        return f"dtype {candidate.dtype.name}, expected {reference.dtype.name}"
    if reference.shape != candidate.shape:
        return f"shape {list(candidate.shape)}, expected {list(reference.shape)}"
    return None


def refused(output: str, reference: Array, reason: str, kind: Kind | None = None) -> Judgement:
    """The judgement of an output that cannot be compared element by element: all of it is bad."""
    kind = kind or ("float" if is_float(reference.dtype) else "exact")
    size = reference.size
    nans = _nans(reference)
    return Judgement(
        output, kind, reference.dtype.name, reason, bad=size, total=size, nans=nans, odd=max(size, 1)
    )


def _presence(output: str, reference: Array | None, candidate: Array | None) -> Judgement:
    if reference is not None:
        return refused(output, reference, f"missing, expected {describe(reference)}", "presence")
    if candidate is not None:
        return refused(output, candidate, f"extra output {describe(candidate)}", "presence")
    return Judgement(output, "presence", "none", "neither side has this output")


def _exact(output: str, reference: Array, candidate: Array) -> Judgement:
    wrong = reference != candidate
    bad = int(wrong.sum())
    # Differences in float64 are for show: beyond 2**53 they round, while `wrong` stays exact.
    difference = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    return Judgement(
        output,
        "exact",
        reference.dtype.name,
        f"{bad} of {reference.size} elements differ" if bad else None,
        *_largest(difference, reference),
        bad,
        reference.size,
        _worst(reference, candidate, difference + wrong),
        odd=bad,
        decades=decades_of(difference),
    )


def _floats(output: str, reference: Array, candidate: Array, margin: Margin) -> Judgement:
    ref, ours = reference.astype(np.float64), candidate.astype(np.float64)
    finite = np.isfinite(ref) & np.isfinite(ours)
    same_pattern = finite | (ref == ours) | (np.isnan(ref) & np.isnan(ours))  # inf == inf, with its sign
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(finite, np.abs(ours - ref), np.nan)
        beyond = difference - (margin.atol + margin.rtol * np.abs(ref))  # NaN where not both are finite
    wrong = ~same_pattern | (beyond > 0)
    badness = np.where(same_pattern, beyond, np.inf) if wrong.any() else difference
    return Judgement(
        output,
        "float",
        reference.dtype.name,
        _float_reason(ref, ours, wrong, same_pattern, margin),
        *_largest(difference, reference),
        int(wrong.sum()),
        reference.size,
        _worst(reference, candidate, badness),
        margin,
        _nans(reference),
        odd=int((~same_pattern).sum()),
        front=front_of(np.abs(ref), difference),
        decades=decades_of(difference),
    )


def _float_reason(ref: Array, ours: Array, wrong: Array, same_pattern: Array, margin: Margin) -> str | None:
    if not wrong.any():
        return None
    nan_here = np.isnan(ours) & ~np.isnan(ref)
    if nan_here.any():
        count = "all" if nan_here.all() else str(int(nan_here.sum()))
        return f"{count} of {ref.size} elements are NaN, the reference's are not"
    if not same_pattern.all():
        return f"NaN or Inf in other places than the reference, {int((~same_pattern).sum())} of {ref.size}"
    return f"{int(wrong.sum())} of {ref.size} elements beyond {margin}"


def _worst(reference: Array, candidate: Array, badness: Array) -> Worst | None:
    if not reference.size:
        return None
    flat = int(np.argmax(np.nan_to_num(badness, nan=-np.inf)))  # NaN: nothing to measure, nothing wrong
    index = tuple(int(i) for i in np.unravel_index(flat, reference.shape))
    return Worst(index, _scalar(candidate[index]), _scalar(reference[index]))


def _largest(difference: Array, reference: Array) -> tuple[float, float]:
    """The largest absolute and relative difference; NaN if none could be measured, 0 of no elements."""
    if not difference.size:
        return 0.0, 0.0
    measured = ~np.isnan(difference)
    if not measured.any():
        return float("nan"), float("nan")
    scale = np.abs(reference.astype(np.float64))
    scaled = measured & (scale > 0)
    with np.errstate(over="ignore"):  # over a subnormal reference the quotient is inf, and rightly so
        relative = float((difference[scaled] / scale[scaled]).max()) if scaled.any() else 0.0
    return float(difference[measured].max()), relative


def _nans(array: Array) -> int:
    return int(np.isnan(array.astype(np.float64)).sum()) if is_float(array.dtype) else 0


def _scalar(value: object) -> Scalar:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value)  # type: ignore[arg-type]  # floats, those of ml_dtypes too
