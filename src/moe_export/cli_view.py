"""`moe-export view graph.onnx`: Netron on the loopback address, offline, until Ctrl-C."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import onnx

from moe_export.console import Console
from moe_export.errors import UsageError
from moe_export.viewing import Viewer


def run_view(graph: str, port: int, browse: bool, quiet: bool, as_json: bool, debug: bool) -> int:
    """Run the command; the exit code."""
    path = Path(graph)
    if not path.is_file():
        raise UsageError(f"no such file: {path}", hint="give the path of an .onnx file")
    _require_graph(path)
    try:
        viewer = Viewer(path, port)
    except OSError as error:
        raise UsageError(
            f"cannot serve on port {port}: {error.strerror or error}",
            hint="leave --port away for a free one",
        ) from None
    try:
        Console(quiet, as_json).say(f"{viewer.url}  (Ctrl-C to stop)")
        if browse:
            webbrowser.open(viewer.url)
        viewer.wait()
    finally:
        viewer.stop()
    return 0


def _require_graph(path: Path) -> None:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        reason: str | None = type(error).__name__
    else:
        reason = None if model.HasField("graph") else "it holds no graph"  # an empty file is a valid message
    if reason:
        raise UsageError(f"{path} is not an ONNX model, or a truncated one: {reason}", hint="export it again")
