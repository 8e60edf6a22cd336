"""`moe-export rewrite`: ONNX files and equations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from moe_export.cli import run

MODEL = """<ir_version: 8, opset_import: ["" : 17]> g (float[B,64] x) => (float[B,32] y, float[B] z) {
    y = Einsum<equation="bd,nd->bn">(x, w)
    z = Einsum<equation="bd,bd->b">(x, x)
}"""
WEIGHT = np.arange(32 * 64, dtype=np.float32).reshape(32, 64)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = parser.parse_model(MODEL)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=10)
    return tmp_path / "m.onnx"


def test_a_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.parent / "new" / "out.onnx"
    assert run(["rewrite", str(model), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 einsums rewritten, 0 left" in said
    assert "1 x  bd,bd->b  became  multiply, sum" in said
    after = onnx.load(out)
    assert [node.op_type for node in after.graph.node] == ["MatMul", "Mul", "ReduceSum"]
    onnx.checker.check_model(str(out), full_check=True)
    # The weight was transposed, and lies outside the graph as it did before.
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    weight = onnx.numpy_helper.to_array(after.graph.initializer[0])
    np.testing.assert_array_equal(weight, WEIGHT.T)


def test_over_itself(model: Path) -> None:
    assert run(["rewrite", str(model), "-o", str(model), "-q", "--force"]) == 0
    onnx.checker.check_model(str(model), full_check=True)
    assert "Einsum" not in {node.op_type for node in onnx.load(model).graph.node}


def test_the_evidence_and_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(model.parent / "out.onnx")
    run(["rewrite", str(model), "-o", out, "--prove"])
    assert "numbers equal, at b=2 d=3 n=5; b=5 d=3 n=2" in capsys.readouterr().out
    run(["rewrite", str(model), "-o", out, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [site["became"] for site in document["sites"]] == ["permute, matmul", "multiply, sum"]
    assert document["left"] == []


def test_keeping_matrix_products(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.parent / "out.onnx"
    assert run(["rewrite", str(model), "-o", str(out), "--keep-einsum"]) == 0
    assert "1 einsum rewritten, 1 left" in capsys.readouterr().out
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Einsum", "Mul", "ReduceSum"]


def test_what_must_stay_is_told_and_exits_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = parser.parse_model(MODEL.replace("bd,nd->bn", "...d,nd->...n").replace("(x, w)", "(u, w)").replace(
        "{", "{ u = other.op(x)", 1).replace('"" : 17', '"" : 17, "other" : 1'))  # fmt: skip
    proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    assert run(["rewrite", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out.onnx")]) == 3
    said = capsys.readouterr().out
    assert "nothing is known of the shape of operand 0 ('u')" in said
    assert "hint: write the shape into the file" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx", "-o", "out.onnx"], "there is no file nowhere.onnx"),
        (["nowhere.onnx"], "-o is missing"),
        (
            ["nowhere.onnx", "-o", "out.onnx", "--max-intermediate", "much"],
            "--max-intermediate is a size, not 'much'",
        ),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rewrite", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_limit_that_no_plan_keeps(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.parent / "out.onnx"
    assert run(["rewrite", str(model), "-o", str(out), "--max-intermediate", "1kB"]) == 3
    assert "every plan has an intermediate of more than 250 elements" in capsys.readouterr().out


def test_an_equation_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rewrite", "bdn,bn->bd", "--size", "b=8,d=1024,n=16"]) == 0
    said = capsys.readouterr().out
    for part in (
        "* unsqueeze, matmul, squeeze",
        "unsqueeze, multiply, sum",
        "repeat_interleave to (b, d, n), multiply, sum",
        "matmul(y, x.transpose(-1, -2)).squeeze(1)",
        "why: a matrix product sums as it multiplies",
        "out = (x @ y.unsqueeze(-1)).squeeze(-1)",
        '"out.matmul" = MatMul (x, "out.unsqueeze")',
    ):
        assert part in said
