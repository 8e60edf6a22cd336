"""`needed`: of the conditions that a trace was written down with, those that it really holds under.

Tracers ask whether a size is 1 to see whether it is broadcast, or whether a slice ends beyond a tensor, and write the
answer down. Whether a condition is needless is found out: the traced program is run where the condition fails, beside
the model. It is, if both give the same there, and if each value has the shape that the trace recorded for it: what is
made of the trace later reads these shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from moe_export.domain import Condition, evaluate
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.dims import Dim
from moe_export.export.tracing.fixed_sizes import resized
from moe_export.export.tracing.guards import Probes
from moe_export.export.tracing.trace import Traced
from moe_export.export.tracing.traced_loops import RunsLoops
from moe_export.float64 import agree, double_module, doubled, in_float64

Sizes = Mapping[str, int]

_WITNESSES = 3  # sizes at which a condition must prove needless
_RUNS = 32  # of the model for all conditions together; what is not answered by then is kept
MOST_ELEMENTS = 2**22  # of all inputs together, in a run that only asks a question
_FEW_ELEMENTS = 2**14  # and in one that others could answer as well
_DEARER = 16  # how much more than at the smallest sizes a question may cost
_NEAR = 1e-6  # of the largest value, in float64: Python's numbers may be tensors of float32 in a trace
_NEAR_FLOAT32 = 1e-4  # where the model does not run in float64


def needed(
    found: Sequence[Condition], dims: Sequence[Dim], traced: Traced, subject: Subject
) -> list[Condition]:
    """The conditions less those that prove needless: where they fail, the trace computes what the model does."""
    if subject.weights is not None and subject.weights.absent:
        return list(found)  # nothing can be run
    try:
        pool = _Pool(found, dims, traced)
    except ValueError:
        return list(found)
    beside, tried = _Beside(traced, subject), dict[int, bool | None]()

    def right(place: int) -> bool | None:
        if place not in tried and len(tried) >= _RUNS:
            return None
        if place not in tried:
            tried[place] = beside.same(pool.sizes(place), dear=pool.dear(place))
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


def wrong_at_one(traced: Traced, subject: Subject) -> list[Condition]:
    """`sequence >= 2` for each dimension at whose size 1 the trace is wrong.

    Tracers take every free size for 2 or more and write nothing down: `if x.shape[1] > 1` has one way in a trace.
    """
    if subject.weights is not None and subject.weights.absent:
        return []
    beside = _Beside(traced, subject)
    sizes = {dim.name: dim.traced for dim in traced.dims}
    asked = [dim.name for dim in traced.dims if dim.minimum <= 1 < dim.traced]
    wrong = [name for name in asked if beside.same(sizes | {name: 1}, shapes=False) is False]
    if not wrong or not beside.same(sizes, shapes=False):
        return []
    return [Condition(f"{name} >= 2") for name in wrong]


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
        kept = [sizes for sizes in combinations if self._elements(sizes) <= MOST_ELEMENTS]
        if not kept:
            raise ValueError("no sizes to ask at")
        costs = {id(sizes): self._cost(sizes, example) for sizes in kept}
        kept.sort(key=lambda sizes: costs[id(sizes)])
        self._arrays = {name: np.array([sizes[name] for sizes in kept]) for name in self._names}
        self._costs = np.array([costs[id(sizes)] for sizes in kept])
        self._kept = kept
        self._known: dict[Condition, Any] = {}

    def failing(self, condition: Condition, others: Sequence[Condition]) -> Iterator[int]:
        """Places at which a condition fails and as few others as can be: the smallest sizes, then some up to larger."""
        fails = ~self._holds(condition)
        if fails.any():
            # An answer at a small size, where more than this condition fails, is worth more than none in an hour.
            fails &= self._costs <= max(_FEW_ELEMENTS, _DEARER * self._costs[np.flatnonzero(fails)[0]])
            besides = sum((~self._holds(other) for other in others), np.zeros(len(fails), dtype=int))
            there = np.flatnonzero(fails & (besides == besides[fails].min()))
            enough = max(_FEW_ELEMENTS, 4 * self._costs[there[0]])
            there = there[self._costs[there] <= enough]
            order = np.linspace(0, len(there) - 1, min(len(there), 3 * _WITNESSES)).astype(int)
            yield from dict.fromkeys(int(there[index]) for index in (order[0], order[-1], *order))

    def _holds(self, condition: Condition) -> Any:
        if condition not in self._known:
            with np.errstate(all="ignore"):
                found = np.asarray(condition.holds(self._arrays), dtype=bool)
            self._known[condition] = np.broadcast_to(found, len(self._kept))
        return self._known[condition]

    def sizes(self, place: int) -> Sizes:
        """The sizes of a place."""
        return self._kept[place]

    def dear(self, place: int) -> bool:
        """Whether the model is not to be run there for an answer that is no in any case."""
        return bool(self._costs[place] > _FEW_ELEMENTS)

    def _cost(self, sizes: Sizes, example: Sizes) -> float:
        """How much a run computes, in elements of all inputs.

        A state may be much larger than the tokens beside it; what is computed of them grows with both all the same.
        """
        more = math.prod(max(1.0, sizes[name] / max(1, size)) for name, size in example.items())
        return max(self._elements(sizes), more * self._elements(example))

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


class _Beside:
    """A trace run beside its model, to see whether they are the same at some sizes.

    Args:
        traced: The trace.
        subject: The model.
    """

    def __init__(self, traced: Traced, subject: Subject) -> None:
        self._traced, self._subject = traced, subject
        self._wide: Subject | None = None

    def same(self, sizes: Sizes, *, shapes: bool = True, dear: bool = False) -> bool | None:
        """Whether both compute the same, in `shapes` that the trace recorded; None where the model refuses.

        Where a run is `dear`, a trace that fails is not the same, whether or not the model refuses.
        """
        example = _at(self._traced, sizes)
        if example is None:
            return None
        given = list(example.values())
        with torch.no_grad():
            found: list[torch.Tensor] | None = None
            try:
                inputs = [tensor.clone() for tensor in given]
                found = run_program(self._traced, inputs, sizes=sizes if shapes else None)
            except Exception:
                if dear:
                    return False
            try:
                wanted = self._subject.call([tensor.clone() for tensor in given])
            except Exception:
                return None
            if found is None or not _alike(wanted, found):
                return False
            if all(map(torch.equal, wanted, found)):
                return True
            exact = self._same_in_float64(given)
            return agree(wanted, found, _NEAR_FLOAT32) if exact is None else exact

    def _same_in_float64(self, given: Sequence[torch.Tensor]) -> bool | None:
        """The same where nothing is rounded; None where the model does not run in float64."""
        try:
            with in_float64():
                if self._wide is None:
                    self._wide = self._subject.of(double_module(self._subject.module))
                wanted = self._wide.call([doubled(tensor.clone()) for tensor in given])
                found = run_program(self._traced, [doubled(tensor.clone()) for tensor in given], wide=True)
        except Exception:
            return None
        return agree(wanted, found, _NEAR)


def _alike(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> bool:
    """Whether values have the same types and shapes."""
    kinds = [[(value.dtype, value.shape) for value in values] for values in (wanted, found)]
    return kinds[0] == kinds[1]


class _WrongShapeError(Exception):
    """A value has another shape than the trace recorded for it."""


class _Exact(RunsLoops):
    """Runs a traced program, and makes sure that each value has the shape that was recorded for it."""

    def __init__(self, traced: Traced, sizes: Sizes) -> None:
        super().__init__(traced.program.graph_module)
        self._sizes = {symbol: sizes[dim.name] for dim in traced.dims for symbol in (dim.symbol, *dim.also)}
        self._known: dict[Any, int | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        pairs = [(found, n.meta.get("val"))] if isinstance(found, torch.Tensor) else []
        if isinstance(found, (tuple, list)) and isinstance(n.meta.get("val"), (tuple, list)):
            pairs = list(zip(found, n.meta["val"], strict=False))
        for value, recorded in pairs:
            if isinstance(value, torch.Tensor) and isinstance(recorded, torch.Tensor):
                wanted = [self._size(size) for size in recorded.shape]
                if any(size not in (real, None) for size, real in zip(wanted, value.shape, strict=True)):
                    raise _WrongShapeError(n.name)
        return found

    def _size(self, size: int | torch.SymInt) -> int | None:
        """A recorded size as a number; None where values decide it."""
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        if expression not in self._known:
            number = expression.subs(
                {each: self._sizes.get(str(each), each) for each in expression.free_symbols}
            )
            self._known[expression] = int(number) if number.is_Integer else None
        return self._known[expression]


def run_program(
    traced: Traced, inputs: Sequence[torch.Tensor], *, sizes: Sizes | None = None, wide: bool = False
) -> list[torch.Tensor]:
    """Run a traced program as it is, at sizes that it may not hold for; its outputs, without changed buffers.

    Args:
        traced: The trace.
        inputs: In its order.
        sizes: Of its dimensions, where each value must have the shape that was recorded for it.
        wide: Whether weights are to be float64, as the inputs are.

    Raises:
        Exception: Whatever an operator raises; or a value has another shape.
    """
    program, queue = traced.program, iter(inputs)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            arguments.append(next(queue))
        else:
            target = str(spec.target)
            value = program.state_dict.get(target, program.constants.get(target))
            arguments.append(doubled(value) if wide and isinstance(value, torch.Tensor) else value)
    runner = RunsLoops(program.graph_module) if sizes is None else _Exact(traced, sizes)
    results = runner.run(*arguments)
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    return [value for kind, value in zip(kinds, results, strict=True) if kind is OutputKind.USER_OUTPUT]
