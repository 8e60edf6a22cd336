"""`moe-export view graph.onnx`: Netron on the loopback address, until Ctrl-C."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import onnx

from moe_export.console import Console
from moe_export.errors import UsageError

HOST = "127.0.0.1"


def run_view(graph: str, port: int, browse: bool, quiet: bool, as_json: bool, debug: bool) -> int:
    """Run the command; the exit code."""
    path = Path(graph)
    if not path.is_file():
        raise UsageError(f"no such file: {path}", hint="give the path of an .onnx file")
    _require_graph(path)
    _require_port(port)
    logging.getLogger().addHandler(logging.NullHandler())  # or netron sets logging up, and says all itself
    import netron

    host, used = netron.start(str(path), address=(HOST, port), browse=browse)
    Console(quiet, as_json).say(f"http://{host}:{used}  (Ctrl-C to stop)")
    try:
        netron.wait()
    finally:
        netron.stop()
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


def _require_port(port: int) -> None:
    """Netron waits for ever for a port that it does not get."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"cannot serve on port {port}: {error.strerror or error}",
                hint="leave --port away for a free one",
            ) from None
