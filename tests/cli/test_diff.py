"""`diff` counts what differs; `view -o` and `diff -o` write pictures that parse."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx.parser
import pytest

BEFORE = """g (float[n, 8] x) => (float[n, 4] y) {
    a = Einsum <equation = "ij,jk->ik"> (x, w)
    y = Relu(a)
}"""
AFTER = """g (float[n, 8] x) => (float[n, 4] y) {
    a = MatMul(x, w)
    y = Relu(a)
}"""
FIXED = """g (float[3, 8] x) => (float[3, 4] out) {
    a = MatMul(x, w)
    b = Neg(a)
    out = Neg(b)
}"""


@pytest.fixture
def save(tmp_path):
    def save(name: str, text: str, opset: int = 17, modules: tuple[str, ...] = ()) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
        weight = np.ones((8, 4), dtype=np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        for node, module in zip(model.graph.node, modules, strict=False):
            node.metadata_props.add(key="module", value=module)
        onnx.checker.check_model(model, full_check=True)
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return save


def test_what_differs_in_numbers(command, save):
    done = command("diff", save("before.onnx", BEFORE), save("after.onnx", AFTER), "--size", "n=5", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["operators"] == {
        "Einsum": {"before": 1, "after": 0, "difference": -1},
        "MatMul": {"before": 0, "after": 1, "difference": 1},
        "Relu": {"before": 1, "after": 1, "difference": 0},
    }
    for side in ("before", "after"):
        assert found[side]["flops"] == 2 * 5 * 8 * 4 + 5 * 4
        assert found[side]["parameters"] == 32
        assert found[side]["weight_bytes"] == 4 * 32
        assert found[side]["activation_bytes"] == 2 * 4 * 5 * 4
        assert found[side]["sizes"] == {"n": 5}
        assert found[side]["opset"] == {"onnx": 17}
        assert found[side]["uncounted"] == []
    assert found["ports"] == {}
    assert found["values"] == {"only_before": [], "only_after": [], "both": 1}


def test_what_differs_in_words(command, save):
    done = command("diff", save("before.onnx", BEFORE, 18), save("after.onnx", FIXED))
    assert done.code == 0
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "before.onnx → after.onnx" in lines
    assert "nodes 2 3 +1" in lines
    assert "parameters 32 32 the same" in lines
    assert "Neg 0 2 +2" in lines
    assert "Relu 1 0 -1" in lines
    assert "opset: 18 → 17" in lines
    assert "input x: float [n × 8] → float [3 × 8]" in lines
    assert "output y → out: float [n × 4] → float [3 × 4]" in lines
    assert "counted before: at n=3" in lines  # as the other has it fixed
    assert "only after: b" in lines


@pytest.mark.parametrize(
    ("asked", "size"),
    [((), 1), (("--size", "n=7"), 7), (("--size", "batch=5"), 5), (("--size", "n=7,batch=5"), None)],
)
def test_both_are_counted_at_the_same_sizes_whatever_they_call_them(command, save, asked, size):
    before, after = save("before.onnx", BEFORE), save("after.onnx", AFTER.replace("[n,", "[batch,"))
    found = json.loads(command("diff", before, after, *asked, "--json").out)
    wanted = (7, 5) if size is None else (size, size)
    assert (found["before"]["sizes"], found["after"]["sizes"]) == ({"n": wanted[0]}, {"batch": wanted[1]})
    same = found["before"]["flops"] == found["after"]["flops"]
    assert same == (size is not None)


def test_a_graph_and_itself(command, save):
    path = save("same.onnx", AFTER)
    done = command("diff", path, path)
    assert done.code == 0
    assert "operators of which both have as many: 2" in done.out
    assert "inputs and outputs: the same" in done.out
    assert "only before" not in done.out


def test_functions_are_compared_written_out(command, finished, tmp_path):
    done = command(finished / "moe.py", "--functions", "--no-gate", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads(command("diff", finished / "moe.onnx", tmp_path / "out" / "moe.onnx", "--json").out)
    assert [name for name, counts in found["operators"].items() if counts["difference"]] == []
    assert found["before"]["flops"] == found["after"]["flops"]


def test_a_graph_that_does_not_run_is_still_compared(command, save):
    path = save("plain.onnx", AFTER)
    model = onnx.load(path)
    model.graph.node.add(op_type="What", domain="nowhere", input=["a"], output=["z"])
    model.opset_import.add(domain="nowhere", version=1)
    other = path.with_name("strange.onnx")
    onnx.save(model, other)
    done = command("diff", path, other)
    assert done.code == 0
    assert "FLOPs and activations are not known" in done.out
    assert "nowhere::What" in done.out


def test_side_by_side(command, save, tmp_path):
    before = save("before.onnx", BEFORE, modules=("layer", "act"))
    after = save("after.onnx", FIXED, modules=("layer", "act", "late"))
    done = command("diff", before, after, "-o", tmp_path / "both.svg")
    assert done.code == 0
    assert f"written: {tmp_path / 'both.svg'}" in done.out
    text = (tmp_path / "both.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    about = root.find("{http://www.w3.org/2000/svg}desc").text
    assert "layer: differs." in about  # an Einsum, and a MatMul
    assert "late: only here." in about
    assert "before: before.onnx" in text


def test_a_picture_of_a_graph(command, finished, tmp_path):
    done = command("view", finished / "moe.onnx", "-o", tmp_path / "new" / "moe.svg")
    assert done.code == 0
    assert "opset 17" in done.out
    root = ElementTree.fromstring((tmp_path / "new" / "moe.svg").read_text(encoding="utf-8"))
    assert root.find("{http://www.w3.org/2000/svg}title").text == "moe.onnx"


def test_the_level_is_chosen(command, finished, tmp_path):
    for level in ("nodes", "blocks"):
        path = tmp_path / f"{level}.svg"
        assert command("view", finished / "moe.onnx", "-o", path, "--level", level).code == 0
    nodes, blocks = ((tmp_path / f"{level}.svg").read_text().count("<rect") for level in ("nodes", "blocks"))
    assert nodes > blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diff", "{good}", "nowhere.onnx"), "no file nowhere.onnx"),
        (("diff", "{bad}", "{good}"), "is not an ONNX model"),
        (("diff", "{good}", "{good}", "--size", "n"), "--size 'n' is not DIM=SIZE,..."),
        (("diff", "{good}", "{good}", "--size", "m=3"), "theirs are: n"),
        (("diff", "{good}", "{good}", "-o", "out.png"), "is a .svg file, not out.png"),
        (("view", "{good}", "-o", "out.png"), "is a .svg file, not out.png"),
        (("view", "{bad}", "-o", "out.svg"), "is not an ONNX model"),
        (("view", "{good}", "--level", "nodes"), "--level goes with --output"),
    ],
)
def test_what_cannot_be_done_is_said(command, save, tmp_path, arguments, message):
    (tmp_path / "bad.onnx").write_bytes(b"no graph at all")
    names = {"good": str(save("good.onnx", AFTER)), "bad": str(tmp_path / "bad.onnx")}
    done = command(*(argument.format(**names) for argument in arguments))
    assert done.code == 2
    assert message in done.err
    assert not list(tmp_path.glob("out.*"))
