"""Planted faults: how many of 20 are named, and how long it takes in a graph of 1,000 nodes.

`make bench` prints the figures; the 20 faults in exported models take minutes and are marked slow.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from opened import all_nodes

from moe_export.cli import run
from moe_export.comparing.localising import open_graph
from moe_export.export.frontend.load import load_subject
from moe_export.export.onnx.simplify import as_numpy
from moe_export.verify.localise.reference import GraphValues
from moe_export.verify.localise.search import find_faulty_node

MODELS = Path(__file__).resolve().parents[2] / "models"
OTHER = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "Exp": "Tanh",
    "Sigmoid": "Tanh",
    "Tanh": "Sigmoid",
    "Softmax": "LogSoftmax",
}
SECONDS = 10


def deep(layers: int) -> onnx.ModelProto:
    """A graph of 4 nodes a layer."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        w = (rng.normal(size=(32, 32)) / 6).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{layer}"))
        nodes += [
            helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"], f"matmul_{layer}"),
            helper.make_node("Tanh", [f"m{layer}"], [f"t{layer}"], f"tanh_{layer}"),
            helper.make_node("Softmax", [f"t{layer}"], [f"s{layer}"], f"softmax_{layer}"),
            helper.make_node("Add", [value, f"s{layer}"], [f"a{layer}"], f"add_{layer}"),
        ]
        value = f"a{layer}"
    shape = ["batch", 32]
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def test_the_faulty_node_of_a_thousand(capsys):
    good = deep(250)
    x = {"x": np.random.default_rng(1).normal(size=(16, 32)).astype(np.float32)}
    assert len(good.graph.node) == 1000
    times = []
    for place in (3, 402, 801, 996):  # an addition, a softmax, a tanh, a weight
        bad = copy_of(good)
        node = bad.graph.node[place]
        if node.op_type in OTHER:
            node.op_type = OTHER[node.op_type]
        else:
            tensor = bad.graph.initializer[place // 4]
            array = numpy_helper.to_array(tensor).copy()
            array[3, 4] += 1e-3
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        start = time.perf_counter()
        found = find_faulty_node(bad, x, GraphValues(good, x))
        times.append(time.perf_counter() - start)
        assert found.faulty is not None
        assert found.faulty.node == node.name
    with capsys.disabled():
        print(f"\nthe faulty node of 1,000: {max(times):.2f} s at most, {len(times)} of {len(times)} named")
    assert max(times) < SECONDS


def plantable(model: onnx.ModelProto):
    """Nodes that another operator can stand in for: computing with floats, not with sizes."""
    integers = {
        tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64
    }
    for index, node in enumerate(all_nodes(model.graph)):
        if node.op_type in OTHER and not set(node.input) & integers:
            yield index


def inputs_of(model: onnx.ModelProto, file: Path):
    subject = load_subject(str(file), init=(), inputs=())
    names = {value.name for value in model.graph.input}
    return {name: as_numpy(tensor) for name, tensor in subject.inputs.items() if name in names}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The graphs of models/, and one whose experts are a Loop, with their example inputs."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {}
    for stem in ("mamba", "mamba2", "attention", "gshard_moe", "hybrid", "sparse_moe"):
        assert (
            run([str(MODELS / f"{stem}.py"), "-o", str(folder), "--no-verify", "--quiet", "--no-gate"]) == 0
        )
        made[stem] = folder / f"{stem}.onnx"
    loop = folder / "loop"
    options = ["-o", str(loop), "--no-verify", "--quiet", "--no-gate", "--experts", "loop"]
    assert run([str(MODELS / "sparse_moe.py"), *options]) == 0
    made["sparse_moe as a loop"] = loop / "sparse_moe.onnx"
    return {
        name: (model := open_graph(path, MODELS), inputs_of(model, MODELS / f"{path.stem}.py"))
        for name, path in made.items()
    }


@pytest.mark.slow
def test_planted_faults_in_the_models_are_named(graphs, capsys):
    """Wherever an operator can be exchanged, unless that changes nothing: a product with ones is a quotient."""
    named, planted, bodies, slowest = 0, 0, 0, 0.0
    for name, (good, inputs) in graphs.items():
        reference = GraphValues(good, inputs)
        for index in plantable(good):
            bad = copy_of(good)
            node = list(all_nodes(bad.graph))[index]
            node.op_type = OTHER[node.op_type]
            if node.op_type != "Softmax":
                kept = [item for item in node.attribute if node.op_type == "LogSoftmax"]
                del node.attribute[:]
                node.attribute.extend(kept)
            found = find_faulty_node(bad, inputs, reference)
            if found.faulty is None:
                assert {error.own for error in found.nodes} == {0.0}, (name, node.name)
                continue
            planted += 1
            slowest = max(slowest, found.seconds)
            named += found.faulty.node == node.name
            bodies += bool(found.faulty.inside)
            assert found.faulty.node == node.name, (name, node.name, str(found))
    with capsys.disabled():
        print(
            f"\nplanted faults: {named} of {planted} named, {bodies} of them in bodies; {slowest:.2f} s at most"
        )
    assert planted >= 20
    assert bodies >= 5
