"""What converted loops call (`loop_code`): a loop whose number of steps only the graph knows becomes one `while_loop`.

    while (s < 1).any():        while_loop(lambda s, h: (s < 1).any(), lambda s, h: ..., (s, h))
        h, s = self.step(h, s)
    for _ in range(int(n)):     the same, with a counter
    for _ in range(100):        the same, with whether it has stopped
        ...
        if error < 1e-3:
            break

Steps are taken in Python as long as it knows the answer, which it does before a first state of zeros; from the first
question that only the graph can answer on, the rest is the loop of the graph.

It carries the names that a step gives other values: tensors, and numbers, which are tensors () of int64 and float64
there (`asked_numbers`). Each must keep its type, dtype and shape. A name without a value before the loop has none
after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from moe_export.errors import Code, NotExportableError
from moe_export.export.sizes import same_shape
from moe_export.export.torch_compat.higher_order import AnotherStepError, WritesAroundError, looped
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.torch_compat.proxies import untraced
from moe_export.export.tracing.asked_numbers import AskedNumber, truth_of


class _Unbound:
    """Stands for a name that has no value yet."""


UNBOUND = _Unbound()


_PLAIN = (bool, int, float, complex, str, type(None))
_EACH_TIME = "takes something else in each step, from an iterator or a list"


class NotLocalError(Exception):
    """The sides of a branch, or the steps of a loop, cannot be merged where they stand.

    Args:
        key: `file:line` of the test.
        why: What a loop does.
    """

    def __init__(self, key: str, why: str = "") -> None:
        super().__init__(key)
        self.key, self.why = key, why


class LoopRefusedError(NotExportableError):
    """A loop that nothing but a graph can have, and no graph can."""


class OpenLoop:
    """A loop under way.

    Args:
        asks_graph: Whether a value is a tensor whose truth only the graph knows.
        key: `file:line` of what asks.
        running: The branches and loops that are under way, by their keys.
        note: Is given the key if the graph has the loop.

    Attributes:
        is_open: Whether the rest of it is the graph's.
        is_counted: Whether nothing but the graph knows even how many steps there are at most.
    """

    def __init__(
        self, asks_graph: Callable[[Any], bool], key: str, running: list[str], note: Callable[[str], None]
    ) -> None:
        self.is_open = self.is_counted = False
        self._asks_graph, self._key, self._running, self._note = asks_graph, key, running, note
        self._stopped: torch.Tensor | None = None
        self._is_range = True
        self._start: Any = 0
        self._steps: Any = None  # how many steps are left, where they are counted
        self._step: Any = 1

    # What the loop in Python asks

    def goes(self, test: Callable[[], Any]) -> bool:
        """Whether a `while` goes on in Python."""
        value = test()
        self.is_open = self._is_question(value)
        return not self.is_open and bool(value)

    def counted(self, function: Any, *limits: Any) -> Iterator[Any]:
        """What a `for ... in range(...)` runs over in Python."""
        if not any(isinstance(each, AskedNumber) for each in limits):
            numbers = function(*limits)
            self._is_range = isinstance(numbers, range)
            for place, value in enumerate(numbers):
                if self._is_range:
                    self._start, self._step, self._steps = value, numbers.step, len(numbers) - place
                yield value
            return
        start, stop, step = (0, *limits, 1) if len(limits) == 1 else (*limits, 1)[:3]
        if isinstance(step, AskedNumber) or step == 0:
            raise LoopRefusedError(
                "the step of a range depends on the values of a tensor",
                code=Code.VALUES_DECIDE,
                where=self._key,
                hint="count in steps of a number, and multiply",
            )
        length = stop - start if step > 0 else start - stop
        self.is_open, self.is_counted, self._start, self._step = True, True, start, step
        self._steps = _as_number(length) if abs(step) == 1 else _quotient_up(_as_number(length), abs(step))

    def stops(self, test: Callable[[], Any]) -> bool:
        """Whether a step that ends in `if ...: break` ends the loop in Python."""
        value = test()
        if self._is_range and self._is_question(value):
            self.is_open, self._stopped = True, truth_of(value)
            if self._steps is not None:  # this step is taken
                self._start, self._steps = self._start + self._step, self._steps - 1
            return True
        return bool(value)

    # The rest of it

    def run(
        self,
        test: Callable[..., Any] | None,
        step: Callable[..., tuple[Any, ...]],
        names: Sequence[str],
        scope: Mapping[str, Any],
    ) -> tuple[Any, ...]:
        """Take the remaining steps in the graph.

        Args:
            test: Of a `while`: is given the values of names.
            step: Is given the values of names, after that of the counter where steps are counted; gives them anew,
                and whether a `break` was reached.
            names: The names that a step gives values to.
            scope: The values that they have.

        Returns:
            Their values after it, and that of the counter first where steps are counted: none where there may have been
            no step at all.

        Raises:
            LoopRefusedError, NotLocalError: A step gives a name another type, dtype or shape.
        """
        self._running.append(self._key)
        before = [scope.get(name, UNBOUND) for name in names]
        counts = self._steps is not None
        bound = [index for index, value in enumerate(before) if value is not UNBOUND]
        leaves, spec = pytree.tree_flatten([before[index] for index in bound])
        stopped = self._stopped if self._stopped is not None else torch.zeros((), dtype=torch.bool)
        taken = torch.zeros((), dtype=torch.int64)
        plain: list[Any] = []  # what the last step gave that is no value of the graph

        def values(present: Sequence[Any]) -> list[Any]:
            found: list[Any] = list(before)
            for index, value in zip(bound, pytree.tree_unflatten(list(present), spec), strict=True):
                found[index] = value
            return found

        def counter(number: torch.Tensor) -> Any:
            return AskedNumber(number) * self._step + self._start

        def after(number: torch.Tensor, present: Sequence[Any]) -> tuple[list[Any], Any]:
            *given, ends = step(*([counter(number)] if counts else []), *values(present))
            plain[:] = [value for value in given if isinstance(value, _PLAIN)]
            found, found_spec = pytree.tree_flatten([given[index] for index in bound])
            if found_spec != spec:
                self._refuse("gives a name another structure in its second step")
            return found, ends

        carried = _Carried(leaves, self._refuse)
        while not carried.settled(untraced(lambda: after(taken, carried.start)[0])):
            pass  # each round has found one more number that changes
        before_again = list(plain)
        untraced(lambda: after(taken, carried.start))
        if plain != before_again:
            self._refuse(_EACH_TIME)

        def goes_on(number: torch.Tensor, ended: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            goes = ended.logical_not()
            if counts:
                goes = torch.logical_and(goes, number < _as_number(self._steps).value)
            if test is not None:
                goes = torch.logical_and(goes, _truth(test(*values(carried.values(tensors)))))
            return goes

        def body(number: torch.Tensor, ended: torch.Tensor, *tensors: torch.Tensor) -> tuple[Any, ...]:
            found, ends = after(number, carried.values(tensors))
            return number + 1, _truth(ends), *carried.tensors(found)

        try:
            taken, _, *tensors = looped(goes_on, body, (taken, stopped, *carried.tensors(carried.start)))
        except WritesAroundError:
            self._refuse("writes into a tensor from before it")
        except AnotherStepError:
            self._refuse(_EACH_TIME)
        self._running.pop()
        self._note(self._key)
        results = values(carried.values(tensors))
        if not counts:
            return tuple(results)
        return (UNBOUND if self.is_counted else counter(taken - 1), *results)

    def is_unbound(self, value: Any) -> bool:
        """Whether a name has no value."""
        return value is UNBOUND

    def _is_question(self, value: Any) -> bool:
        return isinstance(value, AskedNumber) or self._asks_graph(value)

    def _refuse(self, what: str) -> NoReturn:
        if not self.is_counted:
            raise NotLocalError(self._key, what)
        raise LoopRefusedError(
            f"a loop whose number of steps depends on the values of tensors {what}",
            code=Code.VALUES_DECIDE,
            where=self._key,
            hint="give each name a value of the same type, dtype and shape before the loop and in each step",
        )


class _Carried:
    """Which of the values that names have are carried as tensors: tensors, and numbers that change.

    Args:
        start: The values before the first step.
        refuse: Refuses what cannot be carried.
    """

    def __init__(self, start: Sequence[Any], refuse: Callable[[str], NoReturn]) -> None:
        self.start = list(start)
        self._refuse = refuse

    def settled(self, after: Sequence[Any]) -> bool:
        """Whether a step leaves the types of all values; where it makes a number one of the graph, it is one now."""
        known = True
        for place, (one, other) in enumerate(zip(self.start, after, strict=True)):
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                if one.dtype is not other.dtype or not same_shape(one.shape, other.shape):
                    self._refuse(f"changes {_described(one)} to {_described(other)}")
            elif isinstance(one, AskedNumber) and isinstance(other, AskedNumber | int | float):
                if one.is_float is not _as_number(other).is_float:
                    self._refuse("makes an integer a float")
            elif type(one) in (int, float) and isinstance(other, AskedNumber | int | float):
                if other is not one and not (type(other) is type(one) and other == one):
                    self.start[place], known = _as_number(one), False
            elif one is not other and not (
                isinstance(one, _PLAIN) and type(one) is type(other) and one == other
            ):
                self._refuse(f"changes {_described(one)} to {_described(other)}")
        return known

    def tensors(self, values: Sequence[Any]) -> list[torch.Tensor]:
        """Of values, what is carried."""
        return [
            value if isinstance(one, torch.Tensor) else _as_number(value).value
            for one, value in zip(self.start, values, strict=True)
            if isinstance(one, torch.Tensor | AskedNumber)
        ]

    def values(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """All values, some of them what was carried."""
        left = iter(tensors)
        return [
            next(left)
            if isinstance(one, torch.Tensor)
            else AskedNumber(next(left))
            if isinstance(one, AskedNumber)
            else one
            for one in self.start
        ]


def _truth(value: Any) -> torch.Tensor:
    known = not isinstance(value, torch.Tensor | AskedNumber)
    return torch.full((), bool(value)) if known else truth_of(value)


def _as_number(value: Any) -> AskedNumber:
    if isinstance(value, AskedNumber):
        return value
    if isinstance(value, torch.SymInt):
        return AskedNumber(torch.ops.aten.scalar_tensor(value, dtype=torch.int64))
    return AskedNumber(torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64))


def _quotient_up(number: AskedNumber, divisor: int) -> AskedNumber:
    return AskedNumber(torch.div(number.value + (divisor - 1), divisor, rounding_mode="floor"))


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor ({', '.join(map(str, value.shape))}) of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
