"""`moe-export view graph.onnx`: Netron on the loopback address, offline, until Ctrl-C; or a picture as a file."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.export.engines.graph_file import read_graph
from moe_export.own_files import put_text, require_free
from moe_export.pictures.picture import Marks, svg_of
from moe_export.pictures.sketch import Level, Sketch, sketch_of
from moe_export.pictures.viewing import Viewer

SUFFIX = ".svg"


def run_view(
    graph: str,
    output: str | None,
    level: Level | None,
    port: int,
    browse: bool,
    console: Console,
    force: bool = False,
) -> int:
    """Run the command; the exit code."""
    path = Path(graph)
    if output is not None:
        require_svg(output, [path], force)
        model, _ = read_graph(path)
        sketch = sketch_of(model, path.name, level)
        write_svg(output, [sketch], force=force)
        console.say(f"{path}: {sketch.subtitle}\nwritten: {output}")
        console.json(json.dumps(asdict(sketch), indent=2))
        return 0
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
        console.say(f"{viewer.url}  (Ctrl-C to stop)")
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


def require_svg(path: str, inputs: Sequence[Path], force: bool) -> None:
    """Refuse another ending of the file, or to overwrite what is not ours, before any work is done."""
    if Path(path).suffix != SUFFIX:
        raise UsageError(f"a picture of a graph is a {SUFFIX} file, not {path}")
    require_free(Path(path), "text", inputs=inputs, force=force)


def write_svg(
    path: str,
    sketches: Sequence[Sketch],
    marks: Sequence[Marks] = (),
    head: Sequence[str] = (),
    *,
    force: bool,
) -> None:
    """Write a picture, whole or not at all."""
    put_text(Path(path), svg_of(sketches, marks, head=head), force=force)
