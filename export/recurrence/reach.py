"""`reach`: up to which length a fold is right.

A fold is made from traces at a few short lengths, and a model may do something else at greater ones:

    if t >= 60: break        range(min(length, 48))        0.99 if t < 60 else 0.5        if x.shape[1] > 48: ...

The lengths at which it may are constants in its code (`constants_of`). So the folded model is compared with the model
at each of these and at the next length, and at one beyond them all; then at the first length, up to 4,096, at which the
model runs other operators than at short ones (`watch`). If they differ somewhere, the limit is searched for between the
last length at which they agree and the first at which they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_export.export.recurrence.agreement import Agreement
from moe_export.export.recurrence.watch import Watch

_MOST = 20_000  # operators of the longest run: about half a second
_MOST_TOGETHER = 2 * _MOST  # operators of all runs
_LONGEST = 4096
_SHORTEST = 14  # `prove` compares at lengths up to 13 anyway


@dataclass(frozen=True)
class Reach:
    """For which sizes of one length a fold is right.

    Attributes:
        compared: The greatest length at which it was compared and right.
        limit: The greatest length at which it is right; None if it was right wherever it was compared.
        least: The least: above 1 if the model treats few steps differently, `if x.shape[1] == 1` or `x[:, -3:]`.
    """

    compared: int
    limit: int | None = None
    least: int = 1


def reach(
    agreement: Agreement,
    watch: Watch,
    constants: Sequence[int],
    longest: Sequence[int],
    place: int,
    operators: int,
) -> Reach:
    """Find up to which length a fold is right.

    Args:
        agreement: Compares the folded model with the model.
        watch: Watches which operators the model runs.
        constants: The integers in the model's code, the likeliest first.
        longest: The greatest sizes that were traced, one for each length that was folded over.
        place: Which of these lengths is examined.
        operators: How many operators the model runs at `longest`.
    """
    a_step = max(1, operators // max(1, longest[place]))
    most = min(_LONGEST, _MOST // a_step)
    wanted = [size for constant in constants for size in (constant, constant + 1) if size <= most]
    far = min(most, max([*wanted, 4 * longest[place]]) + 5)

    def right(size: int) -> bool | None:
        return agreement.at([size if at == place else other for at, other in enumerate(longest)])

    left = _MOST_TOGETHER
    good, bad = longest[place], None
    for size in (far, *(size for size in dict.fromkeys(wanted) if _SHORTEST <= size < far)):
        if size <= good and bad is None and size == longest[place]:
            continue
        if left < size * a_step:
            break
        left -= size * a_step
        if (bad is not None and size >= bad) or size <= 0:
            continue
        found = _answer(right, size)
        if found is False:
            bad = size
        elif found:
            good = max(good, size)
    suspect = watch.first_unlike() if bad is None else None
    if suspect is not None and _answer(right, suspect) is False:
        bad = suspect
    if bad is None:
        return Reach(good)
    return Reach(bad, _last_right(right, bad, min(good, bad - 1), longest[place]))


def _answer(right: Callable[[int], bool | None], size: int) -> bool | None:
    try:
        return right(size)
    except RuntimeError:
        return False


def _last_right(right: Callable[[int], bool | None], bad: int, good: int, least: int) -> int:
    """The last length that is right before a wrong one, by bisection: once a model deviates, it keeps deviating."""
    good = min(good, bad - 1) if _answer(right, min(good, bad - 1)) else least
    while bad - good > 1:
        middle = (good + bad) // 2
        if _answer(right, middle) is False:
            bad = middle
        else:
            good = middle
    return good
