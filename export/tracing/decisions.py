"""Decisions that depend on the values of tensors, traced both ways and merged.

    if x.max() > 0:                p = x.max() > 0
        y = self.a(x)        →     where(p, a(x), b(x))
    else:
        y = self.b(x)

Within one trace, and so with one graph and one set of conditions on sizes, the model is called several times. What
neither experts (`every_expert_hit`) nor checks (`checks`) answer is answered from a list: first "true", then "false".
That walks the tree of answers, depth first, and what two calls return that differ in their last answer alone is merged
from the leaves up. Tensors are chosen by `torch.where`, so a NaN on the side that is not taken stays there.

- At most 64 ways; a model with more is refused, with its decisions and their lines.
- Both ways must return tensors of the same shapes and types, and the same of everything else.
- No way may write into an input or a weight. Attributes are put back before the next call.
- Where a way ends in the model's own `raise`, there is no result that a graph could differ from; the other is taken.
- A question about values that no input has a say in (`torch.all(n == 0)` of a state of zeros) is answered.

A branch that only gives values to local names is merged where it stands instead (`both_sides`), so that a decision in a
loop does not double the ways in each step; what cannot be merged there is a way of its own.

A model that decides nothing is called once, as if nothing of this were here: only the second trace, after a first one
that met a decision, follows it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.pytree import Leaf
from moe_export.export.frontend.source import is_library_model, last_model_line
from moe_export.export.frontend.state import State
from moe_export.export.sizes import same_shape
from moe_export.export.torch_compat.failures import depends_on_values
from moe_export.export.torch_compat.operators import writes_to
from moe_export.export.torch_compat.proxies import is_traced, is_untraced, modules_left, node_of
from moe_export.export.tracing.asked_numbers import (
    NeedsNumberError,
    call_with,
    number_of,
    numbers_asked,
    truth_of,
)
from moe_export.export.tracing.both_sides import BothSides, both_sides_run, is_converted
from moe_export.export.tracing.known_values import known_truth
from moe_export.export.tracing.not_hit import asking_frame, place_of, writes_by_its_mask
from moe_export.export.tracing.open_loops import LoopRefusedError, NotLocalError
from moe_export.export.tracing.row_masks import DecidesError

MOST_WAYS = 64
_NAMED = 12  # decisions that a refusal lists; a loop over time has one a step


class TooManyWaysError(NotExportableError):
    """A model has more ways than are followed."""


class DecisionMetError(Exception):
    """A trace met a decision that it was not made to follow."""


@dataclass
class Decisions:
    """What is known of a model's decisions, over several traces of it.

    Attributes:
        module: The model.
        follows: Whether the next trace follows decisions.
        met: Whether the last trace met one that it did not follow; the model may have caught the exception.
        apart: Lines of questions about masks of rows that are no questions about experts.
        places: `file:line` of each decision that was followed.
        loops: `file:line` of each loop whose number of steps only the graph knows.
        lookups: `file:line` where one of some modules is looked up by a number that only the graph knows.
        ended: `file:line` of each decision one way of which ends the model, and which answer leads there.
        open: `file:line` of each question that a trace could not answer.
        ways: Branches whose sides cannot be merged where they stand, each a way of its own.
        numbers: Whether numbers that only the graph knows are followed, too (`asked_numbers`).
        cause: What the trace failed with before they were.
    """

    module: nn.Module
    follows: bool = False
    met: bool = False
    apart: set[str] = field(default_factory=set)
    places: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    lookups: list[str] = field(default_factory=list)
    ended: dict[str, bool] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    ways: set[str] = field(default_factory=set)
    numbers: bool = False
    cause: Exception | None = None
    _asking: _Asking | None = None
    _both: BothSides | None = None

    def require_followed(self) -> None:
        """Refuse a trace that met a decision which it did not follow.

        Raises:
            DecisionMetError: It did, and the model caught what it was stopped with.
        """
        if self.met or (self._both is not None and self._both.running):
            raise DecisionMetError

    def follow_after(self, error: Exception) -> bool:
        """Whether a trace that failed is worth another, one that follows decisions; then the next one does."""
        before = len(self.apart), len(self.ways), self.follows
        if isinstance(error, LoopRefusedError):
            return False
        if isinstance(error, DecidesError):
            self.apart |= error.places
            self.follows = True
        if self.met:
            self.follows = True
        elif depends_on_values(error) and self.cause is None:
            self.cause, self.numbers = error, True
            return True
        elif isinstance(error, NeedsNumberError) and self._is_asked_for_loop(error):
            return True
        elif isinstance(error, NotLocalError) and error.why and not self.numbers:
            self.numbers = True  # a loop carries numbers, which are tensors there
            return True
        elif isinstance(error, NotLocalError):
            self.ways.add(error.key)
        elif self._both is not None:
            self.ways |= set(self._both.running)
        again = self.met or before != (len(self.apart), len(self.ways), self.follows)
        self.numbers = self.numbers and again
        return again

    def _is_asked_for_loop(self, error: NeedsNumberError) -> bool:
        """Whether a number is the limit of a loop that was not known to be one of the graph; then it is."""
        place = last_model_line(error)
        if place is None or place in self.open:
            return False
        self.open.add(place)
        return is_converted(place, self.open, self.ways)

    def checks(self) -> list[str]:
        """The decisions that are checks, since one way ends the model: `file.py:12`."""
        return [os.path.basename(place) for place in self.ended]

    @contextmanager
    def answered(self) -> Iterator[None]:
        """While it runs, what a model asks its tensors is noted, or followed."""
        self.met = False
        self.places, self.ended, self.loops, self.lookups = [], {}, [], []
        self._asking = _Asking(self)
        self._both = BothSides(self.module, self._asking.is_open, self.note, self.note_loop)
        try:
            with (
                numbers_asked(self.numbers),
                self._asking,
                both_sides_run(self._both, self.open, self.ways),
            ):
                yield
        finally:
            self._asking = None

    def results(
        self,
        call: Callable[[], list[Leaf]],
        inputs: Sequence[torch.Tensor],
        weights: Callable[[], Mapping[fx.Node, Any]],
    ) -> list[Leaf]:
        """What the model returns, merged over all ways.

        Args:
            call: Calls it.
            inputs: What it is given.
            weights: Gives the values of its weights and buffers, by their nodes.

        Raises:
            NotExportableError: There are too many ways, or two cannot be merged.
        """
        asking = self._asking
        if asking is None:
            return call()
        asking.weights = weights
        if not self.follows:
            return call()
        return _Walk(self, asking, call, [*inputs, *self.module.parameters(), *self.module.buffers()]).run()

    def is_under_way(self) -> bool:
        """Whether a branch both of whose sides run is under way."""
        return self._both is not None and bool(self._both.running)

    def note(self, place: str) -> None:
        """Note that a decision was followed."""
        if place not in self.places:
            self.places.append(place)

    def note_loop(self, place: str) -> None:
        """Note that the graph has a loop."""
        if place not in self.loops:
            self.loops.append(place)

    def note_lookup(self, place: str) -> None:
        """Note that one of some modules is looked up."""
        if place not in self.lookups:
            self.lookups.append(place)


@dataclass(frozen=True)
class _Question:
    """What a model asked.

    Attributes:
        place: `file:line`.
        truth: What it asked for, a tensor () of bool.
        answer: What it was answered.
    """

    place: str
    truth: torch.Tensor
    answer: bool


class _Asking(TorchFunctionMode):
    """Answers what a model asks its tensors."""

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self.weights: Callable[[], Mapping[fx.Node, Any]] = dict
        self.answers: tuple[bool, ...] = ()  # to the questions of one call, in order; then "true"
        self.asked: list[_Question] = []
        self._answered: dict[fx.Node, bool] = {}
        self._looks = False
        self._unfollowed = 0
        self._decisions = decisions

    def start(self, answers: tuple[bool, ...]) -> None:
        """Begin a call with the answers to its first questions."""
        self.answers, self.asked, self._answered = answers, [], {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__bool__:
            node, frame = node_of(args[0]), asking_frame()
            if frame is not None and is_untraced():
                self._require_converted(place_of(frame))
            elif node is not None and frame is not None and _is_one_number(args[0]):
                if writes_by_its_mask(frame):
                    return True
                return self._answer(args[0], node, place_of(frame))
        if func is torch.Tensor.item and is_traced(args[0]):
            number = number_of(args[0])
            if number is not None:
                return number
        return call_with(func, args, kwargs)

    def _require_converted(self, place: str) -> None:
        """A question in a step of a loop is the graph's, and so the branch there must be one that runs both sides."""
        if place not in self._decisions.open and not self._looks:
            self._decisions.open.add(place)
            self._decisions.met = True
            raise DecisionMetError(place)

    def is_open(self, value: Any) -> bool:
        """Whether a value is a tensor whose truth only the graph knows."""
        if not isinstance(value, torch.Tensor) or not _is_one_number(value):
            return False
        if is_untraced():  # a step of a loop that is tried: nothing is known of values there
            return True
        if node_of(value) is None:
            return False
        self._looks = True
        try:
            bool(value)
        except _OpenError:
            return True
        finally:
            self._looks = False
        return False

    def _answer(self, value: torch.Tensor, node: fx.Node, place: str) -> bool:
        if self._looks:
            raise _OpenError
        known = self._answered.get(node)
        if known is None:
            known = known_truth(node, self.weights())
        if known is not None:
            return known
        if not self._decisions.follows:  # the trace is made again: see what else there is
            self._decisions.open.add(place)
            self._decisions.met = True
            self._unfollowed += 1
            if self._unfollowed > MOST_WAYS:  # a `while` whose test is always true would not end
                raise DecisionMetError(place)
            return True
        if len(self.asked) >= MOST_WAYS:  # each question has another answer, and so another way
            _refuse_many([*self._decisions.places, place])
        if place not in self._decisions.open:
            self._decisions.open.add(place)
            if is_converted(place, self._decisions.open, self._decisions.ways):
                self._decisions.met = True
                raise DecisionMetError(place)
        answer = self.answers[len(self.asked)] if len(self.asked) < len(self.answers) else True
        self.asked.append(_Question(place, truth_of(value), answer))
        self._answered[node] = answer
        self._decisions.note(place)
        return answer


class _OpenError(Exception):
    """A question that only the graph can answer, where nobody wants an answer."""


def _is_one_number(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) and size == 1 for size in value.shape)


@dataclass(frozen=True)
class _Ended:
    """A way that ends in the model's own `raise`."""

    error: Exception


_Result = list[Leaf] | _Ended


class _Walk:
    """The walk through the tree of answers."""

    def __init__(
        self,
        decisions: Decisions,
        asking: _Asking,
        call: Callable[[], list[Leaf]],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        self._decisions, self._asking, self._call = decisions, asking, call
        self._tensors, self._writes = tensors, [writes_to(tensor) for tensor in tensors]
        self._state = State.of(decisions.module, values=False)
        self._ways = 0

    def run(self) -> list[Leaf]:
        result, _ = self._explored(())
        if isinstance(result, _Ended):
            raise result.error
        return result

    def _explored(self, answers: tuple[bool, ...]) -> tuple[_Result, Sequence[_Question]]:
        """The result of all ways that begin with some answers; and what was asked on the first of them."""
        result, asked = self._one(answers)
        for number in reversed(range(len(answers), len(asked))):
            question = asked[number]
            turned = (*(each.answer for each in asked[:number]), not question.answer)
            other, asked_there = self._explored(turned)
            if [each.place for each in asked_there[: number + 1]] != [
                each.place for each in asked[: number + 1]
            ]:
                raise NotExportableError(
                    "a decision on the values of a tensor is asked for in another order when the model is called again",
                    code=Code.VALUES_DECIDE,
                    where=question.place,
                )
            result = self._merged(question, result, other)
        return result, asked

    def _one(self, answers: tuple[bool, ...]) -> tuple[_Result, Sequence[_Question]]:
        self._ways += 1
        if self._ways > MOST_WAYS:
            _refuse_many(self._decisions.places)
        self._asking.start(answers)
        result: _Result
        try:
            with modules_left():
                result = self._call()
        except Exception as error:
            ours = isinstance(error, NotExportableError) or self._decisions.is_under_way()
            if ours or not _is_raised_by_model(error):
                raise
            result = _Ended(error)
        asked = list(self._asking.asked)
        self._state.restore()
        if asked and [writes_to(tensor) for tensor in self._tensors] != self._writes:
            raise NotExportableError(
                "a model that decides on the values of a tensor writes into an input or a weight",
                code=Code.VALUES_DECIDE,
                where=asked[-1].place,
                hint="compute with a copy of it: x = x.clone()",
            )
        return result, asked

    def _merged(self, question: _Question, one: _Result, other: _Result) -> _Result:
        """What two ways return that part at a question, the first after the answer "true"."""
        if isinstance(one, _Ended) or isinstance(other, _Ended):
            if isinstance(one, _Ended) is not isinstance(other, _Ended):
                self._decisions.ended[question.place] = isinstance(one, _Ended) is question.answer
            return other if isinstance(one, _Ended) else one
        names = [[leaf.name for leaf in found] for found in (one, other)]
        if names[0] != names[1]:
            _refuse(question, f"returns {' and '.join(names[0])} one way, {' and '.join(names[1])} the other")
        yes, no = (one, other) if question.answer else (other, one)
        return [_chosen(question, left, right) for left, right in zip(yes, no, strict=True)]


def _chosen(question: _Question, yes: Leaf, no: Leaf) -> Leaf:
    if not (yes.is_tensor and no.is_tensor):
        if yes.is_tensor or no.is_tensor or not _is_same(yes.value, no.value):
            _refuse(question, f"gives an output {yes.name} that is no tensor, and not the same both ways")
        return yes
    if yes.value.dtype is not no.value.dtype:
        _refuse(question, f"makes an output {yes.name} {yes.value.dtype} one way, {no.value.dtype} the other")
    if not same_shape(yes.value.shape, no.value.shape):
        shapes = [tuple(map(str, leaf.value.shape)) for leaf in (yes, no)]
        texts = [f"({', '.join(shape)})" for shape in shapes]
        _refuse(question, f"gives an output {yes.name} of shape {texts[0]} one way, {texts[1]} the other")
    node = node_of(yes.value)
    if yes.value is no.value or (node is not None and node is node_of(no.value)):
        return yes
    return replace(yes, value=torch.where(question.truth, yes.value, no.value))


def _is_same(yes: Any, no: Any) -> bool:
    if yes is no:
        return True
    plain = (bool, int, float, complex, str)
    return type(yes) is type(no) and isinstance(yes, plain) and bool(yes == no)


def _is_raised_by_model(error: Exception) -> bool:
    """Whether the innermost frame is the model's: it says `raise`, or has an assertion that fails."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and is_library_model(frames[-1].filename)


def _refuse(question: _Question, what: str) -> None:
    raise NotExportableError(
        f"a decision on the values of a tensor {what}",
        code=Code.VALUES_DECIDE,
        where=question.place,
        hint="a graph computes both ways and takes one: give both the same shapes and types",
    )


def _refuse_many(places: Sequence[str]) -> None:
    more = [f"and {len(places) - _NAMED} more"] if len(places) > _NAMED else []
    raise TooManyWaysError(
        f"decisions on the values of tensors lead to more than {MOST_WAYS} ways through the model",
        code=Code.VALUES_DECIDE,
        where="\n".join([*places[:_NAMED], *more]),
        hint="choose with torch.where where both sides can be computed, and decide outside of loops",
    )
