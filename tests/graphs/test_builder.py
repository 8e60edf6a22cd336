"""`GraphBuilder`: where nodes go, whose they are, what they and their constants are called, and their types."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moe_export.graph_builder import Constants, GraphBuilder, Names

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


@pytest.fixture
def graph() -> ir.Graph:
    """y = Neg(x), whose node says where it comes from."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["n", 4]))
    node = ir.node("Neg", [x], name="neg", metadata_props={"source": "model.py:7"}, doc_string="a sign")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    return ir.Graph([x], [y], nodes=[node], name="g", opset_imports={"": 17})


def test_in_front_of_a_node_it_writes_at_once(graph: ir.Graph) -> None:
    (node,) = graph
    w = GraphBuilder.in_front_of(node, "new")
    node.replace_input_with(0, w.op("Add", graph.inputs[0], w.op("Exp", graph.inputs[0])))
    assert [each.op_type for each in graph] == ["Exp", "Add", "Neg"]
    assert w.nodes == list(graph)[:2]
    onnx.checker.check_model(ir.to_proto(ir.Model(graph, ir_version=8)), full_check=True)


def test_otherwise_nodes_wait(graph: ir.Graph) -> None:
    w = GraphBuilder(graph, "new")
    inner = w.inner("3")
    w.op("Exp", inner.op("Neg", graph.inputs[0]))
    assert len(list(graph)) == 1
    assert [node.name for node in w.nodes] == ["new.exp"]
    w.take(inner)
    assert [node.name for node in w.nodes] == ["new.exp", "new.3.neg"]


def test_nodes_stand_for_their_origin_and_copies_for_themselves(graph: ir.Graph) -> None:
    (node,) = graph
    w = GraphBuilder(graph, "new", node)
    other = ir.node("Abs", [graph.inputs[0]], metadata_props={"source": "model.py:9"})
    w.inner("part").op("Exp", graph.inputs[0])
    w.op("Exp", graph.inputs[0])
    w.copy(other, [graph.inputs[0]])
    first, second = w.nodes
    assert (first.metadata_props, first.doc_string) == ({"source": "model.py:7"}, "a sign")
    assert second.metadata_props == {"source": "model.py:9"}


def test_names_are_counted_where_they_are_taken(graph: ir.Graph) -> None:
    w = GraphBuilder(graph, "new")
    x = graph.inputs[0]
    assert [w.op("Exp", x).name, w.op("Exp", x).name, w.op("Abs", x, name="exp").name] == [
        "new.exp",
        "new.exp_1",
        "new.exp_2",
    ]
    halves = w.many("Split", x, w.ints(2, 2), outputs=2, axis=1)
    assert [half.name for half in halves] == ["new.split_0", "new.split_1"]
    assert w.op("Split", x, w.ints(4), axis=1).name == "new.split_2"
    again = GraphBuilder(graph, "new")  # of a form that was given up
    assert again.ints(2, 2).name == "new.ints_2_2_1"


def test_constants_without_a_name_are_shared_by_content(graph: ir.Graph) -> None:
    w = GraphBuilder(graph, "new")
    assert w.ints(0, -1) is w.inner("3").ints(0, -1)
    assert w.ints(0) is not w.scalar(0)
    assert w.constant(np.array([0, -1])) is w.ints(0, -1)
    mask = np.ones((2, 3), np.float32)
    assert w.constant(mask) is w.constant(mask.copy())
    assert w.constant(mask, "mask") is not w.constant(mask, "mask")
    assert w.constant(ir.tensor(mask)) is w.constant(mask)
    assert list(graph.initializers) == [
        "new.ints_0_m1", "new.ints_0", "new.scalar_0", "new.constant_2x3", "new.mask", "new.mask_1",
    ]  # fmt: skip
    assert graph.initializers["new.mask"].const_value is not None
    assert graph.initializers["new.mask"].dtype == FLOAT


def test_a_function_has_constants_in_nodes(graph: ir.Graph) -> None:
    function = ir.Function("mine", "f", graph=graph, attributes=[])
    constants = Constants(function, Names({"ints_1"}))
    assert constants.ints(1).name == "ints_1_1"
    assert [node.op_type for node in function] == ["Constant", "Neg"]


@pytest.mark.parametrize(
    ("kind", "attributes", "wanted"),
    [
        ("Exp", {}, FLOAT),
        ("Shape", {}, INT64),
        ("NonZero", {}, INT64),
        ("IsNaN", {}, BOOL),
        ("Cast", {"to": INT64}, None),  # the schema does not read attributes
        ("NotAnOperator", {}, None),
    ],
)
def test_types_are_what_the_schema_says(graph, kind, attributes, wanted) -> None:
    assert GraphBuilder(graph, "new", typed=True).op(kind, graph.inputs[0], **attributes).dtype == wanted
    assert GraphBuilder(graph, "new").op(kind, graph.inputs[0], **attributes).type is None


def test_types_follow_the_input_of_the_same_kind(graph: ir.Graph) -> None:
    w, x = GraphBuilder(graph, "new", typed=True), graph.inputs[0]
    hot = w.op("Less", x, x)
    assert hot.dtype == BOOL
    assert w.op("Where", hot, x, x).dtype == FLOAT
    assert w.op("Gather", x, w.ints(0)).dtype == FLOAT
    assert [value.dtype for value in w.many("TopK", x, w.ints(2), outputs=2)] == [FLOAT, INT64]
    assert w.op("Concat", w.op("Shape", x), w.ints(1), axis=0).dtype == INT64
    assert w.op("SequenceConstruct", x).type is None
    assert w.op("Gelu", x, domain="com.microsoft").type is None


@pytest.mark.parametrize("name", [None, "log"])
def test_a_number_that_numpy_made_of_an_array_is_a_constant(graph: ir.Graph, name: str | None) -> None:
    number = np.log(np.array(2, np.float32)).astype(np.float32)
    assert not isinstance(number, np.ndarray)
    value = GraphBuilder(graph, "new").constant(number, name)
    assert value.const_value is not None
    assert (value.const_value.numpy().shape, value.const_value.numpy().dtype) == ((), np.float32)
    assert value.const_value.numpy() == number


def test_a_small_constant_is_reshaped_at_once(graph: ir.Graph) -> None:
    w = GraphBuilder(graph, "new")
    column = w.unsqueezed(w.constant(np.ones(3, np.float32)), [1])
    assert column.const_value is not None
    assert tuple(column.const_value.shape) == (3, 1)
    x = graph.inputs[0]
    assert w.unsqueezed(x, []) is x
    assert w.transposed(x, [0, 1]) is x
    assert not w.nodes
    w.transposed(w.unsqueezed(x, [0]), [2, 1, 0])
    assert [node.op_type for node in w.nodes] == ["Unsqueeze", "Transpose"]
