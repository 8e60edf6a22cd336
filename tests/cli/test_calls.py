"""`--list` shows what a script calls, `--call 2` picks one of it, and so does `script.py:2`."""

from __future__ import annotations

import json

import onnx
import pytest

TWO = """
import os, subprocess
import numpy as np
import onnx, onnxruntime
import torch
from torch import nn

class Encoder(nn.Module):
    def forward(self, x, mask):
        return x.masked_fill(mask[..., None], 0.0).mean(1)

encoder, decoder = Encoder().eval(), nn.Linear(8, 3)

if __name__ == "__main__":
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    for _ in range(3):
        h = encoder(x, mask)
    traced = torch.jit.trace(encoder, (x, mask))
    axes = {"x": {1: "sequence"}, "mask": {1: "sequence"}}
    torch.onnx.export(traced, (x, mask), "encoder.onnx", input_names=["x", "mask"], dynamic_axes=axes)
    onnx.checker.check_model(onnx.load("encoder.onnx"))
    session = onnxruntime.InferenceSession("encoder.onnx")
    session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    subprocess.run(["trtexec", "--onnx=encoder.onnx"], check=True)
    program = torch.export.export(decoder, (h,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.onnx.export(program, f="decoder.onnx", output_names=["logits"]).save("decoder.onnx")
    with open("decoder.onnx", "rb") as file:
        file.read()
"""
CALLS = [
    ("two.py:17", "a call", "Encoder", ["float32[2, 5, 8]", "bool[2, 5]"]),
    ("two.py:18", "torch.jit.trace", "Encoder", ["float32[2, 5, 8]", "bool[2, 5]"]),
    ("two.py:20", "torch.onnx.export", "Encoder", ["float32[2, 5, 8]", "bool[2, 5]"]),
    ("two.py:25", "torch.export.export", "Linear", ["float32[2, 8]"]),
    ("two.py:26", "torch.onnx.export", "Linear", ["float32[2, 8]"]),
]


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(TWO)
    return path


def test_every_call_is_listed_with_its_line_and_shapes(command, two, tmp_path):
    done = command(two, "--list")
    assert done.code == 0
    rows = [line.split(maxsplit=1)[1] for line in done.out.splitlines()[:5]]
    assert [row.split("  ")[0] for row in rows] == [line for line, *_ in CALLS]
    assert "note: the script fails after these: two.py raised FileNotFoundError" in done.out
    assert done.out.endswith("export one: moe-export two.py --call 5\n")
    assert [path.name for path in tmp_path.iterdir()] == ["two.py"]
    listed = json.loads(command(two, "--list", "--json").out)
    assert [tuple(row.values()) for row in listed] == CALLS


@pytest.mark.parametrize(
    ("spec", "words", "inputs", "outputs"),
    [
        ("two.py", (), ["x", "mask"], ["output"]),
        ("two.py", ("--call", "5"), ["input"], ["logits"]),
        ("two.py:4", (), ["input"], ["output"]),
    ],
)
def test_one_of_them_is_exported(command, two, spec, words, inputs, outputs):
    done = command(two.parent / spec, *words, "-o", "out", "--no-verify", "--no-simplify", "--quiet")
    assert (done.code, done.err) == (0, "")
    graph = onnx.load(two.parent / "out" / "two.onnx").graph
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == outputs


def test_that_there_are_several_is_said(command, two):
    done = command(two, "-o", "out", "--no-verify", "--no-simplify")
    assert (
        "note: two.py exports 2 times, and this is one of them: --list shows all, --call picks one"
        in done.out
    )
    done = command(two, "--call", "5", "-o", "out", "--no-verify", "--no-simplify")
    assert "exports 2 times" not in done.out


def test_an_axis_that_has_to_equal_one_that_nobody_named_is_refused_with_both(command, two):
    two.write_text(TWO.replace(', "mask": {1: "sequence"}}', "}"))
    done = command(two, "-o", "out")
    assert done.code == 3
    assert "dimension 1 of x cannot be dynamic: it is fixed at 5" in done.err
    assert "hint: mask:1 of the same size is fixed, too; try --dynamic x:1=n --dynamic mask:1=n" in done.err
    assert command(two, "-o", "out", "--dynamic", "x:1=n", "--dynamic", "mask:1=n", "--no-verify").code == 0


def test_what_is_not_there_is_said(command, two):
    done = command(two, "--call", "6")
    assert done.code == 2
    assert (
        "error: two.py makes 5 calls and then fails, so there is no call 6: two.py raised FileNotFoundError"
        in done.err
    )
    assert f"where: {two}:27" in done.err
    done = command(f"{two}:Encoder", "--call", "2")
    assert done.code == 2
    assert "--call picks a call of a script, and" in done.err
    two.write_text("x = 3\n")
    assert "two.py calls no exporter and no module" in command(two, "--list").err
    assert "two.py makes 0 calls, so there is no call 1" in command(two, "--call", "1").err
