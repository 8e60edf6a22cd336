"""An exported graph verified block by block, and what packing did to a model that is never in memory as a whole.

```
model, weights that the packed ones stand for ─▶ runs ─┬▶ the graph's parts are compared with them (`layerwise`)
model, its own weights                        ─▶ runs ─┴▶ the effect of packing: outputs, and choices of experts
```
A graph that was found equal gives what the first runs give, so the effect needs no run of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_export.comparing.packing_effect import Effect, Moves, flips_of, weight_errors
from moe_export.comparison_settings import tolerance_of
from moe_export.export.onnx.external_weights import Storage
from moe_export.export.onnx.serialize import link_weights
from moe_export.export.pipeline import Graph
from moe_export.export.tracing.trace import quiet
from moe_export.large.layerwise import MOST, verify_blocks
from moe_export.large.layerwise_torch import Ran, run_blocks
from moe_export.large.packed_weights import STANDS_FOR, packed_values
from moe_export.verify import Case, Report, Tolerance


@dataclass(frozen=True)
class Verified:
    """A graph that was verified.

    Attributes:
        graph: With what was learned, and a note on what was compared.
        report: None if nothing was.
        runs: The cases, with PyTorch's run of each, if the graph was compared block by block.
    """

    graph: Graph
    report: Report | None
    runs: tuple[tuple[Case, Ran], ...] = ()


def effect_by_runs(graph: Graph, runs: Sequence[tuple[Case, Ran]]) -> Effect:
    """What packing did to a model: it is run once more on every case, with the weights that it has.

    Args:
        graph: With packed weights; it computes what the model does with the weights that they stand for.
        runs: Of that model.
    """
    quantized = graph.quantized
    assert quantized is not None
    outputs, flips, counted = Moves(), flips_of(quantized.floats), True
    for case, packed in runs:
        with quiet():
            floats = run_blocks(graph.reference, case.inputs, list(packed.blocks), MOST)
        outputs.add(floats.outputs, packed.outputs)
        counted &= len(flips) == len(floats.chose) == len(packed.chose)
        for router, own, other in zip(flips, floats.chose, packed.chose, strict=False):
            router.add(own.ids, other.ids, own.scores)
    routers = tuple(router.effect() for router in flips if router.counts and counted)
    errors = weight_errors(quantized)
    return Effect(str(quantized.scheme), len(runs), outputs.errors(), routers, errors, counted)


@dataclass(frozen=True)
class Parts:
    """Which graphs are verified block by block, and how.

    Attributes:
        asked: `whole` or `layers`, if the user chose; else None.
        storage: Where the graphs' weights are.
    """

    asked: str | None
    storage: Storage

    def wanted(self, graph: Graph, path: Path) -> bool:
        """Whether a graph, temporarily at `path`, cannot or should not be run as a whole."""
        folder = self.storage.folder or path.parent
        if graph.kind == "gate":
            return not link_weights(graph.model, path, folder)
        weights = graph.reference.weights
        absent = weights is not None and weights.absent
        if self.asked == "layers" or (absent and self.asked is None):
            return True
        return not link_weights(graph.model, path, folder)

    def verified(self, graph: Graph, path: Path, tolerance: Tolerance, seed: int) -> Verified:
        """Verify a graph block by block.

        Packed weights are held against a model that has what they stand for; where that cannot be, nothing is compared.
        """
        with packed_values(graph.reference.weights, graph.quantized) as replaced:
            if not replaced:
                return self.unverified(graph)
            report, runs = verify_blocks(
                path,
                graph.reference,
                graph.traced.example,
                graph.traced.dims,
                tolerance_of(graph.dtype, tolerance),
                seed,
                self.storage.folder,
            )
        if graph.quantized is not None:
            report = replace(report, reference=STANDS_FOR)
        noted = replace(graph, notes=(*graph.notes, report.about["blocks"]))
        return Verified(noted, report, tuple(runs))

    def unverified(self, graph: Graph) -> Verified:
        """The graph, with a note that it was never loaded."""
        note = "the graph was checked but not loaded: its weights are larger than --memory"
        if graph.quantized is not None:
            note += "; packed ones are compared as a whole only (--compare whole)"
        return Verified(replace(graph, notes=(*graph.notes, note)), None)
