"""`conditions_of`: for which sizes a trace holds, read off the tracer's guards.

A trace goes one way through the model. Wherever a size decided the way, the tracer's shape environment has a guard:

    x.shape[1] > 48                     s41 <= 48
    x.reshape(-1, d).shape[0] > 256     s21*s41 <= 256
    chunks of 64, one in the trace      ((s41 + Mod(64 - Mod(s41, 64), 64))//64) == 1

Each guard, in whatever form, becomes a `Condition` in the names of dimensions. Most hold whatever the sizes are (a
reshape that fits always fits). Whether one does is not proved symbolically but found out: it is evaluated at all small
sizes, and at and about its constants, their multiples and powers of two; what fails at any of them is kept.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from moe_export.domain import Condition, Domain, parsed
from moe_export.export.torch_compat.sizes import is_remainder
from moe_export.export.tracing.dims import Dim

Sizes = dict[str, NDArray[Any]]

_DENSE = 2048  # every size up to here is looked at: more than most chunks, windows and tables of positions
_SPARSE = 2**16
_TOP = 512  # every size so far beyond, too: what takes whole chunks only may take none of the sparse ones
_DRAWN = 4096  # combinations of sizes, for conditions on several dimensions
_FEW, _FEW_DRAWN = 8, 64  # with fewer sizes, or combinations, nothing is said to follow from what holds there
_FUNCTIONS = {
    "FloorDiv": "{} // {}",
    "CleanDiv": "{} // {}",
    "Mod": "{} % {}",
    "PythonMod": "{} % {}",
    "IntTrueDiv": "{} / {}",
    "FloatTrueDiv": "{} / {}",
    "FloatPow": "{} ** {}",
    "PowByNatural": "{} ** {}",
    "Pow": "{} ** {}",
    "Equality": "{} == {}",
    "Unequality": "{} != {}",
    "LessThan": "{} <= {}",
    "StrictLessThan": "{} < {}",
    "GreaterThan": "{} >= {}",
    "StrictGreaterThan": "{} > {}",
    "ToFloat": "{}",
    "Identity": "{}",
    "TruncToInt": "int({})",
    "FloorToInt": "floor({})",
    "CeilToInt": "ceil({})",
    "floor": "floor({})",
    "ceiling": "ceil({})",
    "Not": "not {}",
    "ModularIndexing": "{} // {} % {}",
}
_MANY: dict[str, str] = {"Mul": "*", "And": " and ", "Or": " or "}
_CALLS = {"Max": "max", "Min": "min"}


def conditions_of(program: ExportedProgram, dims: Sequence[Dim]) -> tuple[Condition, ...]:
    """The conditions on sizes that a trace holds for, less those that hold whatever the sizes are.

    Args:
        program: The trace.
        dims: What is free in it; a condition on two symbols of one dimension is one on that dimension.
    """
    names = {symbol: dim.name for dim in dims for symbol in (dim.symbol, *dim.also)}
    found: dict[str, Condition] = {}
    for guard in _guards(program):
        guard = _divided(_without_common_factors(guard))  # noqa: PLW2901
        used = {str(symbol) for symbol in guard.free_symbols}
        if not used or not used <= names.keys():
            continue  # sizes that depend on values are checked as the graph runs
        try:
            text = ast.unparse(parsed(printed(guard, names)))  # without parentheses that say nothing
            condition = Condition(text, caution=_is_caution(guard))
        except _UnknownError:
            for name in sorted(
                {names[symbol] for symbol in used}
            ):  # then it is right at the traced sizes only
                text = f"{name} == {next(dim.traced for dim in dims if dim.name == name)}"
                found.setdefault(text, Condition(text))
            continue
        known = found.get(condition.text)
        if known is None or known.caution:
            found[condition.text] = condition
    probes = Probes(dims, found.values())
    return tuple(condition for condition in found.values() if not probes.always(condition))


def _guards(program: ExportedProgram) -> Iterator[sympy.Basic]:
    """What the shape environment of a trace knows, with sizes that came out equal under one symbol."""
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    free = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    if free is None:
        return
    known = free.node.shape_env
    asserts = [each.expr for deferred in known.deferred_runtime_asserts.values() for each in deferred]
    for expression in (*(guard.expr for guard in known.guards), *asserts):
        condition = known.replace(expression)
        if condition not in (sympy.true, True):
            yield from condition.args if isinstance(condition, sympy.And) else (condition,)


def _without_common_factors(guard: sympy.Basic) -> sympy.Basic:
    """Remainders of smaller numbers: `128*batch*sequence % (1024*batch)` is `128*batch * (sequence % 8)`."""

    def smaller(remainder: sympy.Basic) -> sympy.Basic:
        number, divisor = remainder.args
        common = sympy.gcd(number, divisor)
        if not all(
            isinstance(factor, (sympy.Symbol, sympy.Integer)) for factor in sympy.Mul.make_args(common)
        ):
            return remainder
        return common * remainder.func(sympy.cancel(number / common), sympy.cancel(divisor / common))

    return guard.replace(is_remainder, smaller)


def _divided(guard: sympy.Basic) -> sympy.Basic:
    """A relation without what both sides are multiplied by: sizes are never negative, and 0 is tried apart.

    batch*sequence == 8*batch*(sequence//8)   →   sequence == 8*(sequence//8)
    8*sequence == 8*int(sequence**0.5)**2     →   sequence == int(sequence**0.5)**2
    """
    if not isinstance(guard, sympy.core.relational.Relational):
        return guard
    difference = sympy.factor_terms(guard.lhs - guard.rhs)
    if not isinstance(difference, sympy.Mul):
        return guard
    sizes = [factor for factor in difference.args if isinstance(factor, sympy.Symbol)]
    number, remainder = (difference / sympy.Mul(*sizes)).as_coeff_Mul()
    if is_remainder(remainder) and number > 0:
        return guard.func(remainder, 0)
    factor = number if isinstance(guard, sympy.Eq) and number > 0 else 1
    if not sizes and factor == 1:
        return guard
    rest = sympy.expand_mul(difference / sympy.Mul(*sizes, factor))
    terms = sympy.Add.make_args(rest)
    left = [term for term in terms if not term.could_extract_minus_sign()]
    right = [-term for term in terms if term.could_extract_minus_sign()]
    return guard.func(sympy.Add(*left), sympy.Add(*right))


class _UnknownError(Exception):
    """An expression has a part that no condition can be written with."""


def printed(expression: sympy.Basic, names: Mapping[str, str]) -> str:
    """An expression of the tracer's symbols as Python, in the names of dimensions."""
    if isinstance(expression, sympy.Symbol):
        return names[str(expression)]
    if isinstance(expression, sympy.Rational) and not expression.is_Integer:
        return f"({expression.p} / {expression.q})"
    if isinstance(expression, sympy.Number):
        number = int(expression) if expression.is_Integer else float(expression)
        return repr(number) if number >= 0 else f"({number!r})"
    kind = type(expression).__name__
    parts = [printed(part, names) for part in expression.args]
    if kind in _CALLS:
        return f"{_CALLS[kind]}({', '.join(parts)})"
    if kind == "Add":
        return f"({_sum(expression, names)})"
    if kind in _MANY:
        return f"({_MANY[kind].join(parts)})"
    form = _FUNCTIONS.get(kind)
    if form is None or form.count("{}") != len(parts):
        raise _UnknownError(kind)
    return f"({form.format(*parts)})"


def _sum(expression: sympy.Basic, names: Mapping[str, str]) -> str:
    """Its terms, those that are subtracted last."""
    terms = sorted(expression.args, key=lambda term: bool(term.could_extract_minus_sign()))
    text = printed(terms[0], names)
    for term in terms[1:]:
        minus = term.could_extract_minus_sign()
        text += f" - {printed(-term, names)}" if minus else f" + {printed(term, names)}"
    return text


def _is_caution(guard: sympy.Basic) -> bool:
    """Whether a guard only says that something is not 0, not 1, or not by chance equal to something else.

    The tracer asks that of every size that might be broadcast, and takes "no" for an answer that must stay.
    """
    if isinstance(guard, sympy.Ne):
        return True
    if isinstance(guard, (sympy.Gt, sympy.Ge)):
        larger, smaller, strict = guard.lhs, guard.rhs, isinstance(guard, sympy.Gt)
    elif isinstance(guard, (sympy.Lt, sympy.Le)):
        larger, smaller, strict = guard.rhs, guard.lhs, isinstance(guard, sympy.Lt)
    else:
        return False
    return bool(larger.free_symbols) and smaller in ((0, 1) if strict else (0, 1, 2))


class Probes:
    """Sizes at which conditions are evaluated: dense where models change, sparse beyond.

    Args:
        dims: The dimensions; sizes stay within their bounds.
        conditions: Whose constants are looked at more closely.
    """

    def __init__(self, dims: Sequence[Dim], conditions: Any) -> None:
        self._domain = Domain(tuple(conditions))
        self._dims = {dim.name: dim for dim in dims}
        self._of: dict[str, NDArray[Any]] = {}

    def always(self, condition: Condition) -> bool:
        """Whether a condition holds at all of them, and between them."""
        return self.follows(condition, self.sizes(condition))

    def follows(self, condition: Condition, sizes: Sizes) -> bool:
        """Whether sizes say that a condition holds: it does at each of them, and between them, too."""
        return bool(np.all(self.holding(condition, sizes))) and not self.may_fail_between(condition, sizes)

    def may_fail_between(self, condition: Condition, sizes: Sizes) -> bool:
        """Whether two things that must not be equal may be so between some sizes, by which is the greater one.

        `height*width != 360000` holds at nearly all sizes that are looked at, and not at 600 x 600.
        """
        looked_at = next(iter(sizes.values()))
        with np.errstate(all="ignore"):
            signs = [np.broadcast_to(np.sign(gap), looked_at.shape) for gap in condition.gaps(sizes)]
        if len(condition.names) > 1:
            return any(len(np.unique(sign)) > 1 for sign in signs)
        apart = np.diff(looked_at) > 1  # no size is between neighbours
        return any(np.any(apart & (sign[1:] != sign[:-1])) for sign in signs)

    def holding(self, condition: Condition, sizes: Sizes) -> NDArray[Any]:
        """Where it holds."""
        with np.errstate(all="ignore"):
            found = condition.holds(sizes)
        return np.broadcast_to(np.asarray(found, dtype=bool), next(iter(sizes.values())).shape)

    def sizes(self, condition: Condition) -> Sizes:
        """Sizes of the dimensions that a condition is about."""
        names = sorted(condition.names)
        if len(names) == 1:
            return {names[0]: self.alone(names[0])}
        drawn = np.random.default_rng(0)
        return {name: drawn.choice(self.telling(name), _DRAWN) for name in names}

    def alone(self, name: str) -> NDArray[Any]:
        """All small sizes of a dimension, and the telling ones."""
        if name not in self._of:
            dense = np.concatenate([np.arange(2, _DENSE), np.arange(_SPARSE, _SPARSE + _TOP + 1)])
            self._of[name] = self._within(name, np.union1d(dense, self._sparse(name)))
        return self._of[name]

    def telling(self, name: str) -> NDArray[Any]:
        """A few sizes of a dimension, for combinations."""
        few = np.concatenate([np.arange(2, 18), self._sparse(name), [self._dims[name].traced]])
        return self._within(name, np.unique(few[few < 2**13]))

    def _sparse(self, name: str) -> NDArray[Any]:
        powers = [2**k + d for k in range(1, 17) for d in (-1, 0, 1)]
        near = [size for size in self._domain.near(name) if size <= _SPARSE]
        return np.array(sorted({*powers, *near, *(3 * size + 1 for size in near)}), dtype=np.int64)

    def _within(self, name: str, sizes: NDArray[Any]) -> NDArray[Any]:
        # 1 and 0 are what tracers take for special, and say in every trace; what is wrong at 1 is found by running it.
        dim = self._dims[name]
        lowest, highest = max(2, dim.minimum), dim.maximum or _SPARSE + _TOP
        kept = sizes[(sizes >= lowest) & (sizes <= highest)]
        return kept if len(kept) else np.array([dim.traced], dtype=np.int64)


def simplified(
    conditions: Sequence[Condition], dims: Sequence[Dim]
) -> tuple[tuple[Dim, ...], tuple[Condition, ...]]:
    """The same domain in fewer words: bounds of dimensions, `sequence % 8 == 0`, and what is neither.

    Returns:
        The dimensions with narrower bounds, and the conditions that are left.
    """
    probes = Probes(dims, conditions)
    kept = [condition for condition in conditions if len(condition.names) > 1]
    result = []
    for dim in dims:
        own = [condition for condition in conditions if condition.names == {dim.name}]
        bounded, further = _in_words(dim, own, probes)
        result.append(bounded)
        kept += further
    return tuple(result), _independent(kept, result)


def _independent(conditions: Sequence[Condition], dims: Sequence[Dim]) -> tuple[Condition, ...]:
    """The conditions less those that follow from the bounds of dimensions, or from simpler ones.

    Windows of an image, `x.view(b, h // 8, 8, w // 8, 8)`, need `h % 8 == 0` and `w % 8 == 0`; of each reshape that
    follows, the tracer notes that it fits, which it does there.
    """
    probes = Probes(dims, conditions)
    kept = [condition for condition in conditions if not probes.always(condition)]
    several = [condition for condition in kept if len(condition.names) > 1]
    if not several:
        return tuple(kept)
    drawn = np.random.default_rng(0)
    sizes = {}
    for name in sorted({name for condition in several for name in condition.names}):
        own = [condition for condition in kept if condition.names == {name}]
        telling = {name: probes.telling(name)}
        right = np.logical_and.reduce([probes.holding(each, telling) for each in own] or [telling[name] > 0])
        if np.count_nonzero(right) < _FEW:
            return tuple(kept)
        sizes[name] = drawn.choice(telling[name][right], _DRAWN)
    there = np.ones(_DRAWN, dtype=bool)
    for condition in sorted(several, key=lambda each: (len(each.names), len(each.text))):
        inside = {name: array[there] for name, array in sizes.items()}
        if np.count_nonzero(there) >= _FEW_DRAWN and probes.follows(condition, inside):
            kept.remove(condition)
        there &= probes.holding(condition, sizes)
    return tuple(kept)


def _in_words(dim: Dim, own: Sequence[Condition], probes: Probes) -> tuple[Dim, list[Condition]]:
    sizes = probes.alone(dim.name)
    holds = np.ones(len(sizes), dtype=bool)
    for condition in own:
        holds &= probes.holding(condition, {dim.name: sizes})
    right = sizes[holds]
    if not own or not len(right):
        return dim, list(own)
    if right[0] > max(2, dim.minimum):
        dim = replace(dim, minimum=int(right[0]))
    elif any(probes.always(each) and not each.holds({dim.name: 1}) for each in own):
        dim = replace(dim, minimum=max(2, dim.minimum))
    if right[-1] < min(sizes[-1], _SPARSE):
        dim = replace(dim, maximum=int(right[-1]))
    inside = sizes[(sizes >= right[0]) & (sizes <= right[-1])]
    rare = [each for each in own if probes.may_fail_between(each, {dim.name: inside})]
    if len(inside) == len(right):
        return dim, rare
    step = int(np.gcd.reduce(np.diff(right))) if len(right) > 1 else 0
    if step > 1 and np.array_equal(inside[inside % step == right[0] % step], right):
        return dim, [Condition(f"{dim.name} % {step} == {int(right[0]) % step}"), *rare]
    return dim, _without_implied(dim, own, inside, probes)


def _without_implied(
    dim: Dim, own: Sequence[Condition], inside: NDArray[Any], probes: Probes
) -> list[Condition]:
    """Conditions on one dimension less those that follow from the others, the longest first.

    Of `int(n ** 0.5) ** 2 == n` the tracer notes each reshape that follows from it, too.
    """
    kept = list(own)
    for condition in sorted(own, key=lambda each: (len(each.text), each.text), reverse=True):
        there = inside
        for other in kept:
            if other is not condition:
                there = there[probes.holding(other, {dim.name: there})]
        if len(there) >= _FEW and probes.follows(condition, {dim.name: there}):
            kept.remove(condition)
    return kept
