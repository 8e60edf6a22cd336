"""How exact an output beyond its tolerance has to be: no more exact than PyTorch's own arithmetic.

A fixed tolerance refuses right graphs that are deep, or that cancel: two orders of one sum differ by what float32 loses
in it. So an output beyond the default tolerance is held against the model in float64, element by element:

    e_i = |candidate_i - float64_i|
    E_r = max over the elements i of row r of |torch_i - float64_i|, in this case and on inputs that differ from it in
          the last digit of each float, or of each embedding where inputs are ids (one run may be lucky), there with
          running sums kept in float32 (PyTorch keeps them in float64 on a CPU, which ONNX's CumSum does not promise);
          at least m * max_i |float64_i|, where m is the median over the rows of E_r / max_i |float64_i| (one row may
          be, too)
    equal where e_i <= max(atol + rtol * |float64_i|, 8 E_r) for each i that is beyond the tolerance

A row is the last axis: the features of one token. What is wrong in one row is not excused by what another one loses.
Where E_r is more than 1 % of the largest value, the float64 run took another way (another side of a branch, another
expert), and excuses nothing. The choices among experts are PyTorch's in all runs, where they can be replayed.

8: of two right programs, one is at some element up to 4.9 times as far off as the other is anywhere in that row
(measured: sums that cancel, and the logits of a Mixtral; 16 seeds, one thread and two). The bound has room for
more. A tolerance that somebody chose is strict: this is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moe_export.verify.judging.judge import Judgement, Standing
from moe_export.verify.judging.tolerance import Margin
from moe_export.verify.specs import Array

TIMES = 8.0
ANOTHER_WAY = 0.01
"""A reference that is off by so much of the largest value took another branch, not another rounding."""


def may_stand(found: Judgement, reference: Array, candidate: Array, true: Array) -> bool:
    """Whether an output might be equal by its errors, whatever the reference's own turn out to be.

    They are at most 1 % of the largest value; what is off by more than 8 times that needs no further runs.

    Args:
        found: The judgement by the tolerance; not equal.
        reference: The output, floats.
        candidate: Likewise, of the same shape.
        true: The float64 output.
    """
    assert found.margin is not None
    if found.odd:
        return False
    ref, ours, truth = (_rows(array) for array in (reference, candidate, true))
    beyond, off = _beyond(found.margin, ref, ours, truth)
    largest = float(np.nan_to_num(np.abs(truth)).max(initial=0.0))
    allowed = np.maximum(_within(found.margin, truth), TIMES * ANOTHER_WAY * largest)
    with np.errstate(invalid="ignore"):
        return not ((beyond & ~np.isfinite(truth)).any() or (off > allowed).any())


def stand(
    found: Judgement,
    reference: Array,
    candidate: Array,
    true: Array,
    nearby: Sequence[Mapping[str, Array]] = (),
) -> Judgement:
    """The judgement of an output beyond its tolerance, by the errors of candidate and reference.

    Args:
        found: The judgement by the tolerance; not equal.
        reference: The output, floats.
        candidate: Likewise, of the same shape.
        true: The float64 output.
        nearby: The reference's outputs for nearly the same inputs.
    """
    assert found.margin is not None
    if found.odd:  # NaN or Inf of one side only: no rounding
        return found
    ref, ours, truth = (_rows(array) for array in (reference, candidate, true))
    others = [_rows(outputs[found.output]) for outputs in nearby if found.output in outputs]
    room, too_far = _room(truth, [ref, *(other for other in others if other.shape == truth.shape)])
    beyond, off = _beyond(found.margin, ref, ours, truth)
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = np.maximum(_within(found.margin, truth), TIMES * room)
    lost = beyond & ~np.isfinite(truth)
    with np.errstate(over="ignore"):  # a reference without any error
        ratios = off / np.maximum(room, np.finfo(np.float64).tiny)
    worst = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
    standing = Standing(
        float(off[worst]),
        float(room[worst]),
        float(ratios[worst]),
        int(beyond.sum()),
        too_far.get(int(worst[0])),
    )
    if lost.any() or (off > allowed).any():
        return replace(found, standing=standing)
    return replace(found, reason=None, bad=0, standing=standing)


def _room(truth: Array, runs: Sequence[Array]) -> tuple[Array, dict[int, float]]:
    """The error of PyTorch's own arithmetic in each row, (rows, 1) broadcast to (rows, elements).

    Also the rows where that excuses nothing, as it is too large for a rounding, with the error.
    """
    with np.errstate(invalid="ignore"):
        errors = np.max([np.nan_to_num(np.abs(run - truth), nan=np.inf).max(-1) for run in runs], axis=0)
        sizes = np.nan_to_num(np.abs(truth)).max(-1)
    seen = sizes > 0
    typical = float(np.median(errors[seen] / sizes[seen])) if seen.any() else 0.0
    room = np.maximum(errors, typical * sizes if np.isfinite(typical) else 0.0)
    far = room > ANOTHER_WAY * sizes.max()
    too_far = {int(row): float(room[row]) for row in np.flatnonzero(far)}
    room = np.where(far, 0.0, room)
    return np.array(np.broadcast_to(room[:, None], truth.shape)), too_far


def _beyond(margin: Margin, ref: Array, ours: Array, truth: Array) -> tuple[Array, Array]:
    """Where two outputs are further apart than the tolerance; and how far the candidate is off there."""
    with np.errstate(invalid="ignore", over="ignore"):
        beyond = np.abs(ours - ref) > margin.atol + margin.rtol * np.abs(ref)
        return beyond, np.where(beyond & np.isfinite(truth), np.abs(ours - truth), 0.0)


def _within(margin: Margin, truth: Array) -> Array:
    return np.asarray(margin.atol + margin.rtol * np.abs(truth))


def _rows(array: Array) -> Array:
    """(rows, elements), float64; a scalar is a row of one."""
    wide = array.astype(np.float64)
    return wide.reshape(-1, wide.shape[-1]) if wide.ndim > 1 else wide.reshape(1, -1)
