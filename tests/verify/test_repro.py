"""A reproduction runs by itself, without this project, and fails as long as the fault is there; an overlay tells each
node's error where Netron shows it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import netron
import numpy as np
import onnx
import pytest

from moe_export.verify.localise.level import Cut
from moe_export.verify.localise.overlay import attachment, with_errors, write_overlay
from moe_export.verify.localise.reference import GraphValues
from moe_export.verify.localise.repro import write_repro
from moe_export.verify.localise.search import find_faulty_node

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
X = {"x": np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)}
GRAPH = "g (float[n,4] x) => (float[n,4] y) { a = Relu(x) b = Tanh(a) c = Mul(b, x) y = Add(c, a) }"


def parsed(text):
    model = onnx.parser.parse_model(HEADER + text)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def run_script(tmp_path):
    """Run the script of a reproduction, with no import of this project possible."""

    def run():
        (tmp_path / "moe_export.py").write_text("raise ImportError('a reproduction stands alone')\n")
        done = subprocess.run(
            [sys.executable, str(tmp_path / "run.py")],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def localisation():
    good, bad = parsed(GRAPH), parsed(GRAPH.replace("Tanh", "Sigmoid"))
    return bad, find_faulty_node(bad, X, GraphValues(good, X))


def test_the_faulty_node_by_itself(localisation, tmp_path, run_script):
    _, found = localisation
    write_repro(tmp_path, found.cut, str(found))
    model = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["Sigmoid"]
    onnx.checker.check_model(model)
    code, said = run_script()
    assert code == 1
    assert "b: 20 of 20 elements are wrong" in said


def test_the_fault_goes_and_the_script_says_so(localisation, tmp_path, run_script):
    _, found = localisation
    write_repro(tmp_path, found.cut, str(found))
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.node[0].op_type = "Tanh"
    onnx.save(model, tmp_path / "model.onnx")
    assert run_script() == (0, "b: 0 of 20 elements are wrong, largest difference 0\n")


def test_a_node_that_fails(tmp_path, run_script):
    model = parsed("g (float[n,4] x, float[m,3] z) => (float[n,4] y) { y = Relu(x) }")
    model.graph.node[0].CopyFrom(onnx.helper.make_node("Add", ["x", "z"], ["y"]))
    z = np.ones((5, 3), np.float32)
    write_repro(tmp_path, Cut(model, {**X, "z": z}, {"y": X["x"]}), "a sum of shapes that do not fit")
    code, said = run_script()
    assert code == 1
    assert said.startswith("it fails: ")


def test_a_node_of_a_body(tmp_path, run_script):
    text = """g (float[t,4] x) => (float[4] last) {
  start = Constant<value=float[4] {0, 0, 0, 0}>()
  last = Scan<num_scan_inputs=1, body = step (float[4] h, float[4] e) => (float[4] next) {
    bent = Tanh(e)
    next = Add(h, bent)
  }>(start, x)
}"""
    good, bad = parsed(text), parsed(text.replace("Tanh", "Sigmoid"))
    found = find_faulty_node(bad, X, GraphValues(good, X))
    write_repro(tmp_path, found.cut, str(found))
    assert [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node] == ["Sigmoid"]
    assert run_script()[0] == 1


def test_types_that_numpy_lacks(tmp_path, run_script):
    model = parsed("g (bfloat16[n,4] x) => (float[n,4] y) { y = Cast<to=1>(x) }")
    narrow = X["x"].astype(ml_dtypes.bfloat16)
    write_repro(tmp_path, Cut(model, {"x": narrow}, {"y": narrow.astype(np.float32)}), "nothing is wrong")
    assert run_script()[0] == 0
    back = parsed("g (float[n,4] x) => (bfloat16[n,4] y) { y = Cast<to=16>(x) }")
    write_repro(tmp_path, Cut(back, X, {"y": narrow}), "nothing is wrong here either")
    assert run_script()[0] == 0


def test_a_sequence_cannot_be_stored(tmp_path):
    with pytest.raises(ValueError, match="sequence"):
        write_repro(tmp_path, Cut(parsed(GRAPH), {"x": [X["x"]]}, {"y": X["x"]}), "")


def facts(node):
    return {entry.key: entry.value for entry in node.metadata_props}


def test_each_node_says_its_error(localisation):
    bad, found = localisation
    nodes = {node.output[0]: facts(node) for node in with_errors(bad, found).graph.node}
    assert nodes["a"] == {"own error": "0", "own error / rounding": "0", "inherited error": "0"}
    assert nodes["b"]["faulty node"].startswith("Sigmoid node_b")
    assert float(nodes["b"]["own error"]) > 0.4
    assert nodes["c"]["own error"] == "0"
    assert float(nodes["c"]["inherited error"]) > 0.1
    assert all(not facts(node) for node in bad.graph.node)


def test_the_overlay_opens_in_netron(localisation, tmp_path):
    """Netron's own server reads both files; the attachment has the form that its viewer looks for."""
    bad, found = localisation
    graph, attached = write_overlay(tmp_path, bad, found)
    onnx.checker.check_model(onnx.load(graph), full_check=True)
    data = json.loads(attached.read_text())
    assert data["signature"] == "netron:attachment"
    assert {metric["target"] for metric in data["metrics"]} == {node.name for node in bad.graph.node}
    assert all(metric["kind"] == "node" and isinstance(metric["value"], str) for metric in data["metrics"])
    view = Path(netron.__file__).with_name("view.js").read_text(encoding="utf-8")
    assert f"'{data['signature']}'" in view
    assert attachment(found) == data
