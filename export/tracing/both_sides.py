"""What converted branches call (`branch_code`): both sides run, and the names that differ are merged.

    y = self.a(x) if t else x          where(t, a(x), x)

A branch in a loop over time would double the ways through a model in each step; merged where it stands, it is there
once a step, and the loop is folded like any other. A side must not be seen where it is not taken, so a branch is not
merged here if a side raises, writes into a tensor from before it, changes an attribute, or gives a name another shape,
type or Python value than the other side: `NotLocalError`, and the trace is made again with that branch as a way of its
own (`decisions`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from moe_export.export.frontend.state import State
from moe_export.export.sizes import same_shape
from moe_export.export.torch_compat.operators import Effect, effect_of
from moe_export.export.torch_compat.proxies import node_of
from moe_export.export.tracing.asked_numbers import AskedNumber, truth_of
from moe_export.export.tracing.branch_code import converted
from moe_export.export.tracing.open_loops import UNBOUND, NotLocalError, OpenLoop
from moe_export.export.tracing.syntax import BOTH

_PLAIN = (bool, int, float, complex, str, type(None))
_WRITES = {Effect.WRITES, Effect.UNKNOWN}


@dataclass
class BothSides:
    """Runs both sides of the branches whose tests only a graph can answer.

    Attributes:
        module: The model.
        is_open: Whether a value is a tensor whose truth only the graph knows.
        note: Is given `file:line` of each such branch.
        note_loop: Is given `file:line` of each loop that the graph has.
        running: The branches that are under way, by `file:line`, the innermost last.
    """

    module: nn.Module
    is_open: Callable[[Any], bool]
    note: Callable[[str], None]
    note_loop: Callable[[str], None]
    running: list[str] = field(default_factory=list)

    def begin(self, test: Any, key: str, names: Sequence[str], scope: Mapping[str, Any]) -> Decision:
        """Begin an `if`."""
        if not self.is_open(test):
            return Decision(yes := bool(test), not yes)
        self.note(key)
        return Decision(True, True, _Sides(self, truth_of(test), key), tuple(names), _values(names, scope))

    def loop(self, key: str) -> OpenLoop:
        """Begin a loop."""
        return OpenLoop(self.is_open, key, self.running, self.note_loop)

    def choose(self, test: Any, key: str, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """A conditional expression."""
        if not self.is_open(test):
            return yes() if test else no()
        self.note(key)
        sides = _Sides(self, truth_of(test), key)
        one = yes()
        sides.turn()
        other = no()
        return sides.merged(one, other)

    def all_of(self, *parts: Callable[[], Any]) -> Any:
        """`and`: parts after a false one are not asked."""
        return self._joined(parts, torch.logical_and, False)

    def any_of(self, *parts: Callable[[], Any]) -> Any:
        """`or`: parts after a true one are not asked."""
        return self._joined(parts, torch.logical_or, True)

    def negated(self, test: Any) -> Any:
        """`not`."""
        return truth_of(test).logical_not() if self.is_open(test) else not test

    def _joined(self, parts: Sequence[Callable[[], Any]], join: Callable[..., Any], decides: bool) -> Any:
        joined: torch.Tensor | None = None
        for part in parts:
            value = part()
            if self.is_open(value):
                joined = truth_of(value) if joined is None else join(joined, truth_of(value))
            elif bool(value) is decides:
                return decides
        return not decides if joined is None else joined


@dataclass
class Decision:
    """A branch under way.

    Attributes:
        yes: Whether the first side runs.
        no: Whether the second does.
    """

    yes: bool
    no: bool
    _sides: _Sides | None = None
    _names: tuple[str, ...] = ()
    _before: tuple[Any, ...] = ()
    _first: tuple[Any, ...] = ()

    @property
    def both(self) -> bool:
        """Whether both sides run."""
        return self._sides is not None

    def turn(self, scope: Mapping[str, Any]) -> tuple[Any, ...]:
        """After the first side: the values of names before it."""
        assert self._sides is not None
        self._first = _values(self._names, scope)
        self._sides.turn()
        return self._before

    def merge(self, scope: Mapping[str, Any]) -> tuple[Any, ...]:
        """After the second side: the values of names, merged."""
        assert self._sides is not None
        second = _values(self._names, scope)
        merged = self._sides.merged(self._first, second)
        return tuple(merged)

    def is_unbound(self, value: Any) -> bool:
        """Whether a name has no value."""
        return value is UNBOUND


class _Sides:
    """The two sides of one branch, watched."""

    def __init__(self, both: BothSides, truth: torch.Tensor, key: str) -> None:
        self._both, self._truth, self._key = both, truth, key
        self._state = State.of(both.module, values=False)
        self._last = node_of(truth)  # none where a step of a loop is tried outside of the trace
        while self._last is not None and self._last.next.op != "root":
            self._last = self._last.next
        both.running.append(key)

    def turn(self) -> None:
        """After the first side."""
        self._require_unseen()

    def merged(self, yes: Any, no: Any) -> Any:
        """What the two sides gave, as one."""
        self._require_unseen()
        result = self._merged(yes, no)
        self._both.running.pop()
        return result

    def _require_unseen(self) -> None:
        """Make sure that a side did nothing but compute."""
        if self._state.changed():
            raise NotLocalError(self._key)
        own: set[fx.Node] = set()
        if self._last is None:
            return
        node = self._last.next
        while node.op != "root":
            if node.op == "call_function":
                writes = effect_of(node.target) in _WRITES
                if writes and _owner(node, own) not in own:
                    raise NotLocalError(self._key)
                own.add(node)
            node = node.next

    def _merged(self, yes: Any, no: Any) -> Any:
        if yes is no or no is UNBOUND:
            return yes
        if yes is UNBOUND:
            return no
        if isinstance(yes, torch.Tensor) and isinstance(no, torch.Tensor):
            if yes.dtype is not no.dtype or not same_shape(yes.shape, no.shape):
                raise NotLocalError(self._key)
            return torch.where(self._truth, yes, no)
        if isinstance(yes, AskedNumber) and isinstance(no, AskedNumber) and yes.is_float is no.is_float:
            return AskedNumber(torch.where(self._truth, yes.value, no.value))
        if type(yes) is not type(no):
            raise NotLocalError(self._key)
        if type(yes) in (tuple, list) and len(yes) == len(no):
            return type(yes)(self._merged(one, other) for one, other in zip(yes, no, strict=True))
        if isinstance(yes, dict) and list(yes) == list(no):
            return {key: self._merged(yes[key], no[key]) for key in yes}
        if isinstance(yes, _PLAIN) and yes == no:
            return yes
        raise NotLocalError(self._key)


def _owner(node: fx.Node, own: Collection[fx.Node]) -> fx.Node | None:
    """The value that an operator which writes changes, or one of which it changes a part."""
    seen = node.all_input_nodes[0] if node.all_input_nodes else None
    while seen is not None and seen in own and effect_of(seen.target) is not Effect.NONE:
        seen = seen.all_input_nodes[0] if seen.all_input_nodes else None
    return seen


def _values(names: Sequence[str], scope: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(scope.get(name, UNBOUND) for name in names)


def is_converted(place: str, places: Collection[str], apart: Collection[str]) -> bool:
    """Whether the question at a `file:line` belongs to a branch that is converted where others are, too."""
    path, _, line = place.rpartition(":")
    lines = converted(path, _by_file(places)[path], _by_file(apart).get(path, frozenset())).lines
    return int(line) in lines


@contextmanager
def both_sides_run(both: BothSides, places: Collection[str], apart: Collection[str]) -> Iterator[None]:
    """While it runs, functions run both sides of branches on tensors.

    Args:
        both: What they call.
        places: `file:line` where tensors are asked.
        apart: Branches that are left as they are.
    """
    lines = _by_file(places)
    codes = {
        before: after
        for path, asked in lines.items()
        for before, after in converted(path, asked, _by_file(apart).get(path, frozenset())).codes
    }
    changed: list[tuple[FunctionType, Any]] = []
    named: list[dict[str, Any]] = []
    try:
        for function in _functions(lines) if codes else ():
            after = codes.get(function.__code__)
            if after is not None and len(after.co_freevars) == len(function.__code__.co_freevars):
                changed.append((function, function.__code__))
                function.__code__ = after
                if BOTH not in function.__globals__:
                    function.__globals__[BOTH] = both
                    named.append(function.__globals__)
        yield
    finally:
        for function, before in changed:
            function.__code__ = before
        for names in named:
            del names[BOTH]


def _functions(paths: Collection[str]) -> list[FunctionType]:
    """The functions of some files, as far as they exist by now."""
    objects = gc.get_objects()  # there may be millions: no line of Python for each
    functions = compress(objects, map(is_, map(type, objects), repeat(FunctionType)))
    return [each for each in functions if each.__code__.co_filename in paths]


def _by_file(places: Collection[str]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for place in places:
        path, _, line = place.rpartition(":")
        found.setdefault(path, set()).add(int(line))
    return {path: frozenset(lines) for path, lines in found.items()}
