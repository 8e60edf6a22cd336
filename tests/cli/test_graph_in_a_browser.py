"""The page of docs/browser.md in a real browser: models/hybrid.py computes there what it does in onnxruntime."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from chromium import chromium, needs_chromium

from moe_export.verify import OnnxRuntimeRunner

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "browser.md"
PACKAGES = ROOT / "build" / "npm"
"""Where the package stays for the next run: it has 130 MB."""
NPM = shutil.which("npm")
pytestmark = [
    pytest.mark.slow,
    needs_chromium,
    pytest.mark.skipif(not NPM, reason="no npm on this machine, which onnxruntime-web comes from"),
]


class Quiet(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012  # fmt: skip

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def package() -> Path:
    """The files of onnxruntime-web, of the version that the page names."""
    wanted = re.search(r"npm install (onnxruntime-web@([\d.]+))", PAGE.read_text(encoding="utf-8"))
    assert wanted is not None
    folder = PACKAGES / wanted[2]
    if not (folder / "node_modules" / "onnxruntime-web").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = [str(NPM), "install", "--no-audit", "--no-fund", "--ignore-scripts", wanted[1]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install {wanted[1]}: {(done.stderr.strip() or 'no reason')[-200:]}")
    return folder / "node_modules" / "onnxruntime-web" / "dist"


@pytest.fixture
def site(command, tmp_path, package) -> Iterator[tuple[str, Path]]:
    """The page's own HTML with the files that it asks for, served; its address, and the graph."""
    folder = tmp_path / "site"
    assert (
        command(ROOT / "models" / "hybrid.py", "-o", folder, "--quiet", "--no-gate", "--no-verify").code == 0
    )
    html = re.search(r"^```html\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert html is not None
    (folder / "index.html").write_text(html[1], encoding="utf-8")
    for name in re.findall(r"onnxruntime-web/dist/([\w.-]+)`", PAGE.read_text(encoding="utf-8")):
        shutil.copy(package / name, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder / "hybrid.onnx"
    server.shutdown()
    server.server_close()


def test_hybrid_computes_in_a_browser_what_onnxruntime_does(site, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    address, graph = site
    runner = OnnxRuntimeRunner(graph)
    generator = np.random.default_rng(0)
    with chromium(tmp_path / "profile") as browser:
        browser.set_script_timeout(60)
        browser.get(address)
        WebDriverWait(browser, 60).until(lambda page: page.title == "ready")
        for batch, length in ((1, 1), (1, 5), (3, 8), (2, 33)):
            ids = generator.integers(0, 50, (batch, length))
            want = runner.run({"input_ids": ids})["logits"]
            found = browser.execute_script(
                "return window.run(arguments[0], arguments[1])", ids.ravel().tolist(), batch
            )
            got = np.array(found, np.float32).reshape(want.shape)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        want = runner.run({"input_ids": np.array([[3, 1, 4, 1, 5]])})["logits"][0, -1].argmax()
        assert browser.find_element("id", "next").text == f"next token: {want}"
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry["message"] for entry in severe if "favicon" not in entry["message"]] == []
