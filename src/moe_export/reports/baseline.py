"""The baseline export: what a model would be as ONNX without this project, the same trace translated op by op.

Einsums stay `Einsum`, experts stay as they are written, a loop over a length is as many copies of its step. Nothing
verifies this graph; it is shown beside the one that was written, so that a reader sees what was changed.
"""

from __future__ import annotations

from pathlib import Path

from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.options import Options
from moe_export.export.stages import Model, run, without
from moe_export.export.tracing.dims import requested
from moe_export.pictures.differing import Difference, difference


def compare_with_baseline(
    subject: Subject, after: Path, folder: Path, opset: int, dynamic: tuple[str, ...], static: bool
) -> Difference | str:
    """Write the graph without any rewriting, and hold the one with it against it.

    Args:
        subject: The model.
        after: The graph that was exported.
        folder: Where the other one goes.
        opset: Of both.
        dynamic: Dimensions that the user named.
        static: Whether all others are fixed.

    Returns:
        What differs; or why there is no graph without the rewriting.
    """
    path = folder / f"{subject.source.stem}.baseline.onnx"
    try:
        dims = requested(subject, dynamic, static)
        stages = without("fold", "outline", "einsums", "expand", "simplify", "order", "precision")
        write_model(run(stages, Model.of(subject, dims), Options(opset=opset)).model, path)
    except Exception as error:  # whatever the exporter says of what is mended here
        return str(error).strip().splitlines()[0]
    return difference(path, after, {})
