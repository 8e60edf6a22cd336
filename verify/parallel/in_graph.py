"""One rank whose graph holds collectives of an engine's own, run by the ONNX project's evaluator.

The engines that have these operators need several GPUs. What the graph means can be run anywhere: here the operators
hand their values to the same exchange that carries them between graphs, so a file is verified as it is. This says
nothing about an engine's own kernels.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.parallel.manifest import Exchange, Manifest
from moe_export.verify.parallel.rank import Given, Rank, Sent, Steps
from moe_export.verify.runner import RunFailedError, one_line
from moe_export.verify.specs import Array

_HERE = threading.local()


class InGraphRank(Rank):
    """The one graph of a rank; see `Rank`."""

    def __init__(self, manifest: Manifest, rank: int) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        self.rank = rank
        self.name = "onnx-reference"
        self.sent: list[Sent] = []
        self._manifest = manifest
        path = manifest.graphs[rank].stages[0]
        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf's own class
            raise UsageError(f"not an ONNX model: {one_line(error)}", where=str(path)) from error
        self._evaluator = ReferenceEvaluator(model, new_ops=_operators())
        self._places = {
            name: (place, exchange)
            for place, exchange in enumerate(manifest.exchanges)
            for name in manifest.graphs[rank].names[place].gives
        }

    def steps(self, inputs: Mapping[str, Array]) -> Steps:
        """Run once: the evaluator runs in a thread, which waits for the answer of each exchange."""
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.sent = []

        def exchanged(name: str, array: Array) -> Array:
            place, exchange = self._places[name]
            asked.put(self._asked(place, exchange, array))
            got = answers.get()
            if got is None:
                raise RunFailedError("the run was given up")
            return np.asarray(got.arrays[0])

        def run() -> None:
            _HERE.exchanged = exchanged
            try:
                asked.put(dict(zip(names, self._evaluator.run(None, dict(inputs)), strict=True)))
            except Exception as error:
                asked.put(error)

        names = [spec.name for spec in self._manifest.outputs]
        thread = threading.Thread(target=run, daemon=True, name=f"rank {self.rank}")
        thread.start()
        try:
            while True:
                found = asked.get()
                if isinstance(found, Given):
                    answers.put((yield found))
                elif isinstance(found, Exception):
                    raise RunFailedError(f"{self.name} failed: {one_line(found)}") from found
                else:
                    return {name: np.asarray(array) for name, array in found.items()}
        finally:
            answers.put(None)

    def _asked(self, place: int, exchange: Exchange, array: Array) -> Given:
        array = np.ascontiguousarray(array)
        rows = None
        if exchange.kind == "all_to_all":
            rows = np.full(self._manifest.ranks, exchange.capacity or 0, dtype=np.int64)
        given = Given(place, exchange, (array,), rows, rows)
        self.sent.append(self.measured(given))
        return given


def _operators() -> list[Any]:
    """The collectives, as the evaluator takes operators."""
    from onnx.reference.op_run import OpRun

    def collective(name: str, domain: str) -> Any:
        def _run(self: Any, array: Array, **_: Any) -> tuple[Array]:
            return (_HERE.exchanged(self.onnx_node.output[0], array),)

        return type(name, (OpRun,), {"op_domain": domain, "_run": _run})

    return [
        collective("AllReduce", "com.microsoft"),
        collective("AllToAll", "com.microsoft"),
        collective("DistCollective", "trt"),
    ]


def open_rank(manifest: Manifest, rank: int, provider: str = "cpu") -> Rank:
    """A rank with the engine that can run its graphs."""
    return InGraphRank(manifest, rank) if manifest.in_graph else Rank(manifest, rank, provider)
