"""`moe-export bench`: every backend that is there is measured, and what is not is named with its reason."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moe_export.export.engines.build import has_gpu
from moe_export.running.benching import Job, Timing, measure
from moe_export.running.inputs import inputs_at


@pytest.mark.slow
def test_backends_are_measured_or_named(command, finished, tmp_path):
    for name in ("block.onnx", "block.py"):
        shutil.copy(finished / name, tmp_path / name)
    assert command("build", "block.onnx", "--engine", "sm75", "--quiet").code == 0
    done = command(
        "bench", "block.onnx", "--against", "block.py", "--size", "sequence=16", "--repeat", "5", "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["sizes"] == {"batch": 1, "sequence": 16}
    found = {entry["name"]: entry for entry in document["backends"]}
    assert set(found) == {
        "torch", "torch-cuda", "onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino",
        "block.sm75.engine",
    }  # fmt: skip
    for name in ("torch", "onnxruntime-cpu", "openvino"):
        entry = found[name]
        assert 0 < entry["p10_ms"] <= entry["median_ms"] <= entry["p90_ms"]
        assert entry["calls_per_second"] == pytest.approx(1000 / entry["median_ms"])
        assert entry["memory"] >= 0
        assert entry["bound_ms"] > 0
    cost = document["cost"]
    assert 0 < sum(part["flops"] for part in cost["blocks"].values()) <= cost["flops"]
    assert cost["weight_bytes"] > 0
    assert cost["activation_bytes"] > 0
    if not has_gpu():
        assert "no GPU" in found["block.sm75.engine"]["reason"]
        assert found["torch-cuda"]["reason"] == "no GPU that PyTorch can use"
        assert "cannot use cuda here" in found["onnxruntime-cuda"]["reason"]


def test_a_size_that_there_is_not(command, finished):
    done = command("bench", finished / "block.onnx", "--size", "len=3")
    assert done.code == 2
    assert "no dynamic dimension 'len'" in done.err


def test_values_that_decide_shapes_are_given_as_sizes_are():
    text = "g (float[n, 6] x, int64[2] s, int64 k) => (float[a, b] y) { y = Reshape(x, s) }"
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}'))
    found = inputs_at(model, {"n": 4, "s_0": 3, "s_1": 8})
    assert found["x"].shape == (4, 6)
    assert found["s"].tolist() == [3, 8]
    assert (found["s"].dtype, found["k"].shape, found["k"].item()) == (np.int64, (), 0)


def test_quantiles_are_those_of_the_runs():
    timing = Timing("x", tuple(float(number) for number in range(101)))
    assert (timing.quantile(0.1), timing.quantile(0.5), timing.quantile(0.9)) == (10, 50, 90)
    assert Timing("x", reason="no").to_dict() == {"name": "x", "reason": "no"}


class Crash:
    """Ends the process that unpickles it, as a crash in native code does."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_crash_ends_one_measurement_only():
    timing = measure(Job("onnxruntime-cpu", "graph.onnx", {"x": Crash()}))
    assert timing.reason == "it crashed the process"


def test_what_cannot_be_opened_says_why():
    assert measure(Job("onnxruntime-cpu", "nowhere.onnx", {})).reason == "no such file: nowhere.onnx"


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="measuring a GPU needs one")
def test_a_gpu_is_measured(command, finished):
    done = command(
        "bench", finished / "block.onnx", "--against", finished / "block.py", "--compile", "--json"
    )
    found = {entry["name"]: entry for entry in json.loads(done.out)["backends"]}
    for name in ("torch-cuda", "torch.compile-cuda", "onnxruntime-cuda"):
        entry = found[name]
        assert 0 < entry["p10_ms"] <= entry["median_ms"] <= entry["p90_ms"], entry
        assert entry["memory"] > 0
        assert entry["bound_ms"] > 0
