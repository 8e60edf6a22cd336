"""`widest_trace`: of the ways in which a model can be traced, the one that holds for the most sizes.

    trace at the example ─▶ conditions ─▶ those that prove needless are lifted ─▶ does the model take more sizes?
                                                                                    │ yes
                         trace with the bounds of slices as sizes (`slices`)     ◀──┤
                         trace at a size of our own choosing                     ◀──┘

A trace at 16 tokens goes through one chunk of 64, and "how many chunks" is 1 in it for good. At 197 tokens there are
four and a remainder, and nothing that is derived from the size is 0, 1, or equal to something else by chance.

What remains of the conditions (`needless`) is what the graph is right for, and is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moe_export.domain import Condition, Domain
from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.constants import constants_of
from moe_export.export.tracing.dims import Dim, DimRequest
from moe_export.export.tracing.fixed_sizes import resized
from moe_export.export.tracing.guards import Probes, conditions_of, simplified
from moe_export.export.tracing.lengths import operators
from moe_export.export.tracing.needless import MOST_ELEMENTS, needed, wrong_at_one
from moe_export.export.tracing.slices import has_constant_bounds, sized_bounds
from moe_export.export.tracing.trace import Traced, quiet, trace
from moe_export.export.tracing.widen import AxisRef, accepts

_MOST_CHUNK = 512  # a constant that is larger is a table's length or a width, and three times it a slow run
_MORE_OPERATORS = 1.5  # a loop that is unrolled is longer at a greater length, and so is its trace


def widest_trace(subject: Subject, request: DimRequest | None = None) -> Traced:
    """Trace a model so that the result holds for as many sizes as can be, and say for which.

    Args:
        subject: The model and its example inputs.
        request: Which dimensions to leave free, and their names; default: all of them.

    Raises:
        NotExportableError: As `trace`.
    """
    best = _widest(subject, request or DimRequest())
    with quiet():
        return within(best, wrong_at_one(best, subject))


def _widest(subject: Subject, request: DimRequest) -> Traced:
    best = first = _with_domain(trace(subject, request), subject)
    fixed = {each.size for each in first.fixed if each.model_takes_others}
    way = _sized if has_constant_bounds(first.program.graph, fixed) else trace
    if way is _sized and (fixed or first.domain.conditions):
        sized = _with_domain(replace(way(subject, request), example=first.example), subject)
        best = max((first, sized), key=lambda traced: _width(traced, first))
    example = _other_example(best, subject, request)
    if example is None:
        return best
    try:
        other = way(replace(subject, inputs=example), request)
    except NotExportableError:
        if not best.decisions:
            raise
        return best  # of a model that decides on values, one way takes sizes that another does not
    other = _with_domain(replace(other, **_at_the_example(other, first)), subject)
    return max((best, other), key=lambda traced: _width(traced, first))


def _sized(subject: Subject, request: DimRequest) -> Traced:
    """A trace whose shapes are right whether or not a slice's bound lies beyond the tensor."""
    with sized_bounds() as bounds:
        traced = trace(subject, request)
    bounds.mark(traced.program.graph)
    return traced


def _at_the_example(traced: Traced, first: Traced) -> dict[str, Any]:
    """What is said of a trace's example: it is the user's, wherever the trace was made."""
    sizes = _example_sizes(traced, first.example)
    dims = tuple(replace(dim, traced=sizes[dim.name]) for dim in traced.dims)
    fits = all(
        size == tensor.shape[axis]
        for name, tensor in first.example.items()
        for axis, size in enumerate(traced.inputs[name])
        if isinstance(size, int)
    )
    return {"dims": dims, "example": first.example} if fits else {}


def _example_sizes(traced: Traced, example: Mapping[str, torch.Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, shape in traced.inputs.items():
        for axis, size in enumerate(shape):
            if isinstance(size, str) and size.isidentifier():
                sizes.setdefault(size, example[name].shape[axis])
    return sizes


def _width(traced: Traced, first: Traced) -> tuple[bool, int, float]:
    """How much a trace holds for: the example at least, then free dimensions, then the share of sizes of each."""
    domain = traced.domain
    shares = [float(np.mean(_alone(domain, dim, traced.dims))) for dim in traced.dims]
    free = sum(isinstance(size, str) for shape in traced.inputs.values() for size in shape)
    return traced.example is first.example and bool(domain.holds(_traced_sizes(traced))), free, sum(shares)


def _alone(domain: Domain, dim: Dim, dims: Sequence[Dim]) -> Any:
    """At which sizes of one dimension a domain holds, the others being as traced."""
    sizes = Probes([replace(dim, minimum=1, maximum=None)], domain.conditions).alone(dim.name)
    there = {other.name: np.full(len(sizes), other.traced) for other in dims} | {dim.name: sizes}
    with np.errstate(all="ignore"):
        return np.broadcast_to(np.asarray(domain.holds(there)), sizes.shape)


def _traced_sizes(traced: Traced) -> dict[str, int]:
    return {dim.name: dim.traced for dim in traced.dims}


# Conditions


def within(traced: Traced, further: Sequence[Condition]) -> Traced:
    """A trace with further conditions on its sizes."""
    if not further:
        return traced
    free = [replace(dim, minimum=1, maximum=None) for dim in traced.dims]
    dims, conditions = simplified((*traced.domain.conditions, *further), free)
    return replace(traced, dims=dims, conditions=conditions)


def _with_domain(traced: Traced, subject: Subject) -> Traced:
    """A trace with the conditions that it holds under."""
    bounds = [
        Condition(f"{dim.name} {relation} {limit}")
        for dim in traced.dims
        for relation, limit in ((">=", dim.minimum if dim.minimum > 2 else None), ("<=", dim.maximum))
        if limit is not None
    ]
    free = [replace(dim, minimum=1, maximum=None) for dim in traced.dims]
    found = [*bounds, *conditions_of(traced.program, free)]
    if not found:
        return traced
    with quiet():
        kept = needed(found, free, traced, subject)
    dims, conditions = simplified(kept, free)
    return replace(traced, dims=dims, conditions=conditions)


# Another size to trace at


@dataclass(frozen=True)
class _Group:
    """Axes that have one size together, and the constants at which the trace changes there."""

    places: tuple[AxisRef, ...]
    constants: tuple[int, ...]


def _other_example(traced: Traced, subject: Subject, request: DimRequest) -> dict[str, torch.Tensor] | None:
    """The example at sizes that the model takes and the trace does not; None if there are none."""
    if subject.weights is not None and subject.weights.absent:
        return None
    example = dict(traced.example)
    with quiet():
        count = operators(subject, example)
        for group in _limited(traced, subject, request):
            for size in generic_sizes(group.constants):
                trial = resized(example, dict.fromkeys(group.places, size))
                if _elements(trial) > MOST_ELEMENTS or not accepts(subject, trial):
                    continue
                longer = operators(subject, trial)
                if count is not None and longer is not None and longer <= _MORE_OPERATORS * count:
                    example = trial
                break
    changed = any(example[name].shape != tensor.shape for name, tensor in traced.example.items())
    return example if changed else None


def _elements(example: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in example.values())


def generic_sizes(constants: Sequence[int]) -> Iterator[int]:
    """Sizes to trace at: three of the largest chunk and more, a prime, so that there is a remainder of any."""
    for constant in sorted({number for number in constants if number <= _MOST_CHUNK}, reverse=True):
        size = 3 * constant + 5
        while any(size % factor == 0 for factor in range(2, int(size**0.5) + 1)):
            size += 1
        yield size
        yield 4 * constant  # a model that takes whole chunks only


def _limited(traced: Traced, subject: Subject, request: DimRequest) -> Iterator[_Group]:
    """Axes for which the trace holds at fewer sizes than the model takes."""
    written: tuple[int, ...] | None = None
    for name in dict.fromkeys(
        each for condition in traced.domain.conditions for each in sorted(condition.names)
    ):
        near = [
            number for each in traced.domain.conditions if name in each.names for number in each.constants
        ]
        places = tuple(
            (input_name, axis)
            for input_name, shape in traced.inputs.items()
            for axis, size in enumerate(shape)
            if size == name
        )
        if places:
            yield _Group(places, tuple(near))
    for fixed in traced.fixed:
        if not fixed.model_takes_others:
            continue
        if written is None:
            written = constants_of(subject)
        alike = tuple(
            (name, fixed.axis)
            for name, tensor in traced.example.items()
            if tensor.dim() > fixed.axis
            and tensor.shape[fixed.axis] == fixed.size
            and isinstance(traced.inputs[name][fixed.axis], int)
            and request.wants(name, fixed.axis)
        )
        yield _Group(alike, (*written, fixed.size))
