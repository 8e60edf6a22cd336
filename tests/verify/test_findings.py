"""The faults on docs/findings.md are there: each graph, in a process of its own, as some of them end it.

A test that fails here is good news: a newer version computes the graph right. Take the entry off the page, and look for
the workaround that it names.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from canaries import canary
from slow_cases import one_in

PAGE = Path(__file__).resolve().parents[2] / "docs" / "findings.md"
_ENTRY = re.compile(
    r"^### (?P<title>[^\n]+)\n.*?(?P<marks>(?:<!-- finding: [^\n]+ -->\n)+)```text\n(?P<text>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"<!-- finding: (?P<engine>\w+) (?P<fate>ends|differs|fails); (?P<inputs>[^\n]+) -->")
ALONE = """
import sys, numpy as np
from moe_export.verify import OnnxRuntimeRunner
engine, folder = sys.argv[1:]
inputs = dict(np.load(folder + "/inputs.npz"))
if engine == "onnxruntime":
    found = OnnxRuntimeRunner(folder + "/model.onnx").run(inputs)
else:
    import openvino
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(folder + "/model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answer = compiled({port: inputs[name] for port in compiled.inputs for name in port.get_names()})
    found = {name: answer[port] for port in compiled.outputs for name in port.get_names()}
np.savez(folder + "/found.npz", **found)
"""


@dataclass(frozen=True)
class Finding:
    """One graph in one engine: what it is said to do, and on which inputs (`x float32 2x3; v int64 3`)."""

    title: str
    engine: str
    fate: str
    inputs: str
    text: str

    def arrays(self) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(0)
        found = {}
        for given in self.inputs.split("; "):
            name, dtype, sizes = given.split()
            shape = [int(size) for size in sizes.split("x")]
            found[name] = generator.standard_normal(shape)
            found[name] = (found[name] > 0 if dtype == "bool" else found[name]).astype(dtype)
        return found


def findings() -> list[Finding]:
    found = []
    for entry in _ENTRY.finditer(PAGE.read_text(encoding="utf-8")):
        for mark in _MARK.finditer(entry["marks"]):
            found.append(Finding(entry["title"], mark["engine"], mark["fate"], mark["inputs"], entry["text"]))
    return found


FINDINGS = findings()


def test_each_graph_of_the_page_has_an_outcome():
    blocks = re.findall(r"^```text$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({each.text for each in FINDINGS}) == len(blocks)
    assert {each.engine for each in FINDINGS} == {"onnxruntime", "openvino"}


@pytest.mark.parametrize("finding", one_in(3, FINDINGS), ids=lambda each: f"{each.engine} {each.title}"[:60])
def test_canary_the_fault_is_there(finding, tmp_path):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {finding.text}')
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "model.onnx")
    inputs = finding.arrays()
    np.savez(tmp_path / "inputs.npz", **inputs)
    command = [sys.executable, "-c", ALONE, finding.engine, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with canary(
        "docs/findings.md",
        f"in {finding.engine}, '{finding.title}' {finding.fate}",
        todo="take the entry off the page, and the workaround that it names out of the code",
    ):
        if finding.fate == "ends":
            assert done.returncode < 0
        elif finding.fate == "fails":
            assert done.returncode == 1
        else:
            assert done.returncode == 0, done.stderr
            assert differs(model, inputs, np.load(tmp_path / "found.npz"))


def differs(model, inputs, found) -> bool:
    """By more than 1e-5 of the largest value, or in its shape."""
    names = [output.name for output in model.graph.output]
    expected = onnx.reference.ReferenceEvaluator(model).run(names, inputs)
    for name, want in zip(names, expected, strict=True):
        got = found[name]
        if got.shape != want.shape:
            return True
        error = np.abs(got.astype(float) - want.astype(float))
        if want.size and error.max() > 1e-5 * np.abs(want.astype(float)).max():
            return True
    return False
