"""`with_one_token_ways`: modules whose code for several tokens costs many times that for one have both, by the length.

    before   y[b, n, d], h' = several(x[b, n, d], h)                             fills n tokens up to a chunk
    after    y, h' = where(n == 1, one(x[b, :1, d], h), several(x[b, n, d], h))

Libraries branch in Python: a recurrence over several tokens is computed in chunks, one token as a step. A trace for any
number of tokens only has the chunks. Here such a module is called twice in the trace, once with the first token alone,
for which it takes its own step; the stage `sides` then computes only the one that is asked for.

Which modules these are is measured: a module is one if what it computes itself, without its parts, has many times as
many elements for two tokens as for one. How it is called for one token, and what it writes into the cache, is seen in
calls with one, two and three. A module that cannot be called so, as what it takes does not grow with the tokens one by
one, stays as it is. That the result is right is not known here: it is proved by comparing it, in parts, with the model.

Letters: b batch, n new tokens, d width, h a state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.export.frontend.caches import Kept
from moe_export.export.torch_compat.dispatch import OperatorMode
from moe_export.export.torch_compat.modules import Original, calls_of_modules
from moe_export.export.torch_compat.nesting import pytree

_MANY = 4
"""How many times the elements of one token those of two are, at least: 2 without chunks, about a chunk's size with."""

_CACHE = "the cache"  # among the arguments that were seen: each call has one of its own

_Run = Callable[[int, Callable[[Any], Any]], None]
"""Runs the decoder on so many tokens, inside a context that it makes of the cache."""


@dataclass(frozen=True)
class OneTokenCall:
    """How a module is called for one token, seen from its call for several.

    Attributes:
        path: Of the module.
        leaves: For each leaf of its arguments what it is for one token; None if it is no tensor, and always the same.
        writes: The states that it writes.
    """

    path: str
    leaves: tuple[_Growing | _Instead | None, ...]
    writes: tuple[Kept, ...]

    def arguments(self, leaves: Sequence[Any], count: Any) -> list[Any] | None:
        """The leaves for the first token, of those for `count` tokens; None if those are others than were seen."""
        pairs = zip(self.leaves, leaves, strict=True)
        if any(leaf is None and isinstance(value, Tensor) for leaf, value in pairs):
            return None
        return [
            value if leaf is None else leaf.first(value, count)
            for leaf, value in zip(self.leaves, leaves, strict=True)
        ]


@dataclass(frozen=True)
class _Growing:
    """A tensor, and the axes along which it has an entry more for each token more."""

    axes: tuple[int, ...]

    def first(self, value: Any, count: Any) -> Any:
        for axis in self.axes if isinstance(value, Tensor) else ():
            value = value.narrow(axis, 0, value.shape[axis] - count + 1)
        return value


@dataclass(frozen=True)
class _Instead:
    """A tensor in whose place one token has something else, as no mask."""

    value: Any

    def first(self, value: Any, count: Any) -> Any:
        return self.value


@contextmanager
def both_ways(calls: Sequence[OneTokenCall], module: nn.Module, cache: Any, count: Any) -> Iterator[None]:
    """While it runs, some modules compute both ways, and what they give is that of one token if `count` is 1.

    Args:
        calls: How these modules are called for one.
        module: What their paths begin at.
        cache: What they write their states into.
        count: How many tokens there are; a symbol in a trace.
    """
    found = {module.get_submodule(call.path): call for call in calls}

    def called(original: Original, at: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = found.get(at)
        if call is None:
            return original(at, *args, **kwargs)
        leaves, spec = _flat((args, kwargs), cache)
        alone = call.arguments(leaves, count)
        if alone is None:
            return original(at, *args, **kwargs)
        before = [kept.of(cache) for kept in call.writes]

        def way(values: Sequence[Any]) -> tuple[Any, list[Tensor]]:
            for kept, state in zip(call.writes, before, strict=True):
                kept.put(cache.layers[kept.layer], state.clone())
            some, named = pytree.tree_unflatten(list(values), spec)
            result = original(at, *some, **named)
            return result, [kept.of(cache) for kept in call.writes]

        one, several = way(alone), way(leaves)
        single = torch.full((), count, dtype=torch.int64) == 1
        results, states = pytree.tree_map(lambda a, b: _chosen(single, a, b), one, several)
        for kept, state in zip(call.writes, states, strict=True):
            kept.put(cache.layers[kept.layer], state)
        return results

    with calls_of_modules(called):
        yield


def _chosen(single: Tensor, one: Any, several: Any) -> Any:
    return torch.where(single, one.expand(several.shape), several) if isinstance(one, Tensor) else several


def one_token_calls(run: _Run, module: nn.Module, keeps: Sequence[Kept]) -> tuple[OneTokenCall, ...]:
    """The modules that compute many times as much for two tokens as for one, and how they are called for one.

    Args:
        run: Runs the decoder.
        module: What is looked at.
        keeps: All tensors of the cache.
    """
    one, two = (_elements(run, count) for count in (1, 2))
    costly = [path for path, at in module.named_modules() if two[at] > _MANY * one[at] > 0]
    if not costly:
        return ()
    seen = {
        count: _seen(run, count, {module.get_submodule(path): path for path in costly}, keeps)
        for count in (1, 2, 3)
    }
    calls = (_call(path, {count: found.get(path, []) for count, found in seen.items()}) for path in costly)
    return tuple(call for call in calls if call is not None)


class _Elements(OperatorMode):
    """Counts the elements that operators make, for each module those that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[nn.Module] = Counter()
        self.stack: list[nn.Module] = []

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        if self.stack and isinstance(result, Tensor):
            self.made[self.stack[-1]] += result.numel()
        return result

    def called(self, original: Original, at: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.stack.append(at)
        try:
            return original(at, *args, **kwargs)
        finally:
            self.stack.pop()


def _elements(run: _Run, count: int) -> Counter[nn.Module]:
    counter = _Elements()

    @contextmanager
    def counted(cache: Any) -> Iterator[None]:
        with calls_of_modules(counter.called), counter:
            yield

    run(count, counted)
    return counter.made


@dataclass(frozen=True)
class _Seen:
    """One call of a module.

    Attributes:
        spec: How its arguments are nested.
        leaves: Those of its arguments.
        results: Those of what it returns.
        writes: The states that are others after it.
    """

    spec: Any
    leaves: tuple[Any, ...]
    results: tuple[Any, ...]
    writes: tuple[Kept, ...]


def _seen(
    run: _Run, count: int, paths: Mapping[nn.Module, str], keeps: Sequence[Kept]
) -> dict[str, list[_Seen]]:
    found: dict[str, list[_Seen]] = {}

    @contextmanager
    def watched(cache: Any) -> Iterator[None]:
        def called(original: Original, at: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if at not in paths:
                return original(at, *args, **kwargs)
            leaves, spec = _flat((args, kwargs), cache)
            before = [kept.of(cache).clone() for kept in keeps]
            result = original(at, *args, **kwargs)
            writes = tuple(
                kept
                for kept, state in zip(keeps, before, strict=True)
                if not torch.equal(state, kept.of(cache))
            )
            results, _ = _flat(result, cache)
            found.setdefault(paths[at], []).append(
                _Seen(
                    spec, tuple(_CACHE if leaf is cache else leaf for leaf in leaves), tuple(results), writes
                )
            )
            return result

        with calls_of_modules(called):
            yield

    run(count, watched)
    return found


def _call(path: str, seen: Mapping[int, Sequence[_Seen]]) -> OneTokenCall | None:
    """How a module is called for one token; None if its calls do not show it."""
    if any(len(calls) != 1 for calls in seen.values()):
        return None
    one, two, three = (calls[0] for calls in seen.values())
    if not one.spec == two.spec == three.spec or not one.writes == two.writes == three.writes:
        return None
    if any(kept.grows is not None for kept in one.writes) or len(one.results) != len(three.results):
        return None
    try:
        leaves = [_leaf(values) for values in zip(one.leaves, two.leaves, three.leaves, strict=True)]
    except _UnlikeError:
        return None
    alike = all(_stretched(values) for values in zip(one.results, three.results, strict=True))
    return OneTokenCall(path, tuple(leaves), one.writes) if alike else None


class _UnlikeError(Exception):
    """What a module takes for one token does not follow from what it takes for several."""


def _leaf(values: tuple[Any, Any, Any]) -> _Growing | _Instead | None:
    """What is known of a leaf from its values for one, two and three tokens."""
    one, two, three = values
    tensors = [isinstance(value, Tensor) for value in values]
    if not any(tensors) and one == two == three:
        return None
    if tensors == [False, True, True]:
        return _Instead(one)
    if not all(tensors) or not one.dim() == two.dim() == three.dim():
        raise _UnlikeError
    sizes = list(zip(one.shape, two.shape, three.shape, strict=True))
    if any(b - a != c - b or b - a not in (0, 1) for a, b, c in sizes):
        raise _UnlikeError
    return _Growing(tuple(axis for axis, (a, b, _) in enumerate(sizes) if b > a))


def _stretched(values: tuple[Any, Any]) -> bool:
    """Whether a result for one token has the sizes of that for three, but for axes with one entry a token."""
    one, three = values
    if not isinstance(one, Tensor) or not isinstance(three, Tensor):
        return one is three or (type(one) is type(three) and bool(one == three))
    sizes = zip(one.shape, three.shape, strict=False)
    return (
        one.dim() == three.dim()
        and one.dtype == three.dtype
        and all(pair in ((1, 3), (pair[0],) * 2) for pair in sizes)
    )


def _flat(value: Any, cache: Any) -> tuple[list[Any], Any]:
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda each: each is cache)
    return list(leaves), spec
