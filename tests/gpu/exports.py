"""The graphs that are measured, made on the CPU while the tests run on the GPU: one process a model."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "models"
RECURRENCES = {"mamba": ("scan",), "mamba2": ("scan", "chunked", "contrib"), "delta": ("scan", "contrib")}


def model(name: str, target: str, folder: Path) -> dict[str, Path]:
    """A file of models/, for an engine."""
    from moe_export.export import Options, export_subject, load_subject
    from moe_export.export.onnx.serialize import write_model

    subject = load_subject(str(MODELS / f"{name}.py"))
    graph = export_subject(subject, Options(gates=False, target=target))[0]  # type: ignore[arg-type]
    path = folder / f"{name}.{target}.onnx"
    write_model(graph.model, path)
    return {target: path}


def experts(count: int, k: int, folder: Path) -> dict[str, Path]:
    """A block of experts in every form."""
    import test_experts_bench

    inside = folder / f"experts-{count}"
    inside.mkdir()
    return test_experts_bench.models(count, k, inside)


def recurrence(name: str, folder: Path) -> dict[str, Path]:
    """A loop over time in every form that it has."""
    import onnx
    import test_recurrence_bench

    found = {}
    for form in RECURRENCES[name]:
        found[form] = folder / f"{name}-{form}.onnx"
        onnx.save(test_recurrence_bench.exported(name, form), found[form])
    return found


class Exports:
    """Graphs that are being made.

    Args:
        folder: Where they go.
        workers: Processes at a time.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder = folder
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        self._made: dict[tuple[object, ...], Future[dict[str, Path]]] = {}

    def start(self, make: object, *arguments: object) -> None:
        """Begin one, unless it has begun."""
        key = (make, *arguments)
        if key not in self._made:
            self._made[key] = self._pool.submit(make, *arguments, self._folder)  # type: ignore[arg-type]

    def get(self, seconds: float, make: object, *arguments: object) -> dict[str, Path]:
        """The files by form.

        Raises:
            Exception: It could not be exported, or is not ready within so many seconds.
        """
        self.start(make, *arguments)
        return self._made[(make, *arguments)].result(max(seconds, 0.1))

    def stop(self) -> None:
        """What has not begun is not begun any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
