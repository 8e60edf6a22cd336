"""Judge a router: the experts of a token are a set, each with its weight.

Letters: T tokens (all leading axes, flattened), k experts a token, E experts.
Engines order a token's experts as they please, so ids are compared as sets and weights by expert. Where two
experts score (nearly) the same, engines may pick either: such a tie is excused if the reference's scores show
it, and counted as a flip. Nothing else is excused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_export.verify.judging.judge import Judgement, Worst, form_mismatch, judge, refused
from moe_export.verify.judging.sketch import front_of
from moe_export.verify.judging.tolerance import Margin, Tolerance
from moe_export.verify.specs import Array, RoutingPair


def judge_routing(
    pair: RoutingPair, reference: Mapping[str, Array], candidate: Mapping[str, Array], tolerance: Tolerance
) -> list[Judgement]:
    """Judge the expert ids of `pair`, and their weights if it has any.

    Args:
        pair: Names of the ids (..., k), the weights (..., k) and the scores (..., E). Scores are those of the
            reference; they cover the same tokens in the same order, under any leading shape. Top-1 ids may
            lack the axis of k if there are scores to tell by.
        reference: The reference's outputs; it has all that `pair` names.
        candidate: The candidate's outputs.
        tolerance: Gives the margin of the weights and, for ties, of the scores.
    """
    ids, ours = reference[pair.indices], candidate.get(pair.indices)
    if ours is None:
        return [judge(pair.indices, ids, None, Margin(0, 0)), *_unmatched(pair, reference, candidate)]
    scores = None if pair.scores is None else reference[pair.scores]
    problem = form_mismatch(ids, ours) or _not_ids(ids, scores)
    if problem is None:
        match = _match(ids, ours, scores)
        problem = _malformed(match)
    if problem is not None:
        return [
            refused(pair.indices, ids, problem, "routing"),
            *_unmatched(pair, reference, candidate),
        ]
    match = match.aligned()
    ties = None if pair.scores is None or scores is None else tolerance.of(pair.scores, scores.dtype.name)
    return [
        _judge_ids(pair.indices, ids, match, ties),
        *_judge_weights(pair, reference, candidate, match, tolerance),
    ]


@dataclass(frozen=True)
class _Match:
    """The ids of both sides (T, k), the scores (T, E), and the order in which each side's slots are read."""

    ids: Array
    ours: Array
    scores: Array | None
    order: Array
    our_order: Array

    def aligned(self) -> _Match:
        """Both sides reordered so that equal experts stand side by side.

        Experts that both sides name come first, by id; those of one side only come last, by score if there
        are any (so that in a tie of several, each is held against its nearest), else by id.
        """
        shared = (self.ids[:, :, None] == self.ours[:, None, :]).any(-1)  # (T, k)
        our_shared = (self.ours[:, :, None] == self.ids[:, None, :]).any(-1)
        order, our_order = self._sorted(self.ids, shared), self._sorted(self.ours, our_shared)
        ids, ours = np.take_along_axis(self.ids, order, -1), np.take_along_axis(self.ours, our_order, -1)
        return _Match(ids, ours, self.scores, order, our_order)

    def _sorted(self, ids: Array, shared: Array) -> Array:
        key = ids.astype(np.float64)
        if self.scores is not None:
            key = np.where(shared, key, np.take_along_axis(self.scores, ids, -1))
        return np.asarray(np.lexsort((key, ~shared), axis=-1))


def _match(ids: Array, ours: Array, scores: Array | None) -> _Match:
    if scores is not None and scores.shape[:-1] == ids.shape:  # top-1 without its axis of k
        ids, ours = ids[..., None], ours[..., None]
    in_order = np.broadcast_to(np.arange(ids.shape[-1]), _rows(ids).shape)
    wide = None if scores is None else _rows(scores.astype(np.float64))
    return _Match(_rows(ids).astype(np.int64), _rows(ours).astype(np.int64), wide, in_order, in_order)


def _not_ids(ids: Array, scores: Array | None) -> str | None:
    if ids.dtype.kind not in "iu":
        return f"expert ids must be integers, these are {ids.dtype.name}"
    if ids.ndim == 0:
        return "expert ids need an axis of experts, these are a scalar"
    return (
        "scores need an axis of experts, these are a scalar"
        if scores is not None and not scores.ndim
        else None
    )


def _malformed(match: _Match) -> str | None:
    # A second choice among scores that are all 0 may be the first once more: right where both sides say so.
    agree = (np.sort(match.ids, -1) == np.sort(match.ours, -1)).all(-1)
    for side, ids in (("", match.ours), ("the reference: ", match.ids)):
        ordered = np.sort(ids, -1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(-1) & ~agree
        if twice.any():
            token = int(np.argmax(twice))
            named = f"token {token} goes to {ids[token].tolist()}"
            return f"{side}an expert is named twice in {int(twice.sum())} of {len(ids)} tokens: {named}"
        if match.scores is None:
            continue
        if len(match.scores) != len(ids):
            return f"there are scores for {len(match.scores)} tokens, but ids for {len(ids)}"
        outside = (ids < 0) | (ids >= match.scores.shape[-1])
        if outside.any():
            return f"{side}expert {int(ids[outside][0])} is none of the {match.scores.shape[-1]} with scores"
    return None


def _judge_ids(name: str, reference: Array, match: _Match, ties: Margin | None) -> Judgement:
    moved = match.ids != match.ours  # (T, k)
    excused = np.zeros_like(moved) if ties is None else moved & _tied(match, ties)
    wrong = moved & ~excused
    bad, lost = int(wrong.sum()), wrong.any(-1)
    flips = int((moved.any(-1) & ~lost).sum())
    reason, worst = None, None
    if bad:
        token, slot = (int(i) for i in np.argwhere(wrong)[0])
        old, new = int(match.ids[token, slot]), int(match.ours[token, slot])
        worst = Worst((token,), new, old)
        reason = (
            f"{int(lost.sum())} of {len(lost)} tokens go to another expert: token {token} to {new}, not {old}"
        )
        if match.scores is not None:
            reason += f" (scores {match.scores[token, new]:.6g} and {match.scores[token, old]:.6g}, no tie)"
    size, gap = _gaps(match)
    # Ids have no distance: 3 for 2 is as wrong as 7 for 2, so the differences stay "nothing to measure".
    return Judgement(
        name,
        "routing",
        reference.dtype.name,
        reason,
        bad=bad,
        total=reference.size,
        worst=worst,
        margin=ties,
        flips=flips,
        tokens=len(moved),
        odd=int((moved & (gap != 0) & ~np.isfinite(size + gap)).sum()),
        front=front_of(size, np.where(moved & np.isfinite(size + gap), gap, np.nan)),
    )


def _gaps(match: _Match) -> tuple[Array, Array]:
    """How the displaced expert scores, and how far from it the new one does, (T, k); NaN without scores."""
    if match.scores is None:
        nothing = np.full(match.ids.shape, np.nan)
        return nothing, nothing
    displaced = np.take_along_axis(match.scores, match.ids, -1)
    new = np.take_along_axis(match.scores, match.ours, -1)
    with np.errstate(invalid="ignore"):
        return np.abs(displaced), np.where(
            new == displaced, 0.0, np.abs(new - displaced)
        )  # inf ties with inf


def _tied(match: _Match, margin: Margin) -> Array:
    """Where the new expert scores as the displaced one does, (T, k).

    A NaN among numbers ties with nothing: PyTorch takes it for the greatest. Where there are no numbers, all tie.
    """
    size, gap = _gaps(match)
    with np.errstate(invalid="ignore"):
        near = (gap == 0) | (gap <= margin.atol + margin.rtol * size) & np.isfinite(size)
    unscored = np.False_ if match.scores is None else np.isnan(match.scores).all(-1, keepdims=True)
    return np.asarray(near | unscored)


def _judge_weights(
    pair: RoutingPair,
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    match: _Match,
    tolerance: Tolerance,
) -> list[Judgement]:
    if pair.weights is None:
        return []
    weights, ours = reference[pair.weights], candidate.get(pair.weights)
    if ours is None or form_mismatch(weights, ours) or weights.size != match.ids.size:
        return _unmatched(pair, reference, candidate)
    aligned = _reordered(weights, match.order)
    our_aligned = _reordered(ours, match.our_order)
    return [judge(pair.weights, aligned, our_aligned, tolerance.of(pair.weights, weights.dtype.name))]


def _unmatched(
    pair: RoutingPair, reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> list[Judgement]:
    """The judgement of weights that cannot be matched to experts: never equal."""
    if pair.weights is None:
        return []
    weights, ours = reference[pair.weights], candidate.get(pair.weights)
    if ours is None:
        return [judge(pair.weights, weights, None, Margin(0, 0))]
    problem = form_mismatch(weights, ours) or f"cannot be matched to the experts of '{pair.indices}'"
    return [refused(pair.weights, weights, problem)]


def _reordered(weights: Array, order: Array) -> Array:
    return np.take_along_axis(weights.reshape(order.shape), order, -1).reshape(weights.shape)


def _rows(array: Array) -> Array:
    """(..., n) → (T, n); the T is spelt out because -1 cannot be inferred where n is 0."""
    return array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1])
