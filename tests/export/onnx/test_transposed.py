"""Products of what was transposed, on which ONNX Runtime dies or is wrong: none of them is left in a graph."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.transposed import MENDED, mend_products, product_notes

SIZES = (5, 3, 4, 2)


def graph_of(order, left=True, others=False, dtype=7):
    """A transposed mask, cast, times a matrix."""
    mask = SIZES[: len(order)]
    rows, columns = (mask[axis] for axis in order[-2:])
    matrix = (columns, 6) if left else (6, rows)
    nodes = [
        onnx.helper.make_node("Transpose", ["mask"], ["turned"], perm=order),
        onnx.helper.make_node("Cast", ["turned"], ["cast"], to=1),
        onnx.helper.make_node("MatMul", ["cast", "x"] if left else ["x", "cast"], ["y"]),
    ]
    inputs = [onnx.helper.make_tensor_value_info("mask", dtype, mask)]
    inputs.append(onnx.helper.make_tensor_value_info("x", 1, matrix))
    turned = [mask[axis] for axis in order]
    shape = [*turned[:-1], 6] if left else [*turned[:-2], 6, turned[-1]]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, shape)]
    if others:  # the transpose and the cast are read by others, too
        outputs += [onnx.helper.make_tensor_value_info("turned", dtype, turned)]
        outputs += [onnx.helper.make_tensor_value_info("cast", 1, turned)]
    made = onnx.helper.make_graph(nodes, "masked", inputs, outputs)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def changed(proto):
    model = ir.from_proto(proto)
    mend_products(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    return after, len(product_notes(model))


def values_for(proto):
    numbers = np.random.default_rng(0)
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in proto.graph.input]
    return {"mask": numbers.integers(0, 2, shapes[0]), "x": numbers.normal(size=shapes[1]).astype("f4")}


def run(proto, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("order", [list(order) for rank in (2, 3, 4) for order in permutations(range(rank))])
def test_every_order_on_either_side_computes_what_it_says(order, left, others):
    before = graph_of(order, left, others)
    after, count = changed(before)
    assert count == (order[0] != 0 and len(order) > 2)
    operators = [node.op_type for node in after.graph.node]
    if count and not others:
        assert operators == ["Cast", "Transpose", "MatMul"]
    inputs = values_for(before)
    turned = inputs["mask"].transpose(order)
    product = turned.astype("f4") @ inputs["x"] if left else inputs["x"] @ turned.astype("f4")
    for found, right in zip(run(after, inputs), [product, turned, turned.astype("f4")], strict=False):
        assert np.allclose(found, right, rtol=1e-5, atol=1e-5)


def test_it_still_crashes_without():
    """When this fails, onnxruntime has mended it, and the cast may stay where it is."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("cases", {__file__!r})
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
graph = cases.graph_of([1, 2, 0])
cases.run(graph, cases.values_for(graph))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode < 0, done.stderr


def test_other_readers_of_a_cast_are_left_alone():
    """Without a product there is nothing to draw into it."""
    proto = graph_of([1, 2, 0])
    proto.graph.node[2].CopyFrom(onnx.helper.make_node("Exp", ["cast"], ["y"]))
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value = SIZES[0]
    _, count = changed(proto)
    assert count == 0


class Masked(nn.Module):
    """Each expert's tokens, summed: a mask with experts first, as `one_hot(...).permute(2, 0, 1)` makes it."""

    def forward(self, mask, x):
        return mask.permute(1, 2, 0).type_as(x) @ x


def test_a_model_that_does_it(tmp_path):
    given = (torch.randint(0, 2, (5, 3, 4)), torch.randn(5, 6))
    subject = make_subject(Masked(), given, {}, source=tmp_path / "net.py", how="here")
    (graph,) = export_subject(subject, Options())
    assert any("the cast comes first (1 x)" in note for note in graph.notes)
    assert any(MENDED in node.metadata_props for node in graph.model.graph)
    found = run(ir.to_proto(graph.model), {"mask": given[0].numpy(), "x": given[1].numpy()})
    assert np.allclose(found[0], Masked()(*given).numpy(), rtol=1e-5, atol=1e-5)


def times_a_vector(order, left=True, cast=False):
    """A transposed matrix, or a stack of them, perhaps cast, times a vector."""
    sizes = SIZES[: len(order)]
    turned = [sizes[axis] for axis in order]
    length, shape = (turned[-1], turned[:-1]) if left else (turned[-2], [*turned[:-2], turned[-1]])
    nodes = [onnx.helper.make_node("Transpose", ["mask"], ["t"], perm=order)]
    nodes += [onnx.helper.make_node("Cast", ["t"], ["c"], to=1)] * cast
    name = "c" if cast else "t"
    nodes.append(onnx.helper.make_node("MatMul", [name, "x"] if left else ["x", name], ["y"]))
    inputs = [onnx.helper.make_tensor_value_info("mask", 7 if cast else 1, sizes)]
    inputs.append(onnx.helper.make_tensor_value_info("x", 1, [length]))
    outputs = [onnx.helper.make_tensor_value_info("y", 1, shape)]
    made = onnx.helper.make_graph(nodes, "vector", inputs, outputs)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("order", [list(order) for rank in (2, 3, 4) for order in permutations(range(rank))])
def test_every_order_times_a_vector(order, left, cast):
    before = times_a_vector(order, left, cast)
    after, _ = changed(before)
    inputs = values_for(before)
    inputs["mask"] = inputs["mask"] if cast else inputs["mask"].astype("f4")
    turned = inputs["mask"].transpose(order).astype("f4")
    right = turned @ inputs["x"] if left else inputs["x"] @ turned
    assert np.allclose(run(after, inputs)[0], right, rtol=1e-5, atol=1e-5)
    if left and order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
        assert [node.op_type for node in after.graph.node] == ["Cast"] * cast + ["MatMul"]


def test_it_is_still_wrong_without():
    """When this fails, onnxruntime has mended it, and a vector may stay on the right."""
    graph = times_a_vector([1, 0])
    inputs = values_for(graph)
    inputs["mask"] = np.random.default_rng(0).normal(size=SIZES[:2]).astype("f4")
    assert not np.allclose(run(graph, inputs)[0], inputs["mask"].T @ inputs["x"], rtol=0.1, atol=0.1)


def test_a_model_that_weighs_its_steps(tmp_path):
    class Pooled(nn.Module):
        def forward(self, x, weights):
            return x.transpose(1, 2) @ weights

    given = (torch.randn(2, 5, 3), torch.randn(5))
    subject = make_subject(Pooled(), given, {}, source=tmp_path / "net.py", how="here")
    (graph,) = export_subject(subject, Options())
    assert [node.op_type for node in graph.model.graph] == ["MatMul"]
    assert any("they change places (1 x)" in note for note in graph.notes)
    found = run(ir.to_proto(graph.model), {"x": given[0].numpy(), "weights": given[1].numpy()})
    assert np.allclose(found[0], Pooled()(*given).numpy(), rtol=1e-5, atol=1e-5)
