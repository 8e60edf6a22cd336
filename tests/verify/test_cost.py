"""FLOPs and bytes are those that a hand counts, at the sizes of the run, in loops and for blocks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from moe_export.export.frontend.load import load_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.models import sparse_moe
from moe_export.verify.cost.graph_cost import Cost, cost_of, flops_of, parts_of


def parsed(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    onnx.checker.check_model(model, full_check=True)
    return model


LAYERS = """g (float[n, 8] x, float[8, 16] w, float[16, 4] v) => (float[n, 4] y) {
        a = MatMul(x, w)
        b = Relu(a)
        r = Identity(b)
        y = MatMul(r, v)
    }"""


def layers() -> onnx.ModelProto:
    """Two layers; `w` and `v` are weights."""
    model = parsed(LAYERS)
    for name, shape in (("w", (8, 16)), ("v", (16, 4))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, dtype=np.float32), name))
    del model.graph.input[1:]
    return model


@pytest.mark.parametrize("rows", [1, 7])
def test_two_layers_as_a_hand_counts_them(rows):
    cost = cost_of(layers(), {"x": np.ones((rows, 8), dtype=np.float32)})
    assert cost.total.flops == 2 * rows * 8 * 16 + rows * 16 + 2 * rows * 16 * 4
    assert cost.total.weight_bytes == 4 * (8 * 16 + 16 * 4)
    # While Relu runs, its input and its output are there; the view costs nothing, and is alive as long as its base.
    assert cost.total.activation_bytes == 4 * 2 * rows * 16
    assert cost.border_bytes == 4 * rows * (8 + 4)
    assert cost.uncounted == ()


SCAN = """g (float[3] s, float[l, 3] x) => (float[3] last, float[l, 3] y) {
        last, y = Scan <num_scan_inputs = 1, body = step
            (float[3] before, float[3] now) => (float[3] after, float[3] out) {
            half = Mul(before, now)
            after = Add(half, now)
            out = Exp(after)
        }> (s, x)
    }"""


@pytest.mark.parametrize("length", [1, 5, 64])
def test_a_loop_costs_what_its_iterations_cost(length):
    inputs = {"s": np.zeros(3, dtype=np.float32), "x": np.ones((length, 3), dtype=np.float32)}
    cost = cost_of(parsed(SCAN), inputs)
    assert cost.total.flops == length * 3 * 3
    assert cost.total.nodes == 4
    assert (
        cost.total.activation_bytes == 4 * (3 + 3 * length) + 4 * 3 * 2
    )  # its results, and two values of an iteration


def test_no_run_costs_nothing():
    inputs = {"x": np.ones((0, 8), dtype=np.float32)}
    cost = cost_of(layers(), inputs)
    assert (cost.total.flops, cost.total.activation_bytes) == (0, 0)
    assert cost.total.weight_bytes > 0


@pytest.mark.parametrize(
    ("node", "inputs", "outputs", "flops"),
    [
        (
            onnx.helper.make_node("Gemm", ["a", "b"], ["y"], transA=1),
            [(5, 3), (5, 4)],
            [(3, 4)],
            2 * 3 * 4 * 5,
        ),
        (onnx.helper.make_node("Gemm", ["a", "b", "c"], ["y"]), [(3, 5), (5, 4), (4,)], [(3, 4)], 132),
        (onnx.helper.make_node("Conv", ["a", "b"], ["y"]), [(2, 6, 9), (8, 3, 4)], [(2, 8, 6)], 2 * 96 * 12),
        (onnx.helper.make_node("ReduceSum", ["a"], ["y"]), [(3, 4)], [(1, 1)], 12),
        (onnx.helper.make_node("Softmax", ["a"], ["y"]), [(3, 4)], [(3, 4)], 60),
        (onnx.helper.make_node("Transpose", ["a"], ["y"]), [(3, 4)], [(4, 3)], 0),
        (
            onnx.helper.make_node(
                "LinearAttention", list("qkvpgb"), ["y"], domain="com.microsoft", update_rule="gated_delta"
            ),
            [(2, 5, 12), (2, 5, 12), (2, 5, 18), (2, 3, 4, 6), (2, 5, 3), (2, 5, 3)],
            [(2, 5, 18)],
            7 * 5 * 2 * 3 * 4 * 6,
        ),
        (onnx.helper.make_node("Unheard", ["a"], ["y"], domain="of"), [(3, 4)], [(4, 3)], None),
    ],
)
def test_operators(node, inputs, outputs, flops):
    assert flops_of(node, inputs, outputs) == flops


def exported(lowering: str) -> onnx.ModelProto:
    subject = load_subject("models/sparse_moe.py")
    (graph,) = export_subject(subject, Options(experts=lowering, gates=False, simplify=False))
    return ir.to_proto(graph.model)


def costs(model: onnx.ModelProto) -> Cost:
    shape = [2, 40, model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return cost_of(model, {model.graph.input[0].name: x}, parts_of(model))


def test_experts_are_a_block_and_cost_what_is_chosen():
    sliced = costs(exported("slices"))
    dense = costs(exported("dense"))
    assert list(sliced.blocks) == ["model (experts)"]
    assert sliced.blocks["model (experts)"].flops == sliced.total.flops
    module = sparse_moe.model
    experts, chosen = len(module.experts), module.top_k
    one = sum(2 * weight.numel() for weight in module.experts[0].parameters() if weight.dim() == 2)
    assert dense.total.flops - sliced.total.flops == pytest.approx(80 * one * (experts - chosen), rel=0.05)
