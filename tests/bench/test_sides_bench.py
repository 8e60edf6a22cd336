"""A decision between two products: an `If` beside computing both and a `Where`, by the number of weights on a side.

`make bench` prints the figures. Both graphs compute one product of `rows * weights` multiplications where a `Where`
computes two, so the floor of the ratio is 0.5, and 1 where the calls' own time is all there is.
"""

from __future__ import annotations

import random
import statistics
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from moe_export.export.onnx import sides

ROUNDS, IN_A_ROW = 200, 10


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def both(width: int) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, {width}] x, bool c) => (float[N, {width}] y)'
        "{ a = MatMul(x, w) b = MatMul(x, u) y = Where(c, a, b) }"
    )
    rng = np.random.default_rng(0)
    for name in ("w", "u"):
        weights = (rng.normal(size=(width, width)) / width).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weights, name))
    return onnx.shape_inference.infer_shapes(proto)


@pytest.mark.parametrize("rows", [1, 64])
def test_a_branch_is_no_slower_from_the_size_at_which_it_is_written(rows, monkeypatch):
    monkeypatch.setattr(sides, "LEAST", 1)
    print(f"\n{rows} rows\n  weights    Where us       If us")
    for width in (16, 32, 64, 128, 256):
        proto = both(width)
        model = ir.from_proto(proto)
        assert sides.sides_in_branches(model) == 1
        found = {"Where": session(proto), "If": session(ir.to_proto(model))}
        feed = {"x": np.ones((rows, width), np.float32), "c": np.array(True)}
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(ROUNDS):
            for name in random.sample(list(found), 2):
                start = time.perf_counter()
                for _ in range(IN_A_ROW):
                    found[name].run(None, feed)
                times[name].append((time.perf_counter() - start) / IN_A_ROW)
        row = {name: 1e6 * statistics.median(values) for name, values in times.items()}
        print(f"{width * width:9d} {row['Where']:11.1f} {row['If']:11.1f}")
        if width * width >= 4096:
            assert row["If"] <= 1.05 * row["Where"]
