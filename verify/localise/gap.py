"""The distance of a value from the reference's, in units of the error that rounding explains.

A value is measured against its own size, not against 1: an epsilon of 1e-6 that became 1e-5 is wrong by less than any
absolute tolerance, and by a factor of ten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_export.verify.judging.judge import form_mismatch
from moe_export.verify.judging.tolerance import DEFAULTS
from moe_export.verify.localise.level import Value
from moe_export.verify.specs import Array, is_float


@dataclass(frozen=True)
class Gap:
    """The distance of a value from the reference's.

    Args:
        largest: Largest absolute difference; NaN if none can be measured.
        ratio: Largest difference over what is allowed; 0 if equal, inf if no rounding explains it.
        reason: What is wrong, in words, where a number does not say it.
    """

    largest: float
    ratio: float
    reason: str | None = None


NONE = Gap(0.0, 0.0)


def gap(reference: Value, got: Value) -> Gap:
    """Measure one value.

    Floats may differ by rtol * (|reference| + its root mean square), rtol by dtype (`DEFAULTS`); all else not at all.
    """
    if isinstance(reference, list) or isinstance(got, list):
        return _lists(reference, got)
    if mismatch := form_mismatch(reference, got):
        return Gap(float("nan"), float("inf"), mismatch)
    if not reference.size:
        return NONE
    if not is_float(reference.dtype):
        return _exact(reference, got)
    return _floats(reference, got)


def _floats(reference: Array, got: Array) -> Gap:
    rtol = DEFAULTS.get(reference.dtype.name, DEFAULTS["float32"]).rtol
    if np.array_equal(reference, got):
        return NONE
    ref, ours = reference.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(ref)
    same = (finite & np.isfinite(ours)) | (ref == ours) | (np.isnan(ref) & np.isnan(ours))
    if not same.all():
        nans = int((np.isnan(ours) & ~np.isnan(ref)).sum())
        what = "NaN" if nans else "NaN or Inf in other places"
        return Gap(float("nan"), float("inf"), f"{what}: {nans or int((~same).sum())} of {ref.size} elements")
    if not finite.any():
        return NONE
    sizes, differences = np.abs(ref[finite]), np.abs(ours[finite] - ref[finite])
    with np.errstate(over="ignore", invalid="ignore"):
        allowed = rtol * (sizes + np.sqrt(np.mean(np.square(sizes))))
        ratios = np.where(differences > 0, differences / np.maximum(allowed, np.finfo(np.float64).tiny), 0.0)
    return Gap(float(differences.max()), float(ratios.max()))


def _exact(reference: Array, got: Array) -> Gap:
    wrong = int((reference != got).sum())
    if not wrong:
        return NONE
    largest = float(np.abs(reference.astype(np.float64) - got.astype(np.float64)).max())
    return Gap(largest, float("inf"), f"{wrong} of {reference.size} elements differ")


def _lists(reference: Value, got: Value) -> Gap:
    if not (isinstance(reference, list) and isinstance(got, list)):
        return Gap(float("nan"), float("inf"), "a tensor where a sequence should be, or the other way round")
    if len(reference) != len(got):
        return Gap(float("nan"), float("inf"), f"{len(got)} elements, expected {len(reference)}")
    return max(
        (gap(old, new) for old, new in zip(reference, got, strict=True)),
        key=lambda found: found.ratio,
        default=NONE,
    )
