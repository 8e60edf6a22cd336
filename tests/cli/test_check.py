"""`moe-export check`: what is refused, where, and what avoids it, without building."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from moe_export.cli import run

HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\ntorch.manual_seed(0)\n"
LOOP = """
class Loop(nn.Module):
    def forward(self, x):
        rows = torch.nonzero(x.sum(-1) > 0).squeeze(-1)
        return torch.zeros_like(x).index_add_(0, rows, x[rows])

model = Loop()
example_inputs = {"x": torch.randn(6, 8)}
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A graph with NonZero and a scatter that adds, exported once."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.py").write_text(HEADER + LOOP)
    assert run([str(folder / "rows.py"), "-o", str(folder), "--quiet"]) == 0
    return folder / "rows.onnx"


@pytest.fixture
def refused(rows, tmp_path):
    """A copy of that graph, where the command runs."""
    (tmp_path / "out").mkdir()
    shutil.copy(rows, tmp_path / "out")
    return "out/rows.onnx"


def test_each_refusal_names_the_node_the_line_and_a_way_out(command, refused):
    done = command("check", refused)
    assert done.code == 1
    assert "that TensorRT refuses" in done.out
    (nonzero,) = [line for line in done.out.splitlines() if "TensorRT-RTX has no NonZero" in line]
    assert nonzero.strip().startswith("node NonZero nonzero, rows.py:9, module model: ")
    assert "rows.py:9" in nonzero
    (scatter,) = [line for line in done.out.splitlines() if "without a reduction only" in line]
    assert "rows.py:10" in scatter
    assert "avoid it: --target tensorrt, or --experts blocks" in done.out


def test_json_holds_the_same(command, refused):
    done = command("check", refused, "--json")
    document = json.loads(done.out)
    assert done.code == 1
    assert document["verdict"] == "refused"
    assert {entry["source"] for entry in document["refused"]} == {"rows.py:9", "rows.py:10"}


def test_full_tensorrt_has_what_tensorrt_rtx_has_not(command, refused):
    done = command("check", refused, "--builder", "tensorrt", "--json")
    document = json.loads(done.out)
    assert document["builder"] == "tensorrt"
    assert not any("NonZero" in entry["node"] for entry in document["refused"])
    either = json.loads(command("check", refused, "--json").out)["refused"]
    assert {entry["builder"] for entry in either if "NonZero" in entry["node"]} == {"tensorrt-rtx"}


def test_the_builder_refuses_the_same(command, refused, listing, tmp_path):
    before = listing(tmp_path / "out")
    done = command("build", refused, "--engine", "sm89")
    assert done.code == 3
    for place in ("NonZero", "rows.py:9", "rows.py:10"):
        assert place in done.err
    assert listing(tmp_path / "out") == before


def test_it_claims_no_more_than_it_saw(command, finished):
    done = command("check", finished / "moe.onnx")
    assert done.code == 0
    assert (
        "nothing that TensorRT is known to refuse; only a build (moe-export build) shows that it builds"
        in done.out
    )
    document = json.loads(command("check", finished / "moe.onnx", "--json").out)
    assert document["verdict"] == "nothing known is refused; not built"


def test_quiet_is_the_exit_code(command, refused):
    done = command("check", refused, "--quiet")
    assert (done.code, done.out, done.err) == (1, "", "")


def test_it_needs_no_tensorrt(finished):
    code = (
        "import sys; sys.modules['tensorrt_rtx'] = None; from moe_export.cli import run; "
        f"raise SystemExit(run(['check', {str(finished / 'moe.onnx')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_no_graph_is_wrong_use(command, tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    assert command("check", "text.onnx").code == 2
    assert "is not an ONNX model" in command("check", "text.onnx").err
    assert command("check", "nowhere.onnx").code == 2
