"""Ties inside a model: the chosen experts are no output, and a tie decided differently changes everything after it.

Two engines may take different experts of equal score. The outputs then differ although nothing is wrong. So a
case whose outputs differ is run again, the candidate made to REPLAY the choices of the reference:

    is each choice that the candidate would have made differently one between equal scores?   (counted as flips)
    are the outputs the same when both take the same experts?

A case that passes both is equal. Where a candidate cannot replay choices (an engine), a case that is made of ties is
undecided if the reference's own choices are ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moe_export.verify.judging.judge import Judgement
from moe_export.verify.judging.routing import judge_routing
from moe_export.verify.judging.tolerance import Margin, Tolerance
from moe_export.verify.specs import Array, RoutingPair

NO_REPLAY = "a tie between experts, and the candidate cannot replay the reference's choice"
NO_SCORES = "values at the limits of the dtype: scores are NaN or Inf"
_NAME = "choice {}"


@dataclass(frozen=True, eq=False)
class Choice:
    """The largest scores, (..., k) of (..., E), as one engine chose them."""

    ids: Array
    scores: Array

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
    """

    expected: Mapping[str, Array]
    got: Mapping[str, Array] | None
    choices: tuple[Choice, ...]
    own: tuple[Array, ...] = ()


class Replayer(Protocol):
    """Runs a case again under the reference's choices."""

    def replay(self, inputs: Mapping[str, Array]) -> Replay | None:
        """None if the reference chooses nothing."""
        ...


def judge_choices(replay: Replay, tolerance: Tolerance, *, stress: bool = False) -> list[Judgement]:
    """The choices that the candidate would have made differently, each as a routing called `choice 0`, ...

    Args:
        replay: What was chosen, by either.
        tolerance: For scores.
        stress: Whether the values are at the limits of their type, where scores that are NaN decide nothing.
    """
    found = []
    for index, (choice, own) in enumerate(zip(replay.choices, replay.own, strict=True)):
        name, scores = _NAME.format(index), f"{_NAME.format(index)} scores"
        pair = RoutingPair(name, None, scores)
        (judged,) = judge_routing(
            pair, {name: choice.ids, scores: choice.scores}, {name: own.reshape(choice.ids.shape)}, tolerance
        )
        if not judged.ok and stress and not np.isfinite(choice.scores.astype(np.float64)).all():
            judged = replace(judged, reason=None, undecided=NO_SCORES)
        if judged.flips or not judged.ok or judged.undecided:
            found.append(judged)
    return found


def is_choice(output: str) -> bool:
    """Whether a judgement is of a choice inside the model, not of an output."""
    return output.startswith(_NAME.format(""))


def has_ties(replay: Replay, tolerance: Tolerance) -> bool:
    """Whether some choice of the reference is a tie."""
    return any(choice.is_tied(tolerance.of("", choice.scores.dtype.name)) for choice in replay.choices)
