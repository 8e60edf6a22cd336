"""Packed graphs with one thing wrong in what is packed: a comparison with the float graph finds each."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from moe_export.comparing.checking_packed import StandIn
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.scheme import Scheme
from moe_export.verify import DimRange, OnnxRuntimeRunner, TensorSpec, cases, compare
from moe_export.verify.mutants.packed import packed_mutants


def scale(array):
    array.flat[3] *= 1.001


def zero_point(array):
    array.flat[3] = int(array.flat[3]) ^ 1


def code(array):
    array.flat[5] = int(array.flat[5]) ^ 1


def order_of_halves(array):
    """As if the first of two codes stood in the upper half of a byte."""
    if array.dtype == np.uint8:
        array[...] = (array >> 4) | (array << 4)
        return
    flat = array.reshape(-1)
    flat[: flat.size // 2 * 2] = flat[: flat.size // 2 * 2].reshape(-1, 2)[:, ::-1].reshape(-1)


def a_block_further(array):
    array[...] = np.roll(array, 1, -2)


def another_expert(array):
    array[...] = np.roll(array, 1, 0)


MUTANTS = [
    ("slices", ".scale", scale),
    ("slices", ".scale", a_block_further),
    ("slices", ".zero", zero_point),
    ("slices", ".zero", a_block_further),
    ("slices", ".int4", code),
    ("slices", ".int4", order_of_halves),
    ("loop", ".scale", scale),
    ("loop", ".scale", another_expert),
    ("loop", ".zero", zero_point),
    ("loop", ".int4", code),
    ("loop", ".int4", order_of_halves),
    ("loop", ".int4", another_expert),
]


@pytest.fixture(scope="module")
def judged(float_graph, tmp_path_factory):
    """Compare a packed graph, with a change or without, with the float graph that it stands for."""
    made = {}

    def judged(lowering, ending="", change=None):
        if lowering not in made:
            found = quantize(float_graph(lowering), Scheme.of("int4", 16, zero_points=True), "experts")
            made[lowering] = found, StandIn.of(found, tmp_path_factory.mktemp(lowering), "cpu")
        found, stand_in = made[lowering]
        model = found.model.clone()
        if change is not None:
            value = next(value for name, value in model.graph.initializers.items() if name.endswith(ending))
            array = np.array(value.const_value.numpy(), order="C")
            change(array)
            value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)
        runner = OnnxRuntimeRunner(ir.to_proto(model).SerializeToString())
        specs = [TensorSpec("hidden_states", "float32", ("batch", "sequence", 24))]
        example = {"hidden_states": np.random.default_rng(1).standard_normal((2, 20, 24)).astype(np.float32)}
        dims = [DimRange("batch", 2), DimRange("sequence", 20)]
        tried = list(cases(specs, dims, example))[:6]
        return compare(stand_in.runner, runner, tried, truth=stand_in.truth)

    return judged


@pytest.mark.parametrize("lowering", ["slices", "loop"])
def test_what_is_packed_right_is_equal(judged, lowering):
    assert judged(lowering).verdict == "equal"


@pytest.mark.parametrize(("lowering", "ending", "change"), MUTANTS)
def test_what_is_packed_wrong_is_not(judged, lowering, ending, change):
    report = judged(lowering, ending, change)
    assert report.verdict == "not equal"
    assert any(not row.equal for row in report.rows if row.output == "output")


@pytest.mark.parametrize("lowering", ["slices", "loop"])
def test_the_mutants_that_a_mutation_test_tries(float_graph, lowering):
    """Each changes one constant that becomes a weight, and opens."""
    found = quantize(float_graph(lowering), Scheme.of("int4", 16, zero_points=True), "experts")
    proto = ir.to_proto(found.model)
    mutants = list(packed_mutants(proto))
    before = {tensor.name: tensor.SerializeToString() for tensor in proto.graph.initializer}
    # slices: 12 weights, 2 of codes, 2 of scales, 2 of zero points; loop: 3 stacks, one of scales, one of zero points
    assert len(mutants) == {"slices": 12 * 6, "loop": 3 * 2}[lowering]
    for mutant in mutants:
        changed = mutant.of(proto)
        after = {tensor.name: tensor.SerializeToString() for tensor in changed.graph.initializer}
        assert len({name for name in before if before[name] != after[name]}) == 1, mutant
        assert changed.graph.node == proto.graph.node
    OnnxRuntimeRunner(mutants[0].of(proto).SerializeToString())


def test_a_mutant_changes_what_it_says():
    codes = np.arange(6).reshape(2, 3).astype(ml_dtypes.uint4)
    order_of_halves(codes)
    assert codes.tolist() == [[1, 0, 3], [2, 5, 4]]
