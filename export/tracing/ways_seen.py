"""`ways_seen`: which way inputs of several kinds go at a model's decisions, and that the trace follows them there.

The example, zeros, its negative, 100 and 1/100 times it, and random values are given to the model itself, whose answers
are noted line by line, and to the trace, which must compute the same. What no input takes both ways is unproven, and
the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.asked_numbers import call_with, number_of, numbers_asked
from moe_export.export.tracing.both_sides import BothSides, Decision, both_sides_run, is_converted
from moe_export.export.tracing.needless import run_program
from moe_export.export.tracing.not_hit import asking_frame, place_of
from moe_export.export.tracing.trace import Traced
from moe_export.float64 import agree, double_module, doubled, in_float64

_NEAR = 1e-4  # of the largest value, in float32
_NEAR_FLOAT64 = 1e-6  # Python's numbers may be tensors of float32 in a trace
_FLOATS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.Tensor.clone,
    torch.zeros_like,
    torch.neg,
    lambda x: 100 * x,
    lambda x: x / 100,
    torch.randn_like,
    torch.rand_like,
    lambda x: -torch.rand_like(x),
)

Seen = Mapping[str, frozenset[bool]]


def ways_seen(subject: Subject, traced: Traced, places: Collection[str]) -> Seen:
    """The answers that were seen at each decision.

    Args:
        subject: The model.
        traced: The trace of it, or of what it is with loops folded.
        places: `file:line` of its decisions.

    Raises:
        NotExportableError: The trace computes something else than the model for one of the inputs.
    """
    absent = subject.weights is not None and subject.weights.absent
    if not places or absent:
        return {}
    watching = _Watching(subject.module, frozenset(places))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for given in _inputs(list(traced.example.values())):
            wanted = watching.call(subject, given)
            if wanted is not None:
                _require_same(subject, traced, given, wanted, sorted(places)[0])
    return {place: frozenset(found) for place, found in watching.seen.items()}


def _inputs(example: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    for number, change in enumerate(_FLOATS):
        yield [_changed(tensor, number, change) for tensor in example]


def _changed(tensor: torch.Tensor, number: int, change: Callable[..., torch.Tensor]) -> torch.Tensor:
    if tensor.is_floating_point():
        return change(tensor)
    if tensor.dtype is torch.bool:
        return (tensor, torch.zeros_like(tensor), torch.ones_like(tensor), ~tensor)[number % 4].clone()
    return (tensor, torch.zeros_like(tensor), tensor.flip(-1) if tensor.dim() else tensor)[number % 3].clone()


@dataclass
class _Watching:
    """Calls a model, and notes what it is told where it decides.

    Attributes:
        module: The model.
        places: `file:line` of its decisions.
        seen: The answers at each.
    """

    module: nn.Module
    places: frozenset[str]
    seen: dict[str, set[bool]] = field(default_factory=dict)

    def call(self, subject: Subject, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
        """What the model returns; None where it refuses."""
        try:
            wanted = subject.call([tensor.clone() for tensor in given])
        except Exception:
            return None
        for asked in (False, True):  # numbers that are tensors are not numbers for all code
            try:
                with numbers_asked(asked), _Asked(self), both_sides_run(_Watched(self), self.places, ()):
                    subject.call([tensor.clone() for tensor in given])
            except Exception:
                continue
        return wanted

    def note(self, place: str, answer: bool) -> None:
        """Note an answer."""
        self.seen.setdefault(place, set()).add(answer)


class _Asked(TorchFunctionMode):
    """Notes what is asked where it is no converted branch, which notes what its whole test comes to."""

    def __init__(self, watching: _Watching) -> None:
        super().__init__()
        self._watching = watching
        self._branches = {
            place for place in watching.places if is_converted(place, watching.places, frozenset())
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.item:
            number = number_of(args[0])
            if number is not None:
                return number
        result = call_with(func, args, kwargs)
        if func is torch.Tensor.__bool__:
            frame = asking_frame()
            place = place_of(frame) if frame is not None else ""
            if place in self._watching.places - self._branches:
                self._watching.note(place, bool(result))
        return result


class _Watched(BothSides):
    """One side of each branch runs, as in the model, and is noted."""

    def __init__(self, watching: _Watching) -> None:
        super().__init__(watching.module, lambda value: False, lambda place: None, lambda place: None)
        self._watching = watching

    def begin(self, test: Any, key: str, names: Sequence[str], scope: Mapping[str, Any]) -> Decision:
        answer = bool(test)
        self._watching.note(key, answer)
        return Decision(answer, not answer)

    def choose(self, test: Any, key: str, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        answer = bool(test)
        self._watching.note(key, answer)
        return yes() if answer else no()


def _require_same(
    subject: Subject,
    traced: Traced,
    given: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    place: str,
) -> None:
    try:
        found = run_program(traced, [tensor.clone() for tensor in given])
    except Exception as error:
        raise NotExportableError(
            "a side of a decision on values fails for an input that takes the other, and a graph computes both: "
            f"{type(error).__name__}: {error}".splitlines()[0],
            code=Code.VALUES_DECIDE,
            where=place,
            hint="clamp what that side reads: table[index.clamp(0, len(table) - 1)]",
        ) from error
    if agree(wanted, found, _NEAR):
        return
    try:
        with in_float64():
            wide = subject.of(double_module(subject.module))
            exact = wide.call([doubled(tensor.clone()) for tensor in given])
            found = run_program(traced, [doubled(tensor.clone()) for tensor in given], wide=True)
    except Exception:
        exact = tuple(wanted)
    if not agree(exact, found, _NEAR_FLOAT64):
        raise NotExportableError(
            "what is traced of a model that decides on values differs from the model for another input",
            code=Code.VALUES_DECIDE,
            where=place,
            hint="choose with torch.where, and let neither side change anything but local names",
        )
