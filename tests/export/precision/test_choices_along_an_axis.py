"""Choices along any axis cross the border with that axis last, and a graph takes those that it is told."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moe_export.export.precision.choices import (
    CHOICE,
    FORCED,
    SCORES,
    find_choices,
    with_choices_out,
    with_forced_choices,
)
from moe_export.verify.runners.torch_modes import ChoiceWatcher


def graph(axis: int) -> ir.Model:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3, 4, 5] x) => (float[?, ?, ?] y, int64[?, ?, ?] at) <int64[1] k = {{2}}> {{
            best, at = TopK <axis = {axis}> (x, k)
            y = Neg(best)
        }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def run(model: ir.Model, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_told_and_watched_agree_on_the_layout(axis):
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    model = graph(axis)
    assert len(find_choices(model)) == 1
    with ChoiceWatcher() as watcher:
        torch.topk(torch.from_numpy(x), 2, dim=axis)
    ((positions, scores),) = watcher.found
    own = run(with_choices_out(model), x=x)
    np.testing.assert_array_equal(own[CHOICE.format(0)], positions)
    told = run(with_forced_choices(model), x=x, **{FORCED.format(0): np.ascontiguousarray(positions.numpy())})
    np.testing.assert_array_equal(told["y"], own["y"])
    np.testing.assert_array_equal(told[SCORES.format(0)], scores)
    other = np.zeros_like(positions.numpy())
    told = run(with_forced_choices(model), x=x, **{FORCED.format(0): other})
    np.testing.assert_array_equal(told["y"], -np.repeat(np.take(x, [0], axis), 2, axis))
    np.testing.assert_array_equal(told[CHOICE.format(0)], positions)
