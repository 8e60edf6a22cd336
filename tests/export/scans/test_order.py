"""Loops stand behind all that does not need them, and the graph computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from moe_export.export.scans.order import loops_first

GRAPH = """
<ir_version: 8, opset_import: ["": 17]>
loops (float[L, 3] x, float[3] h) => (float[L, 3] y, float[3] last)
{
    scale = Abs (h)
    first, sums = Scan <num_scan_inputs = 1, body = add (float[3] s, float[3] e) => (float[3] n, float[3] m) {
        t = Mul (e, scale)
        n = Add (s, t)
        m = Identity (n)
    }> (h, x)
    twice = Add (x, x)
    other = Exp (h)
    last, again = Scan <num_scan_inputs = 1, body = add (float[3] s, float[3] e) => (float[3] n, float[3] m) {
        u = Mul (e, first)
        n = Add (s, u)
        m = Identity (n)
    }> (other, sums)
    skip = Sub (twice, sums)
    y = Add (again, skip)
}
"""


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def test_each_loop_stands_behind_what_does_not_need_it() -> None:
    before = onnx.parser.parse_model(GRAPH)
    model = ir.from_proto(before)
    loops_first(model.graph)
    made = [node.outputs[0].name for node in model.graph]
    assert made == ["scale", "twice", "other", "first", "skip", "last", "y"]
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    generator = np.random.default_rng(0)
    for length in (1, 7):
        feed = {
            "x": generator.standard_normal((length, 3), np.float32),
            "h": generator.standard_normal(3, np.float32),
        }
        for wanted, found in zip(run(before, feed), run(after, feed), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_a_body_that_reads_a_loop_keeps_its_node_behind_it() -> None:
    """The second loop's body reads `first`, which only the first loop makes."""
    model = ir.from_proto(onnx.parser.parse_model(GRAPH))
    loops_first(model.graph)
    loops = [node for node in model.graph if node.op_type == "Scan"]
    assert [loop.outputs[0].name for loop in loops] == ["first", "last"]
    before = [node.outputs[0].name for node in model.graph]
    loops_first(model.graph)
    assert [node.outputs[0].name for node in model.graph] == before
