"""Ties inside a model: the chosen experts are no output, and a tie decided differently changes everything after it.

Two engines may take different experts of equal score. The outputs then differ although nothing is wrong. So a
case whose outputs differ is run again, the candidate made to REPLAY the choices of the reference:

    is each choice that the candidate would have made differently one between equal scores?   (counted as flips)
    if not, are the candidate's scores right, measured against float64?                       (flips as well)
    are the outputs the same when both take the same experts?

A case that passes both is equal. Where a candidate cannot replay choices (an engine), a case that is made of ties is
undecided if the reference's own choices are ties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moe_export.verify.judging.error_model import stand
from moe_export.verify.judging.judge import Judgement, judge
from moe_export.verify.judging.routing import judge_routing
from moe_export.verify.judging.tolerance import Margin, Tolerance
from moe_export.verify.specs import Array, RoutingPair

NO_REPLAY = "a tie between experts, and the candidate cannot replay the reference's choice"
NO_SCORES = "values at the limits of the dtype: scores are NaN or Inf"
_NAME = "choice {}"
_SCORES = "{} scores"


@dataclass(frozen=True, eq=False)
class Choice:
    """The largest scores, (..., k) of (..., E), as one engine chose them."""

    ids: Array
    scores: Array

    def is_best(self) -> bool:
        """Whether no score that was left out is larger than one that was taken."""
        rows = self.scores.reshape(-1, self.scores.shape[-1]).astype(np.float64)
        taken = np.zeros(rows.shape, bool)
        np.put_along_axis(taken, self.ids.reshape(-1, self.ids.shape[-1]), values=True, axis=-1)
        least, left_out = np.where(taken, rows, np.inf).min(-1), np.where(taken, -np.inf, rows).max(-1)
        return bool((least >= left_out).all())

    def is_tied(self, margin: Margin) -> bool:
        """Whether some row's last choice and the best that was left out score the same."""
        rows = np.sort(self.scores.astype(np.float64).reshape(-1, self.scores.shape[-1]), -1)
        k = self.ids.shape[-1] if self.ids.ndim else 1
        if not rows.size or k >= rows.shape[-1]:
            return False
        last, left_out = rows[:, -k], rows[:, -k - 1]
        with np.errstate(invalid="ignore"):
            gap = np.where(last == left_out, 0.0, last - left_out)
            return bool(((gap == 0) | (gap <= margin.atol + margin.rtol * np.abs(last))).any())


@dataclass(frozen=True, eq=False)
class Replay:
    """A case run again, the candidate with the choices of the reference.

    Args:
        expected: The reference's outputs.
        got: The candidate's under the reference's choices; None if it cannot replay them.
        choices: What the reference chose, and by which scores.
        own: What the candidate would have chosen, one a choice.
        scores: By which scores it would; none if it does not say.
    """

    expected: Mapping[str, Array]
    got: Mapping[str, Array] | None
    choices: tuple[Choice, ...]
    own: tuple[Array, ...] = ()
    scores: tuple[Array, ...] = ()


class Replayer(Protocol):
    """Runs a case again under the reference's choices."""

    def replay(self, inputs: Mapping[str, Array]) -> Replay | None:
        """None if the reference chooses nothing."""
        ...


def judge_choices(
    replay: Replay, tolerance: Tolerance, *, stress: bool = False, truth: Sequence[Array] | None = None
) -> list[Judgement]:
    """The choices that the candidate would have made differently, each as a routing called `choice 0`, ...

    Args:
        replay: What was chosen, by either.
        tolerance: For scores.
        stress: Whether the values are at the limits of their type, where scores that are NaN decide nothing.
        truth: The scores of a float64 run under the reference's choices, one a choice; None for no such run. Scores of
            float16 values, or behind many layers, are further off than the tolerance, in both engines alike.
    """
    found = []
    for index, (choice, own) in enumerate(zip(replay.choices, replay.own, strict=True)):
        name = _NAME.format(index)
        judged = _judge_choice(name, choice, own, tolerance)
        if not judged.ok and truth is not None and len(truth) == len(replay.scores) == len(replay.choices):
            off = _off_by(name, choice, Choice(own, replay.scores[index]), truth[index], tolerance)
            if off is not None:
                judged = judge_within(name, choice, own, tolerance, off)
        if not judged.ok and stress and not np.isfinite(choice.scores.astype(np.float64)).all():
            judged = replace(judged, reason=None, undecided=NO_SCORES)
        if judged.flips or not judged.ok or judged.undecided:
            found.append(judged)
    return found


def judge_within(name: str, choice: Choice, own: Array, tolerance: Tolerance, off: float) -> Judgement:
    """Judge a choice between scores that the engines agree on up to an error.

    It may differ between experts whose scores are closer than twice that: each of the two may be off by that much.

    Args:
        name: What it is called.
        choice: The reference's.
        own: The positions that the candidate chose.
        tolerance: For scores.
        off: The largest difference of the scores of both.
    """
    usual = tolerance.of(_SCORES.format(name), choice.scores.dtype.name)
    margin = replace(usual, atol=max(usual.atol, 2 * off))
    outputs = {**tolerance.outputs, _SCORES.format(name): margin}
    return _judge_choice(name, choice, own, replace(tolerance, outputs=outputs))


def _judge_choice(name: str, choice: Choice, own: Array, tolerance: Tolerance) -> Judgement:
    pair = RoutingPair(name, None, _SCORES.format(name))
    expected = {name: choice.ids, _SCORES.format(name): choice.scores}
    (judged,) = judge_routing(pair, expected, {name: own.reshape(choice.ids.shape)}, tolerance)
    return judged


def _off_by(name: str, choice: Choice, own: Choice, true: Array, tolerance: Tolerance) -> float | None:
    """How far the scores of both engines are apart; None if the candidate's scores or its choice are wrong.

    Its scores are right as an output is, by the tolerance or by their distance from float64; its choice, where it took
    the largest of them. Then what it took in place of another is as good, within the errors of that very token.
    """
    label, scores = _SCORES.format(name), choice.scores
    sizes = {scores.size, own.scores.size, true.size}
    if len(sizes) > 1 or own.scores.dtype != scores.dtype or tolerance.is_by_hand(label):
        return None
    taken = Choice(own.ids.reshape(choice.ids.shape), own.scores.reshape(scores.shape))
    judged = judge(label, scores, taken.scores, tolerance.of(label, scores.dtype.name))
    if not judged.ok:
        judged = stand(judged, scores, taken.scores, true.reshape(scores.shape))
    known = judged.ok and not math.isnan(judged.max_abs) and taken.is_best()
    return judged.max_abs if known else None


def is_choice(output: str) -> bool:
    """Whether a judgement is of a choice inside the model, not of an output."""
    return output.startswith(_NAME.format(""))


def has_ties(replay: Replay, tolerance: Tolerance) -> bool:
    """Whether some choice of the reference is a tie."""
    return any(choice.is_tied(tolerance.of("", choice.scores.dtype.name)) for choice in replay.choices)
