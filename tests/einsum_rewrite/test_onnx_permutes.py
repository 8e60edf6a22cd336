"""Permutes that ONNX Runtime takes slowly, in graphs that it optimises as far as it can: the same values, none slow."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto

from moe_export.einsum_rewrite.onnx_model import Options, rewrite_onnx
from moe_export.einsum_rewrite.onnx_permutes import APART_FOR, permutes_apart
from moe_export.einsum_rewrite.permutes import is_fast
from moe_export.einsum_rewrite.targets import read_target

CPU = read_target("onnxruntime-cpu")


def model_of(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int | str], rank: int, opset: int = 17
) -> ir.Model:
    """x → y, in float32."""
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [oh.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [oh.make_tensor("zero", TensorProto.INT64, [1], [0]), oh.make_tensor("one", TensorProto.INT64, [1], [1]),
         oh.make_tensor("two", TensorProto.INT64, [1], [2]), oh.make_tensor("last", TensorProto.INT64, [1], [-1])],
    )  # fmt: skip
    return ir.from_proto(oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=10))


def permute(source: str, result: str, order: Sequence[int]) -> onnx.NodeProto:
    return oh.make_node("Transpose", [source], [result], f"to_{result}", perm=order)


def run(model: ir.Model, x: np.ndarray, tmp_path: Path) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """What the model gives for x, and the orders of the permutes that onnxruntime is left with."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    left = ir.from_proto(onnx.load(tmp_path / "optimised.onnx"))
    orders = [
        node.attributes["perm"].as_ints() for node in left.graph.all_nodes() if node.op_type == "Transpose"
    ]
    return found, [tuple(order) for order in orders]


@pytest.mark.parametrize("named", [False, True])
def test_each_slow_permute_alone(tmp_path: Path, named: bool) -> None:
    sizes = (6, 7, 8, 9)
    for order in permutations(range(4)):
        shape = [f"s{axis}" for axis in range(4)] if named else list(sizes)
        model = model_of([permute("x", "y", order)], shape, 4)
        count = permutes_apart(model, CPU)
        assert count == (0 if is_fast(order) else 1)
        for tried in (sizes, (6, 0, 8, 9), (1, 7, 1, 9), (1, 1, 1, 1)) if named else (sizes,):
            x = np.random.default_rng(0).standard_normal(tried, dtype=np.float32)
            found, orders = run(model, x, tmp_path)
            np.testing.assert_array_equal(found, x.transpose(order))
            assert all(map(is_fast, orders)), (order, orders)


BETWEEN = {
    "Relu": [oh.make_node("Relu", ["a"], ["b"])],
    "Mul": [oh.make_node("Mul", ["a", "a"], ["b"])],
    "Concat": [oh.make_node("Concat", ["a", "a"], ["b"], axis=1)],
    "Slice": [oh.make_node("Slice", ["a", "one", "last", "two"], ["b"])],
    "Pad": [oh.make_node("Concat", [*["zero"] * 4, "one", *["zero"] * 3], ["pads"], axis=0),
            oh.make_node("Pad", ["a", "pads"], ["b"])],
    "two": [oh.make_node("Relu", ["a"], ["c"]), oh.make_node("Concat", ["c", "a"], ["b"], axis=0)],
}  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN)
def test_fast_ones_do_not_become_slow(tmp_path: Path, between: str) -> None:
    """All pairs of a random half of the orders, with what may be drawn over between them."""
    drawn = random.Random(3).sample(sorted(permutations(range(4))), 12)
    kept = joined = 0
    for first in drawn:
        for second in drawn:
            nodes = [permute("x", "a", first), *BETWEEN[between], permute("b", "y", second)]
            model = model_of(nodes, (8, 6, 10, 12), 4)
            before = ir.from_proto(ir.to_proto(model))
            count = permutes_apart(model, CPU)
            x = np.random.default_rng(0).standard_normal((8, 6, 10, 12), dtype=np.float32)
            expected, slow = run(before, x, tmp_path)
            found, orders = run(model, x, tmp_path)
            np.testing.assert_array_equal(found, expected)
            assert all(map(is_fast, orders)), (first, second, orders)
            kept += count > 0 and is_fast(first) and is_fast(second)
            joined += not all(map(is_fast, slow))
    assert kept > 5
    assert joined > 5


def test_what_is_gone_together_stays_together() -> None:
    """A permute and its inverse, with something between them."""
    nodes = [permute("x", "a", (1, 2, 0)), oh.make_node("Relu", ["a"], ["b"]), permute("b", "y", (2, 0, 1))]
    model = model_of(nodes, (64, 64, 64), 3)
    assert permutes_apart(model, CPU) == 0
    assert len(list(model.graph)) == 3


@pytest.mark.parametrize(
    ("opset", "engine", "count"),
    [
        (13, "onnxruntime-cpu", 0),
        (14, "onnxruntime-cpu", 1),
        (17, "tensorrt", 0),
        (17, "onnxruntime-cuda", 0),
    ],
)
def test_where_nothing_is_done(opset: int, engine: str, count: int) -> None:
    model = model_of([permute("x", "y", (2, 1, 0))], (64, 64, 64), 3, opset)
    assert permutes_apart(model, read_target(engine)) == count
    assert len(list(model.graph)) == (4 if count else 1)


@pytest.mark.parametrize(
    ("size", "barrier"), [("n", ["Flatten", "Shape", "Reshape"]), (7, ["Flatten", "Reshape"])]
)
def test_what_a_barrier_is_for_stands_in_it_and_nothing_is_split_twice(
    size: int | str, barrier: list[str]
) -> None:
    model = model_of([permute("x", "y", (2, 1, 0))], (64, size, 64), 3)
    assert permutes_apart(model, CPU) == 1
    assert [node.op_type for node in model.graph if APART_FOR in node.metadata_props] == barrier
    assert permutes_apart(model, CPU) == 0


def test_names_that_are_there_stay_what_they_are(tmp_path: Path) -> None:
    nodes = [
        oh.make_node("Relu", ["x"], ["to_y.transpose"], "to_y.flatten"),
        oh.make_node("Abs", ["to_y.transpose"], ["to_y.apart"]),
        permute("to_y.apart", "y", (2, 1, 0)),
    ]
    model = model_of(nodes, (32, 33, 34), 3)
    assert permutes_apart(model, CPU) == 1
    x = np.random.default_rng(0).standard_normal((32, 33, 34), dtype=np.float32)
    found, _ = run(model, x, tmp_path)
    np.testing.assert_array_equal(found, np.maximum(x, 0).transpose(2, 1, 0))


def test_a_constant_is_permuted_once_anyway() -> None:
    model = model_of([permute("w", "a", (2, 1, 0)), oh.make_node("Add", ["x", "a"], ["y"])], (32, 33, 34), 3)
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((34, 33, 32), np.float32), name="w"))
    proto = ir.to_proto(model)
    proto.graph.initializer.append(ir.to_proto(weight.const_value))
    assert permutes_apart(ir.from_proto(proto), CPU) == 0


def branches(source: str, order: Sequence[int]) -> list[onnx.NodeProto]:
    """An If both of whose branches permute a value from around it."""
    inner = oh.make_tensor_value_info("inner", TensorProto.FLOAT, [None] * len(order))
    body = oh.make_graph([permute(source, "inner", order)], "branch", [], [inner])
    return [
        oh.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        oh.make_node("Cast", ["sum"], ["which"], to=TensorProto.BOOL),
        oh.make_node("If", ["which"], ["y"], then_branch=body, else_branch=body),
    ]


def test_nothing_is_drawn_into_a_body() -> None:
    """Across its border, the two would be one slow permute; they stay two, and need no barrier."""
    inside = model_of([permute("x", "a", (0, 2, 1)), *branches("a", (1, 2, 0))], (32, 33, 34), 3)
    beside = model_of([permute("x", "a", (0, 2, 1)), permute("a", "y", (1, 2, 0))], (32, 33, 34), 3)
    assert (permutes_apart(inside, CPU), permutes_apart(beside, CPU)) == (0, 1)


def test_bodies_too(tmp_path: Path) -> None:
    model = model_of(branches("x", (2, 1, 0)), (16, 17, 18), 3)
    assert permutes_apart(model, CPU) == 2
    x = np.random.default_rng(0).standard_normal((16, 17, 18), dtype=np.float32)
    found, _ = run(model, x, tmp_path)
    np.testing.assert_array_equal(found, x.transpose(2, 1, 0))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "tensorrt"])
def test_of_a_file_only_the_permutes_of_einsums_are_split(target: str) -> None:
    nodes = [oh.make_node("Einsum", ["x"], ["t"], equation="abc->cba"), permute("t", "y", (2, 1, 0))]
    new = rewrite_onnx(model_of(nodes, (32, 33, 34), 3), Options(target=target))
    count = sum(node.op_type == "Flatten" for node in new.graph)
    assert count == (target == "onnxruntime-cpu")
