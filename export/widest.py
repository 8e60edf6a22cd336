"""`widest_trace`: of the ways in which a model can be traced, the one that holds for the most sizes.

    trace at the example ─▶ conditions ─▶ those that prove needless are lifted ─▶ does the model take more sizes?
                                                                                    │ yes
                                             trace at a size of our own choosing ◀──┘

A trace at 16 tokens goes through one chunk of 64, and "how many chunks" is 1 in it for good. At 197 tokens there are
four and a remainder, and nothing that is derived from the size is 0, 1, or equal to something else by chance.

A condition may be needless: tracers ask whether a size is 1 to see whether it is broadcast, and write the answer down.
Whether it is, is found out: the traced program is run where the condition fails, beside the model. What remains is what
the graph is right for, and is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from moe_export.domain import Condition, Domain, evaluate
from moe_export.export.constants import constants_of
from moe_export.export.dims import Dim, DimRequest
from moe_export.export.guards import Probes, conditions_of, simplified
from moe_export.export.recurrence.lengths import operators
from moe_export.export.subject import Subject
from moe_export.export.tracing import Traced, quiet, resized, trace
from moe_export.export.widen import accepts

Place = tuple[str, int]  # an input, and an axis of it
Sizes = Mapping[str, int]

_WITNESSES = 3  # sizes at which a condition must prove needless
_RUNS = 32  # of the model for all conditions together; what is not answered by then is kept
_MOST_ELEMENTS = 2**22  # of all inputs together, in a run that only asks a question
_FEW_ELEMENTS = 2**14  # and in one that others could answer as well
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
    request = request or DimRequest()
    best = _with_domain(trace(subject, request), subject)
    example = _other_example(best, subject, request)
    if example is None:
        return best
    other = trace(replace(subject, inputs=example), request)
    other = _with_domain(replace(other, **_at_the_example(other, best)), subject)
    return max((best, other), key=lambda traced: _width(traced, best))


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
        kept = _needed(found, free, traced, subject)
    dims, conditions = simplified(kept, free)
    return replace(traced, dims=dims, conditions=conditions)


def _needed(
    found: Sequence[Condition], dims: Sequence[Dim], traced: Traced, subject: Subject
) -> list[Condition]:
    """The conditions less those that prove needless: where they fail, the trace computes what the model does."""
    if subject.weights is not None and subject.weights.absent:
        return list(found)  # nothing can be run
    try:
        pool = _Pool(found, dims, traced)
    except ValueError:
        return list(found)
    tried: dict[int, bool | None] = {}

    def right(place: int) -> bool | None:
        if place not in tried and len(tried) >= _RUNS:
            return None
        if place not in tried:
            tried[place] = _same(traced, subject, pool.example(place))
        return tried[place]

    kept = list(found)
    for condition in found:
        answers: list[bool] = []
        for place in pool.failing(condition, [other for other in kept if other is not condition]):
            answer = right(place)
            if answer is not None:
                answers.append(answer)
            if len(answers) == _WITNESSES or answer is False:
                break
        if answers and all(answers):
            kept.remove(condition)
    return kept


class _Pool:
    """Combinations of sizes at which a question may be asked, small ones first.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, found: Sequence[Condition], dims: Sequence[Dim], traced: Traced) -> None:
        self._traced, self._names = traced, [dim.name for dim in dims]
        probes = Probes(dims, found)
        example = {dim.name: dim.traced for dim in dims}
        combinations = [example | {dim.name: int(size)} for dim in dims for size in probes.telling(dim.name)]
        drawn = np.random.default_rng(0)
        telling = {dim.name: probes.telling(dim.name) for dim in dims}
        combinations += [
            {name: int(drawn.choice(sizes)) for name, sizes in telling.items()} for _ in range(400)
        ]
        kept = [sizes for sizes in combinations if self._elements(sizes) <= _MOST_ELEMENTS]
        if not kept:
            raise ValueError("no sizes to ask at")
        kept.sort(key=self._elements)
        self._arrays = {name: np.array([sizes[name] for sizes in kept]) for name in self._names}
        self._counts = np.array([self._elements(sizes) for sizes in kept])
        self._kept = kept
        self._known: dict[Condition, Any] = {}

    def failing(self, condition: Condition, others: Sequence[Condition]) -> Iterator[int]:
        """Places at which a condition fails and as few others as can be: the smallest sizes, then some up to larger."""
        fails = ~self._holds(condition)
        if fails.any():
            besides = sum((~self._holds(other) for other in others), np.zeros(len(fails), dtype=int))
            there = np.flatnonzero(fails & (besides == besides[fails].min()))
            enough = max(_FEW_ELEMENTS, 4 * self._counts[there[0]])
            there = there[self._counts[there] <= enough]
            order = np.linspace(0, len(there) - 1, min(len(there), 3 * _WITNESSES)).astype(int)
            yield from dict.fromkeys(int(there[index]) for index in (order[0], order[-1], *order))

    def _holds(self, condition: Condition) -> Any:
        if condition not in self._known:
            with np.errstate(all="ignore"):
                found = np.asarray(condition.holds(self._arrays), dtype=bool)
            self._known[condition] = np.broadcast_to(found, len(self._kept))
        return self._known[condition]

    def example(self, place: int) -> dict[str, torch.Tensor] | None:
        """The example at the sizes of a place; None where an input's size is none."""
        return _at(self._traced, self._kept[place])

    def _elements(self, sizes: Sizes) -> int:
        total = 0
        for shape in self._traced.inputs.values():
            count = 1
            for size in shape:
                count *= size if isinstance(size, int) else max(0, evaluate(size, sizes))
            total += count
        return total


def _at(traced: Traced, sizes: Sizes) -> dict[str, torch.Tensor] | None:
    wanted = {
        (name, axis): evaluate(size, sizes)
        for name, shape in traced.inputs.items()
        for axis, size in enumerate(shape)
        if isinstance(size, str)
    }
    return resized(traced.example, wanted) if all(size >= 0 for size in wanted.values()) else None


def _same(traced: Traced, subject: Subject, example: Mapping[str, torch.Tensor] | None) -> bool | None:
    """Whether a trace computes what the model does; None where the model refuses."""
    if example is None:
        return None
    with torch.no_grad():
        try:
            wanted = subject.call([tensor.clone() for tensor in example.values()])
        except Exception:
            return None
        try:
            found = run_program(traced, [tensor.clone() for tensor in example.values()])
        except Exception:
            return False
    return len(wanted) == len(found) and all(map(_close, wanted, found))


def _close(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """The same operators on the same numbers: only the order of sums may differ."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, found)
    wanted, found = wanted.double(), found.double()
    known = wanted[wanted.isfinite()].abs()
    scale = float(known.max()) if known.numel() else 0.0
    return torch.allclose(wanted, found, rtol=0.0, atol=1e-4 * scale, equal_nan=True)


def run_program(traced: Traced, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Run a traced program as it is, at sizes that it may not hold for; its outputs, without changed buffers."""
    program, queue = traced.program, iter(inputs)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            arguments.append(next(queue))
        else:
            target = str(spec.target)
            arguments.append(program.state_dict.get(target, program.constants.get(target)))
    results = fx.Interpreter(program.graph_module).run(*arguments)
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    return [value for kind, value in zip(kinds, results, strict=True) if kind is OutputKind.USER_OUTPUT]


# Another size to trace at


@dataclass(frozen=True)
class _Group:
    """Axes that have one size together, and the constants at which the trace changes there."""

    places: tuple[Place, ...]
    constants: tuple[int, ...]


def _other_example(traced: Traced, subject: Subject, request: DimRequest) -> dict[str, torch.Tensor] | None:
    """The example at sizes that the model takes and the trace does not; None if there are none."""
    if subject.weights is not None and subject.weights.absent:
        return None
    example = dict(traced.example)
    with quiet():
        count = operators(subject, example)
        for group in _limited(traced, subject, request):
            for size in _generic(group.constants):
                trial = resized(example, dict.fromkeys(group.places, size))
                if _elements(trial) > _MOST_ELEMENTS or not accepts(subject, trial):
                    continue
                longer = operators(subject, trial)
                if count is not None and longer is not None and longer <= _MORE_OPERATORS * count:
                    example = trial
                break
    changed = any(example[name].shape != tensor.shape for name, tensor in traced.example.items())
    return example if changed else None


def _elements(example: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in example.values())


def _generic(constants: Sequence[int]) -> Iterator[int]:
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
