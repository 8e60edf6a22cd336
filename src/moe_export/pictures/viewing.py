"""Serve Netron for one graph, on the loopback address, offline.

Netron is a web page in the files of its package. They are served unchanged but for two things: the page gets the graph
to open in its metadata, and a Content-Security-Policy that allows requests to this server only, so that it neither
looks up the user's location nor reports usage.
"""

from __future__ import annotations

import http.server
import mimetypes
import re
import threading
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

HOST = "127.0.0.1"
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; worker-src 'self' blob:"
_VERSION = re.compile(r'<meta name="version" content="[^"]*">')
_UNPACKAGED = "0.0.0"  # a page of this version reports nothing


class Viewer:
    """A server that shows one graph until it is stopped.

    Args:
        graph: The file. Files beside it are served only if their names begin with its name (external data).
        port: The port; 0 for any free one.

    Raises:
        OSError: The port is in use.
    """

    def __init__(self, graph: Path, port: int = 0) -> None:
        handler = partial(_Handler, graph=graph.absolute())
        self._server = http.server.ThreadingHTTPServer((HOST, port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the page that shows the graph."""
        return f"http://{HOST}:{self._server.server_address[1]}"

    def wait(self) -> None:
        """Wait until the server stops."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def stop(self) -> None:
        """Stop the server and close its port."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves Netron's own files, and the graph and its external data under `/data/`."""

    protocol_version = "HTTP/1.1"
    _types: ClassVar[dict[str, str]] = {".js": "text/javascript", ".onnx": "application/octet-stream"}

    def __init__(self, *args: object, graph: Path) -> None:
        self._graph = graph
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = self._data(path.removeprefix("/data/")) if path.startswith("/data/") else _page_file(path)
        if file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content = file.read_bytes()
        kind = (
            self._types.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        )
        if file.name == "index.html":
            content = self._page(content.decode("utf-8")).encode("utf-8")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Set-Cookie", "consent=0; SameSite=Strict")  # skips Netron's cookie dialog
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 (names of the base class)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal belongs to the command."""

    def _data(self, name: str) -> Path | None:
        own = name == Path(name).name and name.startswith(self._graph.name)
        file = self._graph.parent / name
        return file if own and file.is_file() else None

    def _page(self, page: str) -> str:
        name = quote(self._graph.name)
        tags = (
            f'<meta name="type" content="Python"><meta name="version" content="{_UNPACKAGED}">'
            f'<meta name="file" content="/data/{name}"><meta name="identifier" content="{name}">'
        )
        return _VERSION.sub(lambda _: tags, page, count=1)


def _page_file(path: str) -> Path | None:
    import netron

    folder = Path(str(netron.__file__)).resolve().parent
    file = (folder / path.lstrip("/")).resolve() if path != "/" else folder / "index.html"
    inside = folder in file.parents and file.suffix not in (".py", ".pyc", "")
    return file if inside and file.is_file() else None
