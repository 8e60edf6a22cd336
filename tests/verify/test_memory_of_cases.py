"""Sizes that take more memory than there is: they are left out, and where one is tried, it proves nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moe_export.verify import DimRange, NoMemoryError, TensorSpec, TorchRunner, cases, compare
from moe_export.verify.cost.torch_work import WorkCounter, price_of
from moe_export.verify.inputs.cases import case_maker
from moe_export.verify.inputs.price import MOST_OF_ONE

# From 33 on, zeros of 16 TiB are added up.
GREEDY = """g (float[sequence,4] x) => (float[sequence,4] y) {
    one = Constant<value_ints = [1]>()  shape = Shape<end = 1>(x)
    each = Constant<value_ints = [33]>()  many = Constant<value_ints = [4398046511104]>()
    parts = Div(shape, each)  size = Mul(parts, many)
    zero = Constant<value_floats = [0.0]>()  zeros = Expand(zero, size)
    sum = ReduceSum<keepdims = 0>(zeros)  y = Add(x, sum)
}"""
SPECS = [TensorSpec("x", "float32", ("sequence", 4))]
DIMS = [DimRange("sequence", 10)]
EXAMPLE = {"x": np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)}


def identity(tensors):
    return tensors["x"] + 0


def test_a_run_that_did_not_fit_in_memory_proves_nothing(graph):
    runner = graph(GREEDY)
    with pytest.raises(NoMemoryError, match=r"onnxruntime-cpu ran out of memory: .*, in Expand"):
        runner.run({"x": np.zeros((33, 4), np.float32)})
    sizes = [{"sequence": size} for size in (32, 33, 34)]
    report = compare(TorchRunner(identity, ["y"]), runner, cases(SPECS, DIMS, EXAMPLE, at=sizes))
    without = [dict(case.sizes)["sequence"] for case in report.cases if case.outcome == "no memory"]
    assert report.verdict == "not proven"  # a graph that asks for 16 TiB is no good one either
    assert "ran out of memory where torch did not: sequence=33; sequence=34" in report.shortfall
    assert without == [33, 34]
    assert 32 in {dict(case.sizes)["sequence"] for case in report.compared}
    assert "not compared, sequence=33; sequence=34: NoMemoryError: onnxruntime-cpu ran out" in str(report)


def test_a_wrong_graph_is_wrong_whatever_did_not_fit(graph):
    report = compare(TorchRunner(lambda t: t["x"] + 1e-3, ["y"]), graph(GREEDY), cases(SPECS, DIMS, EXAMPLE))
    assert report.verdict == "not equal"


def test_where_the_example_does_not_fit_nothing_is_proved(graph):
    dims, example = [DimRange("sequence", 40, 33)], {"x": np.ones((40, 4), np.float32)}
    report = compare(TorchRunner(identity, ["y"]), graph(GREEDY), cases(SPECS, dims, example))
    assert report.verdict == "not proven"
    assert not report.compared


def attention(tensors):
    x = tensors["x"]
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_pytorch_keeps_to_itself_are_counted(dtype):
    x = torch.randn(2, 3, 10, 8, dtype=dtype)
    counter = WorkCounter()
    with counter:
        attention({"x": x})
    assert counter.work.largest == 2 * 3 * 10 * 10
    assert counter.work.products >= 2 * 3 * 10 * 10 * (8 + 8)


def test_a_length_whose_scores_do_not_fit_is_not_affordable():
    specs = [TensorSpec("x", "float32", ("batch", 3, "sequence", 8))]
    dims = [DimRange("batch", 2), DimRange("sequence", 10)]
    example = {"x": np.ones((2, 3, 10, 8), np.float32)}
    price = price_of(TorchRunner(attention, ["y"]).run, dims, case_maker(specs, example))
    assert price is not None
    assert price({"batch": 2, "sequence": 1024}) <= MOST_OF_ONE < price({"batch": 2, "sequence": 32768})
