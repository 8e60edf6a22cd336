"""The numbers in a graph near which it may do something else."""

import numpy as np
import onnx

from moe_export.verify.inputs.graph_numbers import graph_numbers

TEXT = """g (float[n] x, int64[n] ids) => (float[n] y, float[n,4] rows, int64[n] rest) {
    low = Constant <value = float {0}> ()
    y = Clip(x, low, high)
    rows = Gather(table, ids)
    rest = Mod(ids, seven)
}"""


def test_limits_come_first_then_tables(graph_bytes, tmp_path):
    constants = {"high": np.float32(255), "table": np.zeros((512, 4), np.float32), "seven": np.int64(7)}
    file = tmp_path / "g.onnx"
    file.write_bytes(graph_bytes(TEXT, **constants))
    assert graph_numbers(file) == (255, 7, 512)


def test_bodies_are_looked_into(tmp_path):
    then = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.int64(48))),
            onnx.helper.make_node("Min", ["n", "c"], ["m"]),
        ],
        "then",
        [],
        [onnx.helper.make_tensor_value_info("m", onnx.TensorProto.INT64, [])],
    )
    node = onnx.helper.make_node("If", ["b"], ["m"], then_branch=then, else_branch=then)
    values = [
        onnx.helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("b", onnx.TensorProto.BOOL), ("n", onnx.TensorProto.INT64))
    ]
    graph = onnx.helper.make_graph(
        [node], "g", values, [onnx.helper.make_tensor_value_info("m", onnx.TensorProto.INT64, [])]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "g.onnx")
    assert graph_numbers(tmp_path / "g.onnx") == (48,)


def test_what_is_no_graph_has_none(tmp_path):
    (tmp_path / "g.onnx").write_text("no graph")
    assert graph_numbers(tmp_path / "g.onnx") == graph_numbers(tmp_path / "none.onnx") == ()
