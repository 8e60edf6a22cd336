"""What packing weights did to a model: how far outputs move, which tokens go to other experts, which experts suffer.

Whether a packed graph computes what its weights say is another question, and answered to the last digits (`checking`).
Here both graphs run on the same inputs, the example and new values of its kind, and nothing is right or wrong:

| | |
|---|---|
| error of an output | root mean square of the difference, as a share of the output's own |
| flip | a token whose set of experts is another |
| gap | how much better, in the float graph's scores, the expert was that the token lost than the one it got |
| error of a weight | root mean square of what rounding changed, as a share of the weight's own |
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypedDict

import numpy as np
import onnx_ir as ir

from moe_export.comparison_settings import ComparisonSettings, comparison_cases
from moe_export.errors import UsageError
from moe_export.export.onnx.provenance import MODULE
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.pipeline import Graph
from moe_export.export.precision.choices import Choices, find_choices, with_choices_out
from moe_export.export.quantize.quantize import Packed, Quantized
from moe_export.running.choices import runner_of_model
from moe_export.verify import Array, Case, DimRange, FlipBudget, TensorSpec
from moe_export.verify.inputs.regimes import NORMAL
from moe_export.verify.specs import is_float

_CASES = 6
"""Cases that are run: the example, new values at its sizes, and the first other sizes, with the user's own inputs."""
_WORST = 3
"""Experts that are named."""


@dataclass(frozen=True)
class Limits:
    """What packing may do.

    Attributes:
        flips: Tokens that may go to another expert, of each router; None for any number.
        error: How far an output may move; None for any.
    """

    flips: FlipBudget | None = None
    error: float | None = None

    @classmethod
    def parse(cls, flips: str | None, error: str | None) -> Limits:
        """As the command line gives them.

        Raises:
            UsageError: One of them cannot be read.
        """
        try:
            share = None if error is None else float(error)
        except ValueError:
            share = -1.0
        if share is not None and not share >= 0:
            raise UsageError(f"--max-error is a share of an output, not {error!r}", hint="--max-error 0.02")
        return cls(None if flips is None else FlipBudget.parse(flips, "--max-flips"), share)


@dataclass(frozen=True)
class RouterEffect:
    """What became of one router's choices.

    Attributes:
        module: Where its choice is made.
        tokens: Tokens that were routed, in all cases.
        flipped: Those of them whose experts are others.
        gap: The largest gap of a token that was flipped, in the router's scores.
        unused: Experts that no token came to, in either graph.
    """

    module: str
    tokens: int
    flipped: int
    gap: float
    unused: tuple[int, ...]


@dataclass(frozen=True)
class WeightError:
    """The error of the weights of one expert, or of one other module.

    Attributes:
        name: The weight's, and its expert's number where experts are stacked.
        error: See the module's docstring.
    """

    name: str
    error: float


class RouterEntry(TypedDict):
    """What became of one router's choices, as plain data."""

    module: str
    tokens: int
    flipped: int
    gap: float
    unused: list[int]


class EffectEntry(TypedDict):
    """What packing weights did to a model, as plain data."""

    scheme: str
    outputs: dict[str, float]
    routers: list[RouterEntry]
    weights: dict[str, float]


@dataclass(frozen=True)
class Effect:
    """What packing did.

    Attributes:
        scheme: How weights are packed.
        cases: How many were run.
        outputs: The error of each float output.
        routers: One a choice of experts.
        weights: From the worst on.
        counted: Whether `routers` are all there are. They are not where the graph makes other choices than the model.
    """

    scheme: str
    cases: int
    outputs: Mapping[str, float]
    routers: tuple[RouterEffect, ...]
    weights: tuple[WeightError, ...]
    counted: bool = True

    def lines(self) -> Iterator[str]:
        """For the report."""
        moved = ", ".join(f"{name} {error:.2%}" for name, error in self.outputs.items())
        yield f"packing moves outputs by (root mean square, {self.cases} cases): {moved}"
        worst = ", ".join(f"{one.name} {one.error:.2%}" for one in self.weights[:_WORST])
        yield f"weights that packing moves most, of {len(self.weights)}: {worst}"
        kept = sum(one.error == 0 for one in self.weights)
        if kept:
            yield f"{kept} of {len(self.weights)} weights were on such a grid before, and are kept bit for bit"
        for router in self.routers:
            share = router.flipped / router.tokens if router.tokens else 0.0
            gap = f", the scores of whose experts were up to {router.gap:.3g} apart" if router.flipped else ""
            yield f"{router.module}: {router.flipped} of {router.tokens} tokens ({share:.2%}) go to other experts{gap}"
            if router.unused:
                named = ", ".join(map(str, router.unused[:8])) + (", ..." if len(router.unused) > 8 else "")
                yield f"{router.module}: no token came to {len(router.unused)} experts: {named}"
        if not self.counted:
            yield "tokens that go to other experts were not counted: the graph makes other choices than the model"

    def beyond(self, limits: Limits) -> tuple[str, ...]:
        """What is more than it may be, in words."""
        found = []
        for name, error in self.outputs.items():
            if limits.error is not None and not error <= limits.error:
                found.append(f"{name} moves by {error:.2%}, more than --max-error {limits.error:g}")
        for router in self.routers:
            if limits.flips is not None and router.flipped > limits.flips.allowed(router.tokens):
                found.append(
                    f"{router.flipped} of {router.tokens} tokens of {router.module} go to other experts, more than"
                    f" --max-flips {limits.flips}"
                )
        if limits.flips is not None and not self.counted:
            found.append(f"--max-flips {limits.flips} could not be checked: tokens' experts were not counted")
        return tuple(found)

    def to_dict(self) -> EffectEntry:
        """As plain data."""
        return {
            "scheme": self.scheme,
            "outputs": dict(self.outputs),
            "routers": [
                {
                    "module": one.module,
                    "tokens": one.tokens,
                    "flipped": one.flipped,
                    "gap": one.gap,
                    "unused": list(one.unused),
                }
                for one in self.routers
            ],
            "weights": {one.name: one.error for one in self.weights},
        }


def effect_of(graph: Graph, provider: str, seed: int, settings: ComparisonSettings) -> Effect:
    """Run a packed graph and the float graph that it was made from, and compare what they give.

    Args:
        graph: With packed weights.
        provider: Where onnxruntime runs, `cpu` or `cuda`.
        seed: Of the inputs.
        settings: Whose own inputs of the user are run, too.
    """
    quantized = graph.quantized
    assert quantized is not None
    flips = flips_of(quantized.floats)
    choices = Choices(len(flips))
    floats, packed = (
        runner_of_model(with_choices_out(model, scores=True), provider)
        for model in (quantized.floats, graph.model)
    )
    outputs = Moves()
    count = 0
    for case in _cases(graph, floats.inputs, seed, settings):
        expected, got = floats.run(case.inputs), packed.run(case.inputs)
        count += 1
        for router, made, scores in zip(flips, choices.made, choices.scores, strict=True):
            router.add(expected.pop(made), got.pop(made), expected.pop(scores))
            got.pop(scores)
        outputs.add(expected, got)
    routers = tuple(router.effect() for router in flips if router.counts)
    return Effect(str(quantized.scheme), count, outputs.errors(), routers, weight_errors(quantized))


def _cases(
    graph: Graph, specs: Sequence[TensorSpec], seed: int, settings: ComparisonSettings
) -> Iterator[Case]:
    example = {name: as_numpy(tensor) for name, tensor in graph.traced.example.items()}
    dims = [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in graph.traced.dims]
    taken = sorted(specs, key=lambda spec: list(example).index(spec.name))
    arrays = {spec.name: example[spec.name] for spec in taken}
    made = comparison_cases(settings, taken, dims, arrays, seed)
    yield from islice((case for case in made if case.regime == NORMAL), _CASES + len(settings.files))


def _squares(array: Array) -> float:
    known = array.astype(np.float64)
    return float(np.square(known[np.isfinite(known)]).sum())


class Moves:
    """How far packing moves each output."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def add(self, floats: Mapping[str, Array], packed: Mapping[str, Array]) -> None:
        """Add the outputs of a case."""
        for name, array in floats.items():
            if is_float(array.dtype) and array.shape == packed[name].shape:
                moved, own = self._sums[name]
                difference = packed[name].astype(np.float64) - array
                self._sums[name] = (moved + _squares(difference), own + _squares(array))

    def errors(self) -> dict[str, float]:
        """The error of each float output, over all cases."""
        return {
            name: math.sqrt(moved / own) if own else math.sqrt(moved)
            for name, (moved, own) in self._sums.items()
        }


def flips_of(floats: ir.Model) -> list[Flips]:
    """A count for each choice that a graph makes, in the graph's order.

    A choice whose positions nothing reads is the best scores of each group of experts, and no router (`counts`).
    """
    return [
        Flips(node.metadata_props.get(MODULE, "") or "the router", counts=bool(node.outputs[1].uses()))
        for node in find_choices(floats)
    ]


class Flips:
    """Counts the flips of one router.

    Args:
        module: Where its choice is made.
        counts: Whether its choice is one of experts.
    """

    def __init__(self, module: str, *, counts: bool = True) -> None:
        self._module, self.counts = module, counts
        self._tokens = self._flipped = 0
        self._gap = 0.0
        self._used: set[int] = set()
        self._experts = 0

    def add(self, ids: Array, ours: Array, scores: Array) -> None:
        """Add a case: choices (..., k) of both graphs, and the float graph's scores (..., E)."""
        count = scores.shape[-1]
        mine, theirs, scored = (array.reshape(-1, array.shape[-1]) for array in (ids, ours, scores))
        kept, taken = (np.zeros(scored.shape, bool) for _ in range(2))
        np.put_along_axis(kept, mine, values=True, axis=-1)
        np.put_along_axis(taken, theirs, values=True, axis=-1)
        flipped = (kept != taken).any(-1)
        self._tokens += len(mine)
        self._flipped += int(flipped.sum())
        self._experts = max(self._experts, count)
        self._used.update(np.unique(np.concatenate([mine, theirs])).tolist())
        if flipped.any():
            known = np.isfinite(scored)
            lost = np.where(kept & ~taken & known, scored, -np.inf)[flipped].max(-1)
            won = np.where(taken & ~kept & known, scored, np.inf)[flipped].min(-1)
            gaps = (lost - won)[np.isfinite(lost - won)]
            self._gap = max(self._gap, float(gaps.max(initial=0.0)))

    def effect(self) -> RouterEffect:
        """The sum of all cases."""
        unused = tuple(sorted(set(range(self._experts)) - self._used))
        return RouterEffect(self._module, self._tokens, self._flipped, self._gap, unused)


def weight_errors(quantized: Quantized) -> tuple[WeightError, ...]:
    """The error of every packed weight, the largest first; of a stack, of each expert."""
    found = [error for weight in quantized.weights for error in _errors(weight)]
    return tuple(sorted(found, key=lambda one: -one.error))


def _errors(weight: Packed) -> Iterator[WeightError]:
    several = weight.grid.count > 1
    for index, (moved, own) in enumerate(weight.grid.errors()):
        name = f"{weight.name}[{index}]" if several else weight.name
        yield WeightError(name, math.sqrt(moved / own) if own else 0.0)
