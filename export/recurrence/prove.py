"""`prove`: a folded model is compared with its model in PyTorch, before any ONNX is made.

Their results are compared at short lengths. But a closed form of numbers that steps compute with was found in a few
steps, in which `min(1, t / 100)` looks like `t / 100`. So the model is also run once at a great length, and each number
that the closed forms give there must be among those that it computes with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moe_export.export.frontend.source import line_of
from moe_export.export.frontend.subject import Subject
from moe_export.export.recurrence.agreement import Agreement
from moe_export.export.recurrence.closed_form import OfLength
from moe_export.export.recurrence.form import Form
from moe_export.export.recurrence.induction_sequences import counts
from moe_export.export.recurrence.loop import InductionVariable
from moe_export.export.recurrence.operand import atoms
from moe_export.export.recurrence.reach import Reach, reach
from moe_export.export.recurrence.rolled import Folded, LengthError, RolledGraph
from moe_export.export.recurrence.watch import Watch
from moe_export.export.torch_compat.dispatch import OperatorMode
from moe_export.export.tracing.constants import constants_of
from moe_export.export.tracing.fixed_sizes import resized
from moe_export.export.tracing.lengths import Length, operators, resized_together
from moe_export.export.tracing.trace import quiet

aten = torch.ops.aten

_PROVED = (1, 2, 3, 5, 13)
_GREAT = (2053, 521, 131)  # primes, so that they are no multiple of a chunk
_MOST = 40_000  # operators of a run at a great length, which then takes about a second
_NEAR = 1e-9  # of the largest term: a sum that Python adds to loses digits in two thousand iterations


def prove(
    subject: Subject,
    folded: Subject,
    lengths: Sequence[Length],
    traced: Sequence[tuple[int, ...]],
    whole: RolledGraph,
    *,
    rounded: bool,
) -> tuple[Reach, ...]:
    """Compare the folded model with the model, also at lengths that were not traced.

    Args:
        subject: The model.
        folded: The same model with its loops folded.
        lengths: The lengths that were folded over.
        traced: The sizes of these lengths in the traces.
        whole: What the traces have in common.
        rounded: Whether an iteration may take several places, so that what is left over after the last full iteration
            is dropped or filled up: then eight consecutive lengths are compared, for the remainders.

    Returns:
        For each length, how far the fold is right.

    Raises:
        LengthError: The folded model fails, or gives other values, at a length of the example or the traces, or at
            one between them and the greatest one compared.
    """
    agreement = Agreement(subject, folded, lengths)
    longest = max(traced)
    further = [tuple(size + more for size in longest) for more in (range(9, 17) if rounded else (9,))]
    # A model may take whole chunks only, and refuse all of the others.
    whole_chunks = [sizes for sizes in _in_steps(traced) if sizes not in traced]
    compared = (*_proved(len(lengths)), *traced, *further, *whole_chunks)
    needed = min(lengths[0].of(subject.inputs), *(sizes[0] for sizes in traced)) if len(lengths) == 1 else 0
    least = _least(agreement, compared, needed)
    if not agreement.same_types(longest):
        raise LengthError("folded, it gives results of other types", None)
    numbers = list(dict.fromkeys(_counted(whole)))
    if numbers:
        _prove_numbers(subject, agreement, lengths, longest, numbers)
    return tuple(replace(each, least=least) for each in _reached(subject, agreement, lengths, longest))


def _proved(count: int) -> list[tuple[int, ...]]:
    """The sizes to compare at; of two lengths, the first grows while the second shrinks, and both are 1 once."""
    if count == 1:
        return [(size,) for size in _PROVED]
    return [(1, 1), *zip(_PROVED, reversed(_PROVED), strict=True)]


def _in_steps(traced: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Multiples of what all traced sizes of a length are multiples of, if that is not 1."""
    steps = [math.gcd(*column) for column in zip(*traced, strict=True)]
    return [tuple(step * count for step in steps) for count in _PROVED] if max(steps) > 1 else []


def _same(agreement: Agreement, sizes: tuple[int, ...]) -> None:
    shown = "x".join(map(str, sizes))
    try:
        same = agreement.at(sizes)
    except RuntimeError as error:
        raise LengthError(f"folded, it fails at length {shown}: {error}", None) from error
    if same is False:
        raise LengthError(f"folded, it gives other values at length {shown}", None)


def _least(agreement: Agreement, compared: Sequence[tuple[int, ...]], needed: int) -> int:
    """The length from which on a fold is right.

    A model may treat few steps differently: `if x.shape[1] == 1`, or a window, `x[:, -3:]`, that is not full yet.

    Args:
        agreement: Compares at sizes.
        compared: The sizes to compare at.
        needed: The length at which the fold has to be right, with all that are greater.

    Raises:
        LengthError: It is wrong at one of these.
    """
    wrong = 0
    for sizes in compared:
        try:
            _same(agreement, sizes)
        except LengthError:
            if sizes[0] >= needed:
                raise
            wrong = max(wrong, sizes[0])
    while wrong:
        try:
            _same(agreement, (wrong + 1,))
            break
        except LengthError:
            wrong += 1
            if wrong >= needed:
                raise
    return wrong + 1


def wrong_at_one(
    subject: Subject,
    folded: Subject,
    lengths: Sequence[Length],
    sizes: tuple[int, ...],
    shapes: Mapping[str, Sequence[int | str]],
) -> tuple[tuple[str, int], ...]:
    """The free dimensions, other than the lengths, for which a fold is wrong at size 1: an (input, axis) for each.

    The trace that it was made from assumes that they are 2 or more, and has only that branch of `if x.shape[0] == 1`.

    Args:
        subject: The model.
        folded: The same model with its loops folded.
        lengths: The lengths that were folded over.
        sizes: Their sizes to compare at.
        shapes: The shapes of the trace's inputs: numbers, and names of dimensions.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if isinstance(size, str) and subject.inputs[name].shape[axis] > 1:
                places.setdefault(size, []).append((name, axis))
    found = []
    for group in places.values():
        single = replace(subject, inputs=resized(subject.inputs, dict.fromkeys(group, 1)))
        try:
            same = Agreement(single, folded, lengths).at(sizes)
        except RuntimeError:
            same = False
        if same is False:
            found.append(group[0])
    return tuple(found)


def _reached(
    subject: Subject, agreement: Agreement, lengths: Sequence[Length], longest: tuple[int, ...]
) -> tuple[Reach, ...]:
    """How far the fold is right, for each length."""
    short = resized_together(lengths, subject.inputs, longest)
    with quiet():
        constants = constants_of(replace(subject, inputs=short), widths=False)
        count = operators(subject, short) or 0
    found = tuple(
        reach(agreement, Watch(subject, lengths, longest, place), constants, longest, place, count)
        for place in range(len(lengths))
    )
    for length, each in zip(lengths, found, strict=True):
        shown = length.of(subject.inputs)
        if each.limit is not None and each.limit < shown:
            raise LengthError(
                f"the steps are not alike: what it computes changes after length {each.limit}, and the example "
                f"has {shown}", None,
            )  # fmt: skip
    return found


# Numbers that steps compute with


@dataclass(frozen=True)
class _Counted:
    """A number that follows a closed form, the iterations of its loop, and the line of the model."""

    number: Any
    iterations: Any
    line: str | None

    def at(self, length: int) -> np.ndarray[Any, Any]:
        """(v, 2) float64: its values at a length, and the magnitudes of their largest terms.

        Values that depend on other sizes, or that divide by zero, are left out.
        """
        iterations = _integer(self.iterations, length)
        values = []
        for iteration in range(iterations if iterations is not None else 0):
            try:
                values.append(_value(self.number, iteration, length))
            except (ArithmeticError, TypeError):
                continue
        return np.array(values, dtype=np.float64).reshape(-1, 2)


def _integer(number: Any, length: int) -> int | None:
    value = number.at(length) if isinstance(number, Form) else number
    return value if isinstance(value, int) else None


def _value(number: Any, iteration: int, length: int) -> tuple[float, float]:
    if isinstance(number, InductionVariable):
        first = _integer(number.first, length)
        if first is None:
            raise TypeError(number)
        value = first + number.step * iteration
        return value, abs(value)
    closed_form = number.closed_form if isinstance(number, OfLength) else number
    return closed_form.at(iteration, length), closed_form.size(iteration, length)


def _counted(whole: RolledGraph) -> Iterator[_Counted]:
    for item in whole.items:
        if not isinstance(item, Folded):
            line = line_of(item.node.meta.get("stack_trace"))
            yield from (_Counted(leaf, 1, line) for leaf in atoms((item.args, item.kwargs)) if counts(leaf))
            continue
        for position, step in enumerate(item.loop.body):
            if position not in item.loop.written:
                for leaf in atoms((step.args, step.kwargs)):
                    if counts(leaf):
                        yield _Counted(leaf, item.loop.iterations, _line(item, position))


def _line(item: Folded, position: int) -> str | None:
    node = item.loop.nodes[0][position]
    return line_of(node.meta.get("stack_trace")) if node is not None else item.loop.line


def _prove_numbers(
    subject: Subject,
    agreement: Agreement,
    lengths: Sequence[Length],
    longest: tuple[int, ...],
    numbers: Sequence[_Counted],
) -> None:
    """Compare numbers that follow a closed form with those of a run at the greatest length that is cheap enough.

    Only the first length matters: if there are several, steps that compute with their number were refused before.

    Raises:
        LengthError: The model does not compute with one of them.
    """
    seen = longest[0]
    used = _used(subject, resized_together(lengths, subject.inputs, longest))
    great = [size for size in _GREAT if used is not None and used.operators * size <= _MOST * seen]
    for size in great:
        there = _used(subject, resized_together(lengths, subject.inputs, (size, *longest[1:])))
        if used is None or there is None:
            continue
        # Some numbers of a trace are never seen here: the tracer decomposes operators into others with other numbers.
        seen_there = [number for number in numbers if used.missing(number.at(seen)) is None]
        for number in seen_there:
            missing = there.missing(number.at(size))
            if missing is not None:
                raise LengthError(
                    f"its steps compute with {number.number} at short lengths, and with something else than "
                    f"{missing!r} at length {size}", number.line,
                )  # fmt: skip
        if len(seen_there) < len(numbers):
            _same(agreement, (size, *longest[1:]))
        return


def _used(subject: Subject, example: dict[str, torch.Tensor]) -> _Used | None:
    """The numbers that a model's operators are called with; None if it fails on the example."""
    used = _Used()
    with quiet(), torch.no_grad():
        try:
            with used:  # restoring the model's state afterwards runs operators that are not the model's
                subject.call_leaves([example[name].clone() for name in subject.inputs])
        except Exception:
            return None
        finally:
            subject.state.restore()
    return used


class _Used(OperatorMode):
    """Records the numbers that operators are called with, and how many operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self._numbers: set[float] = set()

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        self.operators += 1
        leaves = (*args, *kwargs.values())
        self._numbers.update(leaf for leaf in leaves if type(leaf) in (int, float))
        if func is aten.lift_fresh.default:  # torch.tensor(t)
            self._numbers.update(args[0].double().flatten()[:1].tolist())
        return result

    def missing(self, values: np.ndarray[Any, Any]) -> float | None:
        """The first value that no operator was called with; None if there is none.

        Args:
            values: (v, 2) float64, values and the magnitudes of their largest terms.
        """
        wanted, terms = values.T
        known = np.sort(np.array([-np.inf, *self._numbers, np.inf]))
        after = np.clip(np.searchsorted(known, wanted), 1, len(known) - 1)
        distance = np.minimum(np.abs(known[after] - wanted), np.abs(wanted - known[after - 1]))
        far = np.flatnonzero(distance > _NEAR * np.maximum(terms, np.abs(wanted)))
        return float(wanted[far[0]]) if len(far) else None
