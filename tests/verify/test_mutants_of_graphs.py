"""Mutants: each kind is found where it can be, changes one thing, and float64 knows which change nothing."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moe_export.verify.float64_graph import run_in_float64
from moe_export.verify.localise.level import run_model
from moe_export.verify.mutants.baked import baked_mutants, run_values
from moe_export.verify.mutants.mutant import KINDS, by_kind
from moe_export.verify.mutants.nodes import node_mutants
from moe_export.verify.mutants.weights import weight_mutants

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
RNG = np.random.default_rng(0)
X = {"x": RNG.normal(size=(5, 4)).astype(np.float32)}
GRAPH = """g (float[batch,4] x) => (float[batch,3] weights, int64[batch,3] ids, float[batch,4] y) {
  mean = ReduceMean<axes=[-1], keepdims=1>(x)
  centred = Sub(x, mean)
  square = Mul(centred, centred)
  variance = ReduceMean<axes=[-1], keepdims=1>(square)
  safe = Add(variance, epsilon)
  root = Sqrt(safe)
  norm = Div(centred, root)
  a = MatMul(norm, experts.0.w)
  b = MatMul(norm, experts.1.w)
  gate = Sigmoid(a)
  both = Mul(gate, b)
  biased = Add(both, bias)
  turned = Transpose<perm=[1, 0]>(biased)
  back = Transpose<perm=[1, 0]>(turned)
  part = Slice(back, one, four, one)
  scores = Softmax<axis=-1>(back)
  weights, ids = TopK<axis=-1>(scores, three)
  total = ReduceSum<keepdims=1>(part, one)
  y = Add(back, total)
}"""
CONSTANTS = {
    "experts.0.w": RNG.normal(size=(4, 4)).astype(np.float32),
    "experts.1.w": RNG.normal(size=(4, 4)).astype(np.float32),
    "bias": RNG.normal(size=4).astype(np.float32),
    "epsilon": np.float32(1e-6),
    "one": np.array([1]),
    "three": np.array([3]),
    "four": np.array([4]),
}


def parsed(text, **constants):
    model = onnx.parser.parse_model(HEADER + text)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module")
def model():
    text = GRAPH.replace("experts.0.w", "w0").replace("experts.1.w", "w1")
    made = parsed(
        text, **{{"experts.0.w": "w0", "experts.1.w": "w1"}.get(k, k): v for k, v in CONSTANTS.items()}
    )
    for before, after in (("w0", "experts.0.w"), ("w1", "experts.1.w")):  # the text form takes no dots
        next(t for t in made.graph.initializer if t.name == before).name = after
        for node in made.graph.node:
            node.input[:] = [after if name == before else name for name in node.input]
    return made


@pytest.fixture(scope="module")
def mutants(model):
    ranks = {name: array.ndim for name, array in {**run_values(model, X), **X}.items()}
    return [*weight_mutants(model), *node_mutants(model, ranks), *baked_mutants(model, X)]


def test_every_kind_is_found(mutants):
    counts = Counter(mutant.kind for mutant in mutants)
    assert set(counts) == set(KINDS) - {"packed"}  # its weights are floats
    assert (counts["weight"], counts["swapped"], counts["experts swapped"], counts["transposed"]) == (
        3,
        1,
        1,
        2,
    )
    assert counts["constant"] == len(GRAPH.splitlines()) - 2


def test_a_mutant_differs_from_the_graph_and_leaves_it_alone(model, mutants):
    before = model.SerializeToString()
    for mutant in mutants:
        assert mutant.of(model).SerializeToString() != before, mutant
    assert model.SerializeToString() == before


def test_mutants_open_and_most_of_them_compute_something_else(model, mutants):
    right = run_model(model, X)
    same, closed = [], []
    for mutant in mutants:
        try:
            found = run_model(mutant.of(model), X)
        except Exception:  # onnxruntime has a class of its own for every kind of refusal
            closed.append(str(mutant))
            continue
        if all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(right, found, strict=True)):
            same.append(mutant.kind)
    assert set(same) <= {
        "constant",
        "slice",
        "epsilon",
    }  # right on the example, or cut at an end that is the end
    assert len(closed) <= 2, closed


def test_a_weight_is_off_by_a_thousandth(model, mutants):
    mutant = next(mutant for mutant in mutants if mutant.kind == "weight" and "experts.0.w" in mutant.what)
    arrays = [
        next(numpy_helper.to_array(t) for t in graph.initializer if t.name == "experts.0.w")
        for graph in (model.graph, mutant.of(model).graph)
    ]
    assert np.count_nonzero(arrays[0] != arrays[1]) == 1
    assert np.abs(arrays[0] - arrays[1]).max() == pytest.approx(1e-3, rel=1e-3)


def test_two_experts_are_swapped_with_all_that_is_theirs(mutants):
    swapped = [mutant.what for mutant in mutants if mutant.kind == "experts swapped"]
    assert swapped == ["experts.0 and experts.1"]


def test_a_choice_of_each_kind(mutants):
    few = by_kind(mutants, 2)
    assert max(Counter(mutant.kind for mutant in few).values()) == 2
    assert {mutant.kind for mutant in few} == set(KINDS) - {"packed"}  # its weights are floats
    assert by_kind(mutants, 0) == mutants


def test_stacked_experts_are_swapped():
    w = RNG.normal(size=(3, 4, 4)).astype(np.float32)
    model = parsed("g (float[3,5,4] x) => (float[3,5,4] y) { y = MatMul(x, w) }", w=w)
    mutant = next(mutant for mutant in weight_mutants(model) if mutant.kind == "experts swapped")
    assert np.array_equal(numpy_helper.to_array(mutant.of(model).graph.initializer[0]), w[[1, 0, 2]])


def test_mutants_of_a_body():
    model = parsed(
        """g (float[t,4] x) => (float[4] last) {
  start = ConstantOfShape(four)
  last = Scan<num_scan_inputs=1, body = step (float[4] h, float[4] e) => (float[4] next) {
    scaled = Mul(h, decay)
    next = Add(scaled, e)
  }>(start, x)
}""",
        four=np.array([4]),
        decay=RNG.uniform(0.5, 1, 4).astype(np.float32),
    )
    mutants = [*weight_mutants(model), *node_mutants(model, {})]
    assert {("operator", "next"), ("operator", "scaled"), ("weight", "scaled")} <= {
        (mutant.kind, mutant.node) for mutant in mutants
    }
    right = run_model(model, X)[0]
    for mutant in mutants:
        assert not np.array_equal(run_model(mutant.of(model), X)[0], right), mutant


@pytest.mark.parametrize(
    ("nodes", "reference"),
    [
        ("y = Softplus(x)", lambda x: np.log1p(np.exp(x))),  # onnxruntime has no kernel for it in float64
        ("c = Constant<value_float=0.1>() y = Mul(x, c)", lambda x: np.float64(np.float32(0.1)) * x),
        ("h = Cast<to=1>(x) y = Add(h, h)", lambda x: x + x),
    ],
)
def test_float64_is_float64_throughout(nodes, reference):
    model = parsed(f"g (float[5,4] x) => (float[5,4] y) {{ {nodes} }}")
    (found,) = run_in_float64(model, X)
    assert found.dtype == np.float64
    assert np.abs(found - reference(X["x"].astype(np.float64))).max() < 1e-15


def test_a_scan_over_any_axis_in_any_direction_in_float64():
    """With an operator in its body that onnxruntime lacks in float64, the reference implementation must take it."""
    model = parsed(
        """g (float[5,4] x) => (float[5] last, float[5,4] all) {
  start = ConstantOfShape(five)
  last, all = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_input_directions=[1], scan_output_axes=[1],
      scan_output_directions=[1], body = step (float[5] h, float[5] e) => (float[5] next, float[5] out) {
    soft = Softplus(e)
    next = Add(h, soft)
    out = Mul(next, scale)
  }>(start, x)
}""",
        five=np.array([5]),
        scale=np.float32(2),
    )
    last, rows = run_in_float64(model, X)
    soft = np.log1p(np.exp(X["x"].astype(np.float64)))
    sums = np.cumsum(soft[:, ::-1], 1)[:, ::-1]
    assert np.abs(rows - 2 * sums).max() < 1e-14
    assert np.abs(last - sums[:, 0]).max() < 1e-14


def test_indices_that_cover_a_part_in_float64():
    model = parsed(
        """g (float[5,4] x) => (float[2,3] y) {
  soft = Softplus(x)
  y = GatherElements<axis=0>(soft, at)
}""",
        at=np.array([[4, 0, 1], [2, 2, 3]]),
    )
    (found,) = run_in_float64(model, X)
    soft = np.log1p(np.exp(X["x"].astype(np.float64)))
    assert np.abs(found - np.take_along_axis(soft[:, :3], np.array([[4, 0, 1], [2, 2, 3]]), 0)).max() < 1e-15
