"""A comparison must be able to fail: one wrong thing in a right graph, and the exit code is 1."""

import numpy as np
import pytest
import torch
from slow_cases import one_in

from moe_export.verify import DimRange, RoutingPair, TensorSpec, TorchRunner, cases, compare

# A small block with a gate: norm, square projection (so that a transpose keeps the shapes), softmax, top-k.
GRAPH = """g (float[batch,sequence,4] x, int64[batch,sequence] ids) =>
           (float[batch,sequence,4] y, float[batch,sequence,1] mean, int64[batch,sequence,2] idx,
            float[batch,sequence,2] weight, int64[batch,sequence] next) {
  mean = ReduceMean<axes=[-1], keepdims=1>(x)
  centred = Sub(x, mean)
  h = MatMul(centred, w)
  b = Add(h, bias)
  y = Tanh(b)
  scores = Softmax<axis=-1>(y)
  weight, idx = TopK<axis=-1>(scores, k)
  next = Add(ids, one)
}"""
W = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
BIAS = np.array([0.1, -0.2, 0.3, 0.0], np.float32)
CONSTANTS = {"w": W, "bias": BIAS, "k": np.array([2]), "one": np.array(1)}
OUTPUTS = ["y", "mean", "idx", "weight", "next", "scores"]
PAIR = RoutingPair("idx", "weight", "scores")
SPECS = [
    TensorSpec("x", "float32", ("batch", "sequence", 4)),
    TensorSpec("ids", "int64", ("batch", "sequence")),
]


def block(tensors):
    x = tensors["x"]
    mean = x.mean(-1, keepdim=True)
    y = torch.tanh((x - mean) @ torch.from_numpy(W) + torch.from_numpy(BIAS))
    scores = y.softmax(-1)
    weight, idx = scores.topk(2, dim=-1)
    return y, mean, idx, weight, tensors["ids"] + 1, scores


def run(candidate, seed=0):
    rng = np.random.default_rng(seed)
    example = {"x": rng.normal(size=(2, 4, 4)).astype(np.float32), "ids": rng.integers(0, 50, (2, 4))}
    inputs = cases(SPECS, [DimRange("batch", 2), DimRange("sequence", 4)], example, seed)
    return compare(TorchRunner(block, OUTPUTS), candidate, inputs, routing=[PAIR])


@pytest.mark.parametrize("seed", one_in(5, range(25)))
def test_the_right_graph_passes(graph, seed):
    report = run(graph(GRAPH, **CONSTANTS), seed)
    assert report.exit_code == 0, str(report)


def nudged():
    w = W.copy()
    w[1, 2] += 1e-3
    return w


CHANGED_NODES = {
    "swapped operands": ("Sub(x, mean)", "Sub(mean, x)"),
    "another operator": ("Sub(x, mean)", "Add(x, mean)"),
    "another activation": ("Tanh(b)", "Sigmoid(b)"),
    "another reduction": ("ReduceMean<axes=[-1]", "ReduceMax<axes=[-1]"),
    "softmax over the wrong axis": ("Softmax<axis=-1>", "Softmax<axis=1>"),
    "the mean of everything": ("centred = Sub(x, mean)", "m = ReduceMean(x) centred = Sub(x, m)"),
    "the smallest instead of the largest": ("TopK<axis=-1>", "TopK<axis=-1, largest=0>"),
    "a bias forgotten": ("Add(h, bias)", "Identity(h)"),
    "ids off by one": ("Add(ids, one)", "Identity(ids)"),
    "all NaN": ("y = Tanh(b)", "s = Mul(b, b) n = Neg(s) y = Log(n)"),
    "Inf": ("y = Tanh(b)", "z = Sub(b, b) y = Reciprocal(z)"),
    "zeros": ("y = Tanh(b)", "y = Sub(b, b)"),
}


@pytest.mark.parametrize("mutant", CHANGED_NODES)
def test_a_changed_node_is_caught(graph, mutant):
    right, wrong = CHANGED_NODES[mutant]
    assert GRAPH.count(right) == 1
    report = run(graph(GRAPH.replace(right, wrong), **CONSTANTS))
    assert (report.verdict, report.exit_code) == ("not equal", 1)


def test_a_graph_of_nan_is_called_so(graph):
    report = run(graph(GRAPH.replace(*CHANGED_NODES["all NaN"]), **CONSTANTS))
    assert report.rows[0].reason == "all of 32 elements are NaN, the reference's are not"


@pytest.mark.parametrize(
    "constants",
    [
        {"w": nudged()},
        {"w": W.T.copy()},
        {"w": W[:, [1, 0, 2, 3]].copy()},
        {"bias": BIAS + np.float32(1e-3)},
        {"bias": BIAS[:1].copy()},
        {"bias": np.full(4, np.nan, np.float32)},
        {"one": np.array(2)},
    ],
    ids=["nudged", "transposed", "columns swapped", "bias nudged", "bias broadcast", "NaN", "integer"],
)
def test_a_changed_constant_is_caught(graph, constants):
    assert run(graph(GRAPH, **CONSTANTS | constants)).exit_code == 1


@pytest.mark.parametrize(
    ("declared", "nodes", "reason"),
    [
        (
            "int32[batch,sequence] next",
            "n = Add(ids, one) next = Cast<to=6>(n)",
            "dtype int32, expected int64",
        ),
        (
            "float[batch,sequence] next",
            "n = Add(ids, one) next = Cast<to=1>(n)",
            "dtype float32, expected int64",
        ),
        (
            "int64[sequence,batch] next",
            "n = Add(ids, one) next = Transpose(n)",
            "shape [4, 2], expected [2, 4]",
        ),
        ("int64[batch,sequence] other", "other = Add(ids, one)", "missing, expected int64[2, 4]"),
        (
            "int64[batch,sequence] next, int64[batch,sequence] more",
            "next = Add(ids, one) more = Neg(ids)",
            "extra output int64[2, 4]",
        ),
        (
            "int64[1,batch,sequence] next",
            "ax = Constant<value_ints=[0]>() n = Add(ids, one) next = Unsqueeze(n, ax)",
            "shape [1, 2, 4], expected [2, 4]",
        ),
    ],
)
def test_outputs_of_another_form_are_caught(graph, declared, nodes, reason):
    text = f"g (float[batch,sequence,4] x, int64[batch,sequence] ids) => ({declared}) {{ {nodes} }}"
    candidate = graph(text, one=np.array(1))
    rng = np.random.default_rng(0)
    example = {"x": rng.normal(size=(2, 4, 4)).astype(np.float32), "ids": rng.integers(0, 50, (2, 4))}
    inputs = cases(SPECS, [DimRange("batch", 2), DimRange("sequence", 4)], example)
    report = compare(TorchRunner(lambda t: t["ids"] + 1, ["next"]), candidate, inputs)
    assert report.exit_code == 1
    assert reason in {judgement.reason for judgement in report.cases[0].judgements}


def test_a_column_for_a_row_is_caught_although_they_broadcast(graph):
    spec = [TensorSpec("x", "float32", (3, 1))]
    x = {"x": np.ones((3, 1), np.float32)}
    candidate = graph("g (float[3,1] x) => (float[1,3] y) { y = Transpose(x) }")
    report = compare(TorchRunner(lambda t: t["x"], ["y"]), candidate, cases(spec, [], x))
    assert report.rows[0].reason == "shape [1, 3], expected [3, 1]"
    assert report.exit_code == 1


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        ("b = Slice(x, start, end, axis)", {"start": [0], "end": [10], "axis": [1]}),
        ("b = Slice(x, start, end, axis)", {"start": [0], "end": [2], "axis": [0]}),
        ("b = Slice(x, start, end, axis)", {"start": [-10], "end": [99], "axis": [1]}),
        ("f = Reshape(x, to) b = Reshape(f, back)", {"to": [-1, 4], "back": [2, -1, 4]}),
    ],
    ids=["length", "batch", "last ten", "batch in a reshape"],
)
def test_what_is_right_only_at_the_traced_size_is_caught(graph, node, constants):
    spec = [TensorSpec("x", "float32", ("batch", "sequence", 4))]
    x = {"x": np.random.default_rng(0).normal(size=(2, 10, 4)).astype(np.float32)}
    candidate = graph(
        f"g (float[batch,sequence,4] x) => (float[b2,s2,4] y) {{ {node} y = Tanh(b) }}",
        **{name: np.array(value) for name, value in constants.items()},
    )
    reference = TorchRunner(lambda t: t["x"].tanh(), ["y"])
    report = compare(reference, candidate, cases(spec, [DimRange("batch", 2), DimRange("sequence", 10)], x))
    assert [j.ok for case in report.cases[:2] for j in case.judgements] == [True, True]
    assert report.exit_code == 1


def test_a_routing_that_was_baked_in_is_caught_by_new_values_alone(graph):
    """With nothing dynamic the example is not enough: a graph can hold its answer."""
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    answer = torch.from_numpy(x).topk(2).indices.numpy()
    candidate = graph("g (float[3,4] x) => (int64[3,2] idx) { idx = Identity(answer) }", answer=answer)
    reference = TorchRunner(lambda t: t["x"].topk(2).indices, ["idx"])
    report = compare(reference, candidate, cases([TensorSpec("x", "float32", (3, 4))], [], {"x": x}))
    assert [case.judgements[0].ok for case in report.cases][:2] == [True, False]
    assert report.exit_code == 1
