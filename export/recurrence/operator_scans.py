"""`as_loop`: an associative scan that is given its operator, `scan(operator, elements)`, as the loop it stands for.

    h(1) = e(1),    h(t) = operator(h(t - 1), e(t))

Such a scan combines neighbours in a tree, odd and even positions apart, so its trace holds for one length. Whether a
function is one is found out by running it with the operator that it is given, on random elements of several lengths,
and comparing with the loop: that also shows whether the operator is associative.

The variants that libraries have: elements are a tensor or several, nested in any way, of equal or different ranks;
time is any axis; `operator` is given elements with that axis, which may be of any size, or without it; the scan runs
forwards or backwards.

Source: G. Blelloch, Prefix sums and their applications, CMU-CS-90-190; the argument order is that of
`jax.lax.associative_scan`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_export.export.torch_compat.dispatch import no_modes
from moe_export.export.torch_compat.nesting import pytree

LENGTHS = (1, 2, 3, 5, 8, 13)
CLOSE = 1e-9  # of the largest value, in float64: a tree and a loop only differ in rounding
_PLAIN = (bool, int, float, str, type(None))

Operator = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class ScanCall:
    """A call that may be an associative scan.

    Attributes:
        operator: What is called with two elements.
        elements: The tensors, in the order of `nesting`.
        nesting: How they are nested in the argument.
        run: The call once more with another operator and other elements.
    """

    operator: Operator
    elements: tuple[Tensor, ...]
    nesting: pytree.TreeSpec
    run: Callable[[Any], Any]

    @property
    def symbolic(self) -> bool:
        """Whether the elements have no values or sizes of their own, in a trace."""
        sizes = (size for element in self.elements for size in element.shape)
        return any(isinstance(size, torch.SymInt) for size in sizes)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides whether it is a scan: the operator's code, and what its elements look like."""
        operator = inspect.unwrap(self.operator)
        code = getattr(operator, "__code__", operator)
        return (code, str(self.nesting), *((each.ndim, each.dtype) for each in self.elements))


@dataclass(frozen=True)
class Way:
    """How a function scans.

    Attributes:
        axes: For each element, the axis of time.
        backwards: Whether the last element comes first.
        alone: Whether the operator is given elements without that axis.
        result: How the results are nested.
    """

    axes: tuple[int, ...]
    backwards: bool
    alone: bool
    result: pytree.TreeSpec


def scan_call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> ScanCall | None:
    """The call as that of a scan: one function, one nest of tensors, and otherwise plain values; None if it is not."""
    values = [*args, *kwargs.values()]
    operators = [place for place, value in enumerate(values) if _is_function(value)]
    nests = [place for place, value in enumerate(values) if _is_nest(value)]
    others = [place for place, value in enumerate(values) if isinstance(value, _PLAIN)]
    if len(operators) != 1 or len(nests) != 1 or len(others) + 2 != len(values):
        return None
    elements, nesting = pytree.tree_flatten(values[nests[0]])

    def run(nest: Any) -> Any:
        replaced = [nest if place == nests[0] else value for place, value in enumerate(values)]
        return function(*replaced[: len(args)], **dict(zip(kwargs, replaced[len(args) :], strict=True)))

    return ScanCall(values[operators[0]], tuple(elements), nesting, run)


def way_of(call: ScanCall) -> Way | None:
    """How the called function scans; None if it does not.

    The elements have to be tensors with values: their sizes are taken over.
    """
    with no_modes(), torch.no_grad():
        for axes in _axes(call.elements):
            one = _random(call, axes, 1, positive=False)
            found = _called(call, one)
            if found is None or not _equal(found[0], one):
                continue  # of one element, a scan is that element, often in the nest that it was given in
            found = _called(call, _random(call, axes, 2, positive=False))
            if found is None:
                continue
            for backwards, alone in itertools.product((False, True), repeat=2):
                way = Way(axes, backwards, alone, found[1])
                if all(
                    _agrees(call, way, length, positive) for length in LENGTHS for positive in (False, True)
                ):
                    return way
    return None


def as_loop(call: ScanCall, way: Way) -> Any:
    """What the call returns, computed step by step."""
    length = call.elements[0].shape[way.axes[0]]
    if not length:
        return pytree.tree_unflatten(list(call.elements), way.result)
    steps: list[list[Tensor]] = []
    for step in reversed(range(length)) if way.backwards else range(length):
        now = [
            element.select(axis, step) if way.alone else element.select(axis, step).unsqueeze(axis)
            for element, axis in zip(call.elements, way.axes, strict=True)
        ]
        if steps:
            nested = (pytree.tree_unflatten(each, call.nesting) for each in (steps[-1], now))
            now = pytree.tree_leaves(call.operator(*nested))
        steps.append(now)
    if way.backwards:
        steps.reverse()
    join = torch.stack if way.alone else torch.cat
    joined = [join(each, axis) for each, axis in zip(zip(*steps, strict=True), way.axes, strict=True)]
    return pytree.tree_unflatten(joined, way.result)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor | nn.Module | type)


def _is_nest(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 0
    if not isinstance(value, tuple | list | dict):
        return False
    inner = pytree.tree_leaves(value)
    return bool(inner) and all(isinstance(each, Tensor) and each.ndim for each in inner)


def _axes(elements: Sequence[Tensor]) -> Iterator[tuple[int, ...]]:
    """The axes that may be time, counted from the front and, where ranks differ, from the back."""
    least = min(element.ndim for element in elements)
    from_front = [(axis,) * len(elements) for axis in range(least)]
    from_back = [tuple(element.ndim - axis for element in elements) for axis in range(1, least + 1)]
    for axes in dict.fromkeys((*from_front, *from_back)):
        if len({element.shape[axis] for element, axis in zip(elements, axes, strict=True)}) == 1:
            yield axes


def _random(call: ScanCall, axes: Sequence[int], length: int, *, positive: bool) -> list[Tensor]:
    drawn = np.random.default_rng(length)  # PyTorch's own are refused within `torch.vmap`
    made = []
    for element, axis in zip(call.elements, axes, strict=True):
        shape = list(element.shape)
        shape[axis] = length
        values = torch.from_numpy(drawn.standard_normal(shape))
        if element.is_complex():
            made.append(torch.complex(values, torch.from_numpy(drawn.standard_normal(shape))))
        elif element.is_floating_point():
            made.append(values.abs() if positive else values)
        else:
            made.append((values > 0).to(element.dtype))
    return made


def _called(call: ScanCall, elements: list[Tensor]) -> tuple[list[Tensor], pytree.TreeSpec] | None:
    nest = pytree.tree_unflatten([element.clone() for element in elements], call.nesting)
    try:
        found, result = pytree.tree_flatten(call.run(nest))
    except Exception:  # it takes no such elements
        return None
    return (found, result) if all(isinstance(each, Tensor) for each in found) else None


def _agrees(call: ScanCall, way: Way, length: int, positive: bool) -> bool:
    elements = _random(call, way.axes, length, positive=positive)
    found = _called(call, elements)
    try:
        loop = as_loop(ScanCall(call.operator, tuple(elements), call.nesting, call.run), way)
    except Exception:  # the operator does not take elements so
        return False
    return (
        found is not None
        and (length == 1 or found[1] == way.result)
        and _equal(found[0], pytree.tree_leaves(loop))
    )


def _equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.allclose(one, other, rtol=0, atol=CLOSE * _largest(other), equal_nan=True)
        for one, other in zip(found, wanted, strict=True)
    )


def _largest(values: Tensor) -> float:
    sizes = values.abs() if values.is_complex() or values.is_floating_point() else values.to(torch.float64)
    finite = sizes[sizes.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0
