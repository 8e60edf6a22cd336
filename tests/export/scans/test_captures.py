"""What a Scan reads from around it goes in as a state; the graph computes what it did, and OpenVINO takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from moe_export.errors import UsageError
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.onnx.bodies import reads
from moe_export.export.scans.captures import captures_as_states
from moe_export.verify import OnnxRuntimeRunner
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

MODELS = Path(__file__).resolve().parents[3] / "models"
GRAPH = """
<ir_version: 8, opset_import: ["": 17]>
g (float[L, 3] x, float[3] h, float[3] w) => (float[L, 3] y, float[3] last)
<float[3] constant = {1.0, 2.0, 3.0}>
{
    scale = Abs (w)
    last, sums = Scan <num_scan_inputs = 1, body = add (float[3] s, float[3] e) => (float[3] n, float[3] m) {
        t = Mul (e, scale)
        u = Add (t, constant)
        v = Sub (u, w)
        n = Add (s, v)
        m = Mul (n, scale)
    }> (h, x)
    y = Identity (sums)
}
"""
NESTED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[L, 3] x, float[3] h, float[3] w) => (float[3] last)
{
    scale = Abs (w)
    last = Scan <num_scan_inputs = 1, body = outer (float[3] s, float[3] e) => (float[3] n) {
        twice = Add (e, e)
        n = Scan <num_scan_inputs = 1, body = inner (float[3] a, float f) => (float[3] b) {
            g1 = Mul (a, scale)
            g2 = Add (g1, twice)
            b = Mul (g2, f)
        }> (s, e)
    }> (h, x)
}
"""


@pytest.mark.parametrize(("text", "rewritten"), [(GRAPH, 1), (NESTED, 2)], ids=["one", "nested"])
def test_it_computes_the_same_in_both_engines(text, rewritten):
    before = onnx.parser.parse_model(text)
    model = ir.from_proto(before)
    assert captures_as_states(model) == rewritten
    assert captures_as_states(model) == 0
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    scan = next(node for node in model.graph if node.op_type == "Scan")
    assert all(value.const_value is not None for value in reads(scan) if value not in scan.inputs)
    with pytest.raises(UsageError, match="the body of a Scan reads a value"):
        OpenVinoRunner(before.SerializeToString())
    if rewritten == 2:
        with pytest.raises(UsageError, match="No nested TensorIterator"):
            OpenVinoRunner(after.SerializeToString())
    generator = np.random.default_rng(0)
    right = OnnxRuntimeRunner(before.SerializeToString())
    same = OnnxRuntimeRunner(after.SerializeToString())
    other = OpenVinoRunner(after.SerializeToString()) if rewritten == 1 else same
    for length in (1, 4, 9):
        inputs = {"x": generator.standard_normal((length, 3)).astype(np.float32)}
        inputs |= {name: generator.standard_normal(3).astype(np.float32) for name in "hw"}
        for name, value in right.run(inputs).items():
            np.testing.assert_array_equal(same.run(inputs)[name], value)
            np.testing.assert_allclose(other.run(inputs)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_a_graph_for_openvino_is_the_models_in_both_engines(name):
    """Its Scan takes eight steps an iteration, also where the length is not a multiple of eight."""
    subject = load_subject(str(MODELS / f"{name}.py"))
    graph = export_subject(subject, Options(gates=False, target="openvino"))[0]
    data = ir.to_proto(graph.model).SerializeToString()
    engines = (OpenVinoRunner(data), OnnxRuntimeRunner(data))
    (key, given), *_ = subject.inputs.items()
    for batch, length in ((1, 1), (2, 7), (1, 8), (3, 19)):
        value = given[:1].repeat(batch, *[1] * (given.ndim - 1))
        value = value[:, torch.arange(length) % given.shape[1]]
        with torch.no_grad():
            expected = [each.numpy() for each in subject.call([value])]
        for engine in engines:
            found = engine.run({key: value.numpy()}).values()
            for got, want in zip(found, expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
