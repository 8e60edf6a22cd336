"""`moe-export view graph.onnx`: Netron on the loopback address, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import onnx

from moe_export.console import Console
from moe_export.errors import UsageError


def run_view(graph: str, port: int, browse: bool, quiet: bool, as_json: bool, debug: bool) -> int:
    """Run the command; the exit code."""
    path = Path(graph)
    if not path.is_file():
        raise UsageError(f"no such file: {path}", hint="give the path of an .onnx file")
    try:
        onnx.load(path, load_external_data=False)
    except Exception as error:
        raise UsageError(
            f"{path} is not an ONNX model, or a truncated one: {type(error).__name__}", hint="export it again"
        ) from None
    import netron

    address = ("127.0.0.1", port) if port else "127.0.0.1"
    host, used = netron.start(str(path), address=address, browse=browse)
    Console(quiet, as_json).say(f"http://{host}:{used}  (Ctrl-C to stop)")
    try:
        netron.wait()
    finally:
        netron.stop()
    return 0
