"""The baseline export: the same trace translated operator by operator, without any rewriting by this project.

Einsums stay `Einsum`, experts stay as they are written, and a loop over a length becomes that many copies of its step.
This graph is not verified; it is shown beside the exported one, so that a reader sees what was changed.
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
    """Write the baseline export, and compare the exported graph with it.

    Args:
        subject: The model.
        after: The graph that was exported.
        folder: The folder for the baseline export.
        opset: The opset of both.
        dynamic: Dimensions that the user named.
        static: Whether all others are fixed.

    Returns:
        The difference; or the first line of the error if there is no baseline export.
    """
    path = folder / f"{subject.source.stem}.baseline.onnx"
    try:
        dims = requested(subject, dynamic, static)
        stages = without("fold", "outline", "einsums", "expand", "simplify", "order", "precision", "sides")
        write_model(run(stages, Model.of(subject, dims), Options(opset=opset)).model, path)
    except Exception as error:  # without the rewriting, the exporter may fail in any way
        return str(error).strip().splitlines()[0]
    return difference(path, after, {})
