"""Ranges of dimensions become shapes of inputs."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from moe_export.errors import UsageError
from moe_export.export.engines.profiles import (
    Range,
    complete_ranges,
    dim_facts,
    free_dims,
    input_shapes,
    parse_range,
    shapes_at,
)


@pytest.fixture
def model(onnx_graph):
    """A graph with inputs of these shapes, as text: `batch, sequence, 4`."""

    def model(*shapes, facts=None):
        inputs = ", ".join(f"float[{shape}] x{index}" for index, shape in enumerate(shapes))
        found = ir.from_proto(onnx_graph(f"g ({inputs}) => (float y) {{ y = ReduceSum<keepdims=0>(x0) }}"))
        found.metadata_props.update({f"moe_export.{key}": value for key, value in (facts or {}).items()})
        return found

    return model


def test_a_range_is_read():
    assert parse_range("sequence=1:512:4096") == ("sequence", Range(1, 512, 4096))
    assert parse_range(" sequence = 64") == ("sequence", Range(64, 64, 64))


@pytest.mark.parametrize(
    "text",
    [
        "sequence",
        "sequence=",
        "sequence=1:2",
        "sequence=a:b:c",
        "sequence=1:2:3:4",
        "sequence=--1:2:3",
        "=1:x:2",
    ],
)
def test_what_is_no_range_says_what_one_looks_like(text):
    with pytest.raises(UsageError, match="is not NAME=MIN:OPT:MAX") as error:
        parse_range(text)
    assert "--range sequence=1:512:4096" in error.value.hint


@pytest.mark.parametrize("text", ["sequence=8:4:16", "sequence=1:32:16", "sequence=16:16:1"])
def test_sizes_out_of_order_are_refused(text):
    with pytest.raises(UsageError, match="the sizes are not in order"):
        parse_range(text)


def test_dimensions_are_found_once_with_their_places(model):
    dims = free_dims(model("batch, sequence, 4", "batch, sequence"))
    assert [(dim.name, dim.used) for dim in dims] == [
        ("batch", ("x0:0", "x1:0")),
        ("sequence", ("x0:1", "x1:1")),
    ]


def test_a_dimension_without_a_name_is_called_after_its_input(model):
    assert [dim.name for dim in free_dims(model("?, 4"))] == ["x0_dim0"]


def test_the_defaults_are_small_for_a_batch(model):
    dims = free_dims(model("batch, sequence"))
    assert complete_ranges(dims, {}) == {"batch": Range(1, 1, 8), "sequence": Range(1, 128, 1024)}
    assert complete_ranges(dims, {"sequence": (2, 3, 4)})["sequence"] == Range(2, 3, 4)


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("16:", Range(16, 128, 1024)),
        ("2000:", Range(2000, 2000, 2000)),
        ("1:64", Range(1, 64, 64)),
        ("5:5", Range(5, 5, 5)),
        ("nonsense", Range(1, 128, 1024)),
    ],
)
def test_the_defaults_stay_where_the_graph_is_right(model, fact, expected):
    assert complete_ranges(free_dims(model("sequence, 4", facts={"dim.sequence": fact})), {}) == {
        "sequence": expected
    }


@pytest.mark.parametrize(("asked", "said"), [((1, 16, 64), "16 to 64"), ((16, 16, 65), "16 to 64")])
def test_a_range_beyond_what_the_graph_is_right_for_is_refused(model, asked, said):
    dims = free_dims(model("sequence, 4", facts={"dim.sequence": "16:64"}))
    with pytest.raises(UsageError, match=f"the graph is right for sequence = {said}"):
        complete_ranges(dims, {"sequence": asked})


def test_a_size_of_0_is_taken_where_the_graph_does_not_say_otherwise(model):
    """A cache may be empty; the default is not."""
    dims = free_dims(model("past, 4"))
    assert complete_ranges(dims, {"past": (0, 4, 16)}) == {"past": Range(0, 4, 16)}
    assert complete_ranges(dims, {})["past"].minimum == 1
    with pytest.raises(UsageError, match="the graph is right for past = 1 or more"):
        complete_ranges(free_dims(model("past, 4", facts={"dim.past": "1:"})), {"past": (0, 4, 16)})


def test_an_unknown_dimension_lists_those_that_there_are(model):
    with pytest.raises(UsageError, match="no dynamic dimension 'length'") as error:
        complete_ranges(free_dims(model("batch, sequence", "batch, 4")), {"length": (1, 2, 3)})
    assert "batch (x0:0, x1:0), sequence (x0:1)" in error.value.hint
    with pytest.raises(UsageError) as error:
        complete_ranges(free_dims(model("2, 3")), {"sequence": (1, 2, 3)})
    assert "every size of the graph's inputs is fixed" in error.value.hint


def test_metadata_is_written_as_it_is_read(model):
    from moe_export.export.tracing.dims import Dim

    facts = dim_facts([Dim("sequence", "s0", 24, 16, None), Dim("batch", "s1", 2, 1, 64)])
    dims = {dim.name: dim for dim in free_dims(model("batch, sequence", facts=facts))}
    assert (dims["sequence"].minimum, dims["sequence"].maximum) == (16, None)
    assert (dims["batch"].minimum, dims["batch"].maximum) == (1, 64)


def test_every_input_gets_a_shape_at_each_corner(model):
    shapes = input_shapes(model("batch, sequence, 4", "batch"))
    found = shapes_at(shapes, {"batch": Range(1, 2, 8), "sequence": Range(1, 128, 1024)})
    assert found == {"x0": ((1, 1, 4), (2, 128, 4), (8, 1024, 4)), "x1": ((1,), (2,), (8,))}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("2*sequence + 1", (3, 21, 41)),
        ("sequence//2", (0, 5, 10)),
        ("max(4, sequence)", (4, 10, 20)),
        ("sequence*sequence - 1", (0, 99, 399)),
    ],
)
def test_sizes_that_follow_from_others_are_computed(size, expected):
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 17}), ir_version=8)
    for name, shape in (("x", ["sequence"]), ("y", [size])):
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.inputs.append(value)
    assert [dim.name for dim in free_dims(model)] == ["sequence"]
    found = shapes_at(input_shapes(model), {"sequence": Range(1, 10, 20)})
    assert found["y"] == tuple((value,) for value in expected)


def test_what_only_looks_like_arithmetic_is_a_name():
    value = ir.Value(name="x", shape=ir.Shape(["batch-size", "unk 1"]), type=ir.TensorType(ir.DataType.FLOAT))
    model = ir.Model(ir.Graph([value], [], nodes=[], opset_imports={"": 17}), ir_version=8)
    dims = free_dims(model)
    assert [dim.name for dim in dims] == ["batch-size", "unk 1"]
    ranges = complete_ranges(dims, {"batch-size": (1, 2, 3), "unk 1": (4, 5, 6)})
    assert shapes_at(input_shapes(model), ranges) == {"x": ((1, 4), (2, 5), (3, 6))}


def test_weights_that_older_files_list_as_inputs_are_none(model):
    found = model("batch, 4", "4, 4")
    weight = found.graph.inputs[1]
    weight.const_value = ir.tensor([[0.0] * 4] * 4, name="x1")
    found.graph.initializers["x1"] = weight
    assert list(input_shapes(found)) == ["x0"]
