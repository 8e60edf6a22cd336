"""`Watch`: the first length at which a model runs operators of another kind than at short ones.

    if t >= limits[kind]: break             fewer operators than its steps would run
    a = 0.99 if t < 17 * self.n else 0.5    a product by 0.5, which no short run has
    if x.shape[1] > reader.window(): ...    an operator after one that it never follows at short lengths

A step of the model costs a tenth of what one of the folded model costs in Python, so this looks far beyond the lengths
that can be compared: up to 4,096 steps, or 40,000 operators. It proves nothing: where operators change, the folded
model is compared with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moe_export.export.frontend.subject import Subject
from moe_export.export.torch_compat.dispatch import OperatorMode
from moe_export.export.tracing.lengths import Length, resized_together
from moe_export.export.tracing.trace import quiet

_MOST = 2e8  # elements computed in the longest run: half the price of a case of a comparison (verify/inputs/price)
_OPERATOR = 5_000.0  # elements that could be computed while eager PyTorch starts an operator
_LONGEST = 4096
_SLACK = 0.1  # of the number of operators, which grows unevenly where chunks add theirs every few steps


class _Kinds(OperatorMode):
    """Records the numbers that each operator is called with, by the operator that ran before it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.elements = 0
        self.numbers: dict[tuple[Any, Any], set[tuple[Any, ...]]] = {}
        self._before: Any = None

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        self.operators += 1
        self.elements += result.numel() if isinstance(result, torch.Tensor) else 0
        numbers = tuple(each for each in (*args, *kwargs.values()) if type(each) in (int, float, bool))
        self.numbers.setdefault((self._before, func), set()).add(numbers)
        self._before = func
        return result


class Watch:
    """Runs a model at any length, and compares the operators that it runs with those at short lengths.

    Args:
        subject: The model.
        lengths: The lengths that were folded over.
        longest: The greatest sizes that were traced, one for each of them.
        place: Which of these lengths is examined.
    """

    def __init__(
        self, subject: Subject, lengths: Sequence[Length], longest: Sequence[int], place: int
    ) -> None:
        self._subject, self._lengths, self._longest, self._place = subject, lengths, longest, place
        self._short = longest[place]
        self._runs = [self._run(size) for size in (self._short, 2 * self._short)]

    def first_unlike(self) -> int | None:
        """A length at which the operators differ, while at the one before they do not; None if none is found."""
        good, far = 2 * self._short, self._far()
        if far <= good or self._alike(far):
            return None
        while (bad := min(2 * good, far)) < far and self._alike(bad):
            good = bad
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._alike(middle):
                good = middle
            else:
                bad = middle
        return bad

    def _far(self) -> int:
        """The greatest length that is cheap enough to run: operators grow linearly, elements maybe with the square."""
        first, second = self._runs
        if first is None or second is None:
            return 0
        power = max(1.0, math.log2(max(1, second.elements) / max(1, first.elements)))
        size = _LONGEST
        while size > self._short:
            elements = second.elements * (size / (2 * self._short)) ** power
            if _OPERATOR * self._expected(size) + elements <= _MOST:
                return size
            size = size * 3 // 4
        return 0

    def _expected(self, size: int) -> float:
        counts = [run.operators if run is not None else 0 for run in self._runs]
        return counts[0] + (counts[1] - counts[0]) * (size - self._short) / self._short

    def _alike(self, size: int) -> bool:
        """Whether the operators at a length are like those at short ones; also true if the model fails there."""
        first, second = self._runs
        there = self._run(size)
        if first is None or second is None or there is None:
            return True
        if abs(there.operators - self._expected(size)) > _SLACK * there.operators:
            return False
        for kind, numbers in there.numbers.items():
            known = second.numbers.get(kind)
            if known is None or (first.numbers.get(kind) == known and not numbers <= known):
                return False
        return True

    def _run(self, size: int) -> _Kinds | None:
        sizes = [size if at == self._place else other for at, other in enumerate(self._longest)]
        example = resized_together(self._lengths, self._subject.inputs, sizes)
        kinds = _Kinds()
        with quiet(), torch.no_grad():
            try:
                with kinds:  # restoring the model's state afterwards runs operators that are not the model's
                    self._subject.call_leaves([example[name].clone() for name in self._subject.inputs])
            except Exception:
                return None
            finally:
                self._subject.state.restore()
        return kinds
