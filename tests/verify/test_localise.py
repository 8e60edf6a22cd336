"""The node that was planted is the node that is named: in a deep graph, in bodies, in what onnxruntime optimises."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from opened import all_nodes

from moe_export.verify.localise.level import Level
from moe_export.verify.localise.optimised import find_optimiser_fault, optimised, wrong_level
from moe_export.verify.localise.reference import GivenValues, GraphValues
from moe_export.verify.localise.search import find_faulty_node

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
RNG = np.random.default_rng(0)
X = {"x": RNG.normal(size=(5, 8)).astype(np.float32)}


def parsed(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + text)
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def changed(model: onnx.ModelProto, change) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    change(copy.graph)
    return copy


def named(graph, output):
    return next(node for node in all_nodes(graph) if output in node.output)


def constant(graph, name, function):
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(function(numpy_helper.to_array(tensor).copy()), name))


BLOCK = """g (float[batch,8] x) => (float[batch,8] y) {
  mean = ReduceMean<axes=[-1], keepdims=1>(x)
  centred = Sub(x, mean)
  square = Mul(centred, centred)
  variance = ReduceMean<axes=[-1], keepdims=1>(square)
  safe = Add(variance, epsilon)
  root = Sqrt(safe)
  norm = Div(centred, root)
  h = MatMul(norm, w)
  b = Add(h, bias)
  gate = Sigmoid(b)
  silu = Mul(b, gate)
  y = Add(silu, x)
}"""
CONSTANTS = {
    "w": RNG.normal(size=(8, 8)).astype(np.float32),
    "bias": RNG.normal(size=8).astype(np.float32),
    "epsilon": np.float32(1e-6),
}


@pytest.fixture(scope="module")
def block():
    return parsed(BLOCK, **CONSTANTS)


def faulty_node(model, good, inputs=X, **options):
    return find_faulty_node(model, inputs, GraphValues(good, inputs), **options).faulty


def test_a_right_graph_has_no_faulty_node(block):
    found = find_faulty_node(block, X, GraphValues(block, X))
    assert found.faulty is None
    assert {error.own for error in found.nodes} == {0.0}
    assert str(found).startswith("no node is faulty by itself")


OPERATORS = {
    "centred": "Add",
    "square": "Add",
    "safe": "Mul",
    "root": "Tanh",
    "norm": "Mul",
    "gate": "Tanh",
    "y": "Sub",
}


@pytest.mark.parametrize("value", OPERATORS)
def test_another_operator_is_named(block, value):
    def change(graph):
        named(graph, value).op_type = OPERATORS[value]

    error = faulty_node(changed(block, change), block)
    assert error.value == value
    assert error.differs[0].startswith(f"it is {OPERATORS[value]}, in the reference ")
    assert error.inherited == 0


def test_a_weight_that_is_off_is_named_with_its_place(block):
    def nudge(w):
        w[2, 5] += 1e-3
        return w

    error = faulty_node(changed(block, lambda graph: constant(graph, "w", nudge)), block)
    assert error.value == "h"
    assert error.differs[0].startswith(
        "its constant w differs from the reference's in 1 of 64 elements, most at [2, 5]"
    )


def test_an_epsilon_is_an_error_of_its_own_size():
    """1e-5 for 1e-6 is below every absolute tolerance, and moves small inputs by a factor."""
    good = parsed(BLOCK, **CONSTANTS)
    small = {"x": 1e-3 * X["x"]}
    bad = changed(good, lambda graph: constant(graph, "epsilon", lambda e: np.float32(1e-5)))
    assert faulty_node(bad, good, small).value == "safe"


def test_what_is_inherited_is_told_from_what_is_its_own(block):
    bad = changed(block, lambda graph: constant(graph, "bias", lambda b: b + np.float32(0.5)))
    found = find_faulty_node(bad, X, GraphValues(block, X))
    errors = {error.value: error for error in found.nodes}
    assert found.faulty.value == "b"
    assert (errors["b"].own, errors["b"].inherited) == (pytest.approx(0.5, rel=1e-5), 0)
    assert errors["gate"].own == 0
    assert errors["gate"].inherited == errors["gate"].whole > 0.01


def test_a_node_that_fails_is_found_by_halving(block):
    def reshaped(graph):
        node = named(graph, "gate")
        node.op_type = "Reshape"
        node.input.append("bias")

    integers = changed(block, lambda graph: constant(graph, "bias", lambda b: b[:3]))
    error = faulty_node(integers, block)
    assert error.value == "b"
    assert error.reason.startswith("it fails: ")
    assert faulty_node(changed(block, reshaped), block).value == "gate"


def test_a_shape_that_broadcasts_is_no_equality(block):
    bad = changed(
        block, lambda graph: named(graph, "mean").attribute[-1].CopyFrom(helper.make_attribute("keepdims", 0))
    )
    square = {"x": X["x"][:, :8][:5].repeat(2, 0)[:8]}  # (8, 8): the mean of rows broadcasts over columns
    error = faulty_node(bad, block, square)
    assert (error.value, error.reason) == ("mean", "shape [8], expected [8, 1]")


def test_a_constant_in_place_of_a_computed_value(block):
    right = GraphValues(block, X).values(["root"])["root"]

    def bake(graph):
        graph.node.remove(named(graph, "root"))
        graph.initializer.append(numpy_helper.from_array(right + np.float32(1), "root"))

    error = faulty_node(changed(block, bake), block)
    assert (error.value, error.op) == ("root", "constant")


def test_nodes_whose_values_nobody_knows_are_judged_with_the_next_that_is_known(block):
    known = GivenValues(GraphValues(block, X).values(["centred", "norm", "b", "y"]))
    bad = changed(block, lambda graph: setattr(named(graph, "root"), "op_type", "Tanh"))
    error = find_faulty_node(bad, X, known).faulty
    assert error.value == "norm"
    assert error.also == ("square", "variance", "safe", "root")
    assert "judged together with square, variance, safe, root" in str(error)


def test_parts_under_a_memory_limit_come_to_the_same(block):
    bad = changed(block, lambda graph: setattr(named(graph, "gate"), "op_type", "Tanh"))
    whole, parts = (find_faulty_node(bad, X, GraphValues(block, X), memory=size) for size in (1 << 30, 400))
    assert whole.nodes == parts.nodes
    assert parts.faulty == whole.faulty


def test_the_choice_within_a_tie_is_no_error_and_another_choice_is():
    good = parsed(
        "g (float[n,8] x) => (float[n,2] v, int64[n,2] i) { v, i = TopK<axis=-1, sorted=0>(x, k) }",
        k=np.array([2]),
    )
    right = GraphValues(good, X).values(["v", "i"])
    swapped = GivenValues({name: value[:, ::-1].copy() for name, value in right.items()})
    assert find_faulty_node(good, X, swapped).faulty is None
    smallest = changed(
        good, lambda graph: graph.node[0].attribute.append(helper.make_attribute("largest", 0))
    )
    assert find_faulty_node(smallest, X, swapped).faulty.op == "TopK"


BODIES = {
    "Scan": """g (float[t,8] x) => (float[8] last, float[t,8] all) {
  start = ConstantOfShape(eight)
  last, all = Scan<num_scan_inputs=1, body = step (float[8] h, float[8] e) => (float[8] next, float[8] out) {
    decayed = Mul(h, decay)
    next = Add(decayed, e)
    bent = Tanh(next)
    out = Mul(bent, e)
  }>(start, x)
}""",
    "Loop": """g (float[t,8] x) => (float[8] last, float[t,8] all) {
  start = ConstantOfShape(eight)
  shape = Shape<start=0, end=1>(x)
  count = Squeeze(shape)
  last, all = Loop<body = step (int64 n, bool going, float[8] h) => (bool on, float[8] next, float[8] out) {
    on = Identity(going)
    e = Gather<axis=0>(x, n)
    decayed = Mul(h, decay)
    next = Add(decayed, e)
    bent = Tanh(next)
    out = Mul(bent, e)
  }>(count, yes, start)
}""",
    "If": """g (float[t,8] x) => (float[t,8] all) {
  sum = ReduceSum<keepdims=0>(x)
  negative = Less(sum, zero)
  all = If<then_branch = low () => (float[t,8] out_a) {
      decayed = Mul(x, decay)
      out_a = Tanh(decayed)
    }, else_branch = high () => (float[t,8] out_b) {
      next = Add(x, decay)
      bent = Tanh(next)
      out_b = Mul(bent, x)
    }>(negative)
}""",
}
OUTSIDE = {
    "decay": RNG.uniform(0.5, 1, 8).astype(np.float32),
    "eight": np.array([8]),
    "yes": np.array(True),
    "zero": np.float32(-1e9),
}


def of_body(kind):
    return parsed(BODIES[kind], **{name: array for name, array in OUTSIDE.items() if name in BODIES[kind]})


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("value", ["next", "bent"])
def test_a_node_in_a_body_is_named(kind, value):
    good = of_body(kind)
    other = {"next": "Sub", "bent": "Sigmoid"}[value]
    error = faulty_node(changed(good, lambda graph: setattr(named(graph, value), "op_type", other)), good)
    assert (error.op, error.value) == (other, value)
    assert error.inside[0].startswith(f"the body of {kind} ")


def test_a_weight_that_a_body_takes_from_outside():
    good = of_body("Scan")
    bad = changed(good, lambda graph: constant(graph, "decay", lambda d: d + np.float32(1e-3)))
    error = faulty_node(bad, good)
    # In the first iteration the state is zero, and the weight shows in none of its nodes.
    assert (error.value, error.inside) == ("decayed", ("the body of Scan last, iteration 1",))
    assert "its constant decay differs" in error.differs[0]


def test_what_is_wrong_about_a_scan_itself():
    good = of_body("Scan")

    def backwards(graph):
        named(graph, "last").attribute.append(helper.make_attribute("scan_input_directions", [1]))

    error = faulty_node(changed(good, backwards), good)
    assert (error.op, error.inside) == ("Scan", ())
    assert error.differs == ("its scan_input_directions is [1], in the reference not set",)


def test_a_loop_in_a_loop():
    good = parsed(
        """g (float[2,8] x) => (float[8] y) {
  start = ConstantOfShape(eight)
  y = Loop<body = outer (int64 n, bool going, float[8] h) => (bool on, float[8] after) {
    on = Identity(going)
    after = Loop<body = inner (int64 m, bool more, float[8] k) => (bool still, float[8] next) {
      still = Identity(more)
      e = Gather<axis=0>(x, n)
      bent = Tanh(e)
      next = Add(k, bent)
    }>(two, yes, h)
  }>(two, yes, start)
}""",
        eight=np.array([8]),
        two=np.array(2),
        yes=np.array(True),
    )
    x = {"x": X["x"][:2]}
    error = faulty_node(
        changed(good, lambda graph: setattr(named(graph, "bent"), "op_type", "Sigmoid")), good, x
    )
    assert error.value == "bent"
    assert error.inside == ("the body of Loop y, iteration 0", "the body of Loop after, iteration 0")


def test_a_sequence_that_a_loop_carries():
    good = parsed(
        """g (float[t,8] x) => (float[s,8] y) {
  first = Slice(x, zeros, ones, zeros)
  start = SequenceConstruct(first)
  rows = Loop<body = iteration (int64 n, bool going, seq(float) s) => (bool on, seq(float) more) {
    on = Identity(going)
    at = Unsqueeze(n, zeros)
    row = Gather<axis=0>(x, at)
    bent = Tanh(row)
    more = SequenceInsert(s, bent)
  }>(three, yes, start)
  y = ConcatFromSequence<axis=0>(rows)
}""",
        zeros=np.array([0]),
        ones=np.array([1]),
        three=np.array(3),
        yes=np.array(True),
    )
    found = faulty_node(
        changed(good, lambda graph: setattr(named(graph, "bent"), "op_type", "Sigmoid")), good
    )
    assert (found.value, found.inside) == ("bent", ("the body of Loop rows, iteration 0",))


def test_a_graph_that_only_the_optimiser_changes():
    """A product of constants that is taken at load time underflows; taken step by step it does not."""
    good = parsed(
        """g (float[1,2,n] x) => (float[1,2,n] y) {
  wide = Conv(x, w)
  scaled = Mul(wide, small)
  bent = Tanh(scaled)
  y = Add(bent, bent)
}""",
        w=np.full((2, 2, 1), 1e-30, np.float32),
        small=np.float32(1e-20),
    )
    large = {"x": np.full((1, 2, 6), 1e38, np.float32)}
    expected = Level.of(good).read(["y"], large)["y"]
    assert expected.max() > 1e-13

    def is_right(outputs):
        return np.allclose(outputs["y"], expected, rtol=1e-5, atol=0)

    level = wrong_level(good, large, is_right)
    assert level == "basic"
    fused = optimised(good, level)
    assert len(fused.graph.node) == 3
    found = find_optimiser_fault(good, large, level)
    assert (found.localisation.faulty.op, found.localisation.faulty.value) == ("Conv", "scaled")
    assert str(found).startswith(
        "the graph is right as it is; onnxruntime makes it wrong at optimisation level 'basic'"
    )


def test_the_level_of_a_graph_that_is_right_or_wrong_by_itself(block):
    assert wrong_level(block, X, lambda outputs: True) is None
    assert wrong_level(block, X, lambda outputs: False) == "none"
