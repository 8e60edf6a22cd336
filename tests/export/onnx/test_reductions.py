"""Reductions whose axes OpenVINO overlooks: written by sums they are what ONNX Runtime computes, infinities too."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moe_export.errors import UsageError
from moe_export.export.onnx.reductions import OVERLOOKED, reductions_by_sum
from moe_export.verify import OnnxRuntimeRunner
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

INFINITE = [[-np.inf, -np.inf, -np.inf, -np.inf], [np.inf, 1, 2, 3], [-np.inf, 0, 1, -1]]
LARGE = [[1e3, 1e3, -1e3, 0], [-1e3, -1e3, -2e3, -1e3], [88, 89, 90, 91]]


@pytest.mark.parametrize("operator", sorted(OVERLOOKED))
@pytest.mark.parametrize(
    ("axes", "keep", "shape"), [([1], 1, "n,1"), ([-1], 0, "n"), ([0], 1, "1,4"), ([0, 1], 1, "1,1")]
)
def test_both_engines_compute_what_onnxruntime_does_of_one_node(operator, axes, keep, shape):
    before = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[n,4] x) => (float[{shape}] y) {{ y = {operator}<axes = {axes}, keepdims = {keep}>(x) }}"
    )
    model = ir.from_proto(before)
    assert (reductions_by_sum(model), reductions_by_sum(model)) == (1, 0)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    expects = OnnxRuntimeRunner(before.SerializeToString())
    engines = [runner(after.SerializeToString()) for runner in (OnnxRuntimeRunner, OpenVinoRunner)]
    with pytest.raises(UsageError, match=f"overlooks the attribute axes of {operator}"):
        OpenVinoRunner(before.SerializeToString())
    cases = [np.random.default_rng(0).random((rows, 4)) for rows in (1, 3)]
    cases += [np.array(LARGE), np.array(INFINITE)] if operator == "ReduceLogSumExp" else []
    for case in cases:
        x = {"x": case.astype(np.float32)}
        right = by_definition(operator, case, tuple(axes), bool(keep))
        np.testing.assert_allclose(expects.run(x)["y"], right, rtol=1e-5)
        for engine in engines:
            np.testing.assert_allclose(engine.run(x)["y"], right, rtol=1e-5, atol=1e-6)


def by_definition(operator, x, axes, keep):
    if operator == "ReduceL1":
        return np.abs(x).sum(axes, keepdims=keep)
    if operator == "ReduceLogSum":
        return np.log(x.sum(axes, keepdims=keep))
    for axis in axes:
        x = np.logaddexp.reduce(x, axis, keepdims=True)
    return x if keep else x.squeeze(axes)
