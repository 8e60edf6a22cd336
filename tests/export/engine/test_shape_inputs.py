"""Inputs whose values decide shapes: TensorRT-RTX really builds them, with a profile of values."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from moe_export.errors import NotExportableError, UsageError
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.profiles import Range
from moe_export.export.engines.shape_inputs import complete_profile, range_names, value_names

RESHAPE = "g (float[n, 6] x, int64[2] s) => (float[a, b] y) { y = Reshape(x, s) }"
RANGE = """g (int64 k) => (int64[a] y) {
    z = Constant<value = int64 {0}>() o = Constant<value = int64 {1}>() y = Range(z, k, o)
}"""
EXPAND = """g (float[1, 6] x, int32[1] k) => (float[a, b] y) {
    s = Cast<to = 7>(k) o = Constant<value = int64[1] {6}>() t = Concat<axis = 0>(s, o) y = Expand(x, t)
}"""
TABLE = """g (float[n, 6] x, int64[1, 2] s) => (float[a, b] y) {
    two = Constant<value = int64[1] {2}>() t = Reshape(s, two) y = Reshape(x, t)
}"""
MANY = """g (float[1, 6] x, int64[17] s) => (float[a, b] y) {
    z = Constant<value = int64[1] {0}>() t = Constant<value = int64[1] {2}>() u = Slice(s, z, t) y = Reshape(x, u)
}"""
SCALES = (
    'g (float[1, 1, 8, 8] x, float[4] s) => (float[a, b, c, d] y) { y = Resize<mode = "nearest">(x, , s) }'
)
DATA = "g (float[n, 6] x, int64[1] s) => (float[n, 6] y) { c = Cast<to = 1>(s) y = Add(x, c) }"


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        (RESHAPE, {"n": (2, 4, 8), "s_0": (2, 4, 8), "s_1": (6, 6, 6)}),
        (RESHAPE, {"n": (2, 4, 8), "s_0": (-1, -1, -1), "s_1": (6, 6, 6)}),
        (TABLE, {"n": (2, 4, 8), "s_0": (2, 4, 8), "s_1": (6, 6, 6)}),
        (RANGE, {"k": (0, 8, 64)}),
        (EXPAND, {"k": (1, 4, 9)}),
    ],
)
def test_an_engine_is_built_for_a_range_of_values(onnx_graph, text, ranges):
    (engine,) = build_engines(onnx_graph(text), ["sm89"], ranges)
    assert engine.size > 1000
    assert engine.profiles == ({name: Range(*found) for name, found in ranges.items()},)


@pytest.mark.parametrize(
    ("text", "ranges", "hint"),
    [
        (RESHAPE, {}, "--range s_0=MIN:OPT:MAX,s_1=MIN:OPT:MAX"),
        (RESHAPE, {"s_1": (6, 6, 6)}, "--range s_0=MIN:OPT:MAX"),
        (RANGE, {}, "--range k=MIN:OPT:MAX"),
    ],
)
def test_values_that_are_missing_are_asked_for(onnx_graph, text, ranges, hint):
    with pytest.raises(UsageError, match="decides shapes in the graph") as error:
        build_engines(onnx_graph(text), ["sm89"], ranges)
    assert error.value.hint == hint


def test_more_values_than_can_be_given_are_refused(onnx_graph):
    with pytest.raises(UsageError, match="input s decides shapes in the graph") as error:
        build_engines(onnx_graph(MANY), ["sm89"])
    assert error.value.hint == "up to 16 integers can be given; make it a constant of the graph"


def test_values_that_decide_nothing_are_refused(onnx_graph):
    assert build_engines(onnx_graph(DATA), ["sm89"])[0].size > 1000
    with pytest.raises(UsageError, match="input s decides no shape in the graph") as error:
        build_engines(onnx_graph(DATA), ["sm89"], {"s": (1, 2, 3)})
    assert error.value.hint == "leave out --range s"


def test_values_at_which_the_graph_cannot_run_name_the_corner(onnx_graph):
    with pytest.raises(NotExportableError) as error:
        build_engines(onnx_graph(RESHAPE), ["sm89"], {"n": (2, 4, 8), "s_0": (2, 4, 8), "s_1": (7, 7, 7)})
    assert "at the best sizes of the profile: " in error.value.where
    assert "would change volume 24 to 28" in error.value.where
    assert error.value.hint == "other sizes: --range DIM=MIN:OPT:MAX"


def test_floats_that_decide_shapes_are_refused_with_the_node(onnx_graph):
    with pytest.raises(NotExportableError) as error:
        build_engines(onnx_graph(SCALES), ["sm89"])
    assert "node Resize y" in error.value.where
    assert "Network input s is a shape tensor and must have type Int32 or Int64" in error.value.where
    assert "cudaError" not in error.value.where


def test_what_a_range_may_name(onnx_graph):
    model = ir.from_proto(
        onnx_graph("g (float[n, 6] x, int64[2] s, int32[1] k, int64[n] t, float[2] f) => (float[n, 6] y) "
                   "{ y = Abs(x) }")
    )  # fmt: skip
    assert value_names(model) == {"s": ("s_0", "s_1"), "k": ("k",)}
    assert range_names(model) == ("n", "s_0", "s_1", "k")
    with pytest.raises(UsageError, match="no dynamic dimension 's'"):
        complete_profile(model, {"s": (1, 2, 3)})
    with pytest.raises(UsageError, match="range n=-1:2:3: a size is not negative"):
        complete_profile(model, {"n": (-1, 2, 3)})
