"""The opset asked for is the opset written, by real exports; what 17 cannot say is refused with its line."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from slow_cases import only
from torch import nn

from moe_export.errors import NotExportableError, UsageError
from moe_export.export import Options, export_subject
from moe_export.export.onnx.opset import check_opset, highest_opset, ir_version_for, set_opset


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


X = torch.randn(2, 4, 5)


def operators(graph):
    return {node.op_type for node in graph.model.graph.all_nodes()}


def split(x):
    return x.chunk(2, 1), x.split([1, 3], 1), x.split(3, 1), x.unbind(1)


def reduce(x):
    return (
        x.amax((1, 2)),
        x.amin(-1, keepdim=True),
        x.prod(1),
        x.norm(dim=2),
        x.norm(1, dim=2),
        torch.logsumexp(x, 1),
        x.mean(),
        x.var(1),
        x.sum((0, 2)),
        x.square().sum(1),
    )


def pad(x):
    return (
        F.pad(x, (1, 2)),
        F.pad(x, (1, 1), mode="reflect"),
        F.pad(x, (1, 0, 2, 0), value=3.0),
        F.pad(x, (-1, 0)),
    )


def bits(x):
    return (x > 0) & (x < 1) | ~(x == 0) ^ (x > 3)


def activations(x):
    return F.mish(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.hardswish(x), F.celu(x), F.logsigmoid(x)


def norms(x):
    return F.layer_norm(x, (5,)), F.group_norm(x, 2), F.rms_norm(x, (5,)), F.instance_norm(x)


def scatter(x):
    index = torch.zeros(2, 4, 5, dtype=torch.int64)
    return torch.zeros_like(x).scatter(1, index, x), torch.zeros_like(x).scatter_add(1, index, x)


def resize(x):
    return F.interpolate(x, scale_factor=2, mode="nearest"), F.interpolate(x, size=7, mode="linear")


def older(x):
    """What every opset from 17 on says in a way of its own."""
    return *split(x), *reduce(x), *pad(x), bits(x)


def everything(x):
    return *older(x), *activations(x), *norms(x), *resize(x)


FUNCTIONS = [split, reduce, pad, bits, activations, norms, resize]


# One export has them all; the others say which of them it was.
@pytest.mark.parametrize("function", only([everything], [everything, *FUNCTIONS]))
def test_seventeen_means_seventeen(tools, function):
    graph = tools.graph(Calls(function), X, opset=17)
    assert graph.model.opset_imports[""] == 17
    assert graph.model.ir_version == 8
    tools.equal(graph, torch.randn(2, 4, 5), atol=1e-4)
    tools.equal(graph, torch.randn(3, 4, 5), atol=1e-4)


def test_scatter_without_a_dynamic_size(tools):
    tools.equal(tools.graph(Calls(scatter), X), torch.randn(2, 4, 5))


@pytest.mark.parametrize("opset", only([18, 21], range(18, highest_opset() + 1)))
@pytest.mark.parametrize("function", only([older], [older, split, reduce, pad, bits]))
def test_newer_opsets(tools, opset, function):
    graph = tools.graph(Calls(function), X, opset=opset)
    assert graph.model.opset_imports[""] == opset
    tools.equal(graph, torch.randn(3, 4, 5))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda x: torch.zeros_like(x).scatter_reduce(1, x.argsort(1), x, "amax"),
            "operator ScatterElements reduces by 'max', which came with opset 18",
        ),
        (
            lambda x: x.argmax(-1) & 3,
            "operator BitwiseAnd works on the bits of integers, which came with opset 18",
        ),
        (lambda x: F.pad(x, (1, -1), mode="circular"), "operator Pad wraps around, which opset 17 cannot"),
        (lambda x: F.fold(x, (2, 6), (2, 2)), "operator Col2Im came after opset 17"),
    ],
    ids=["scatter max", "bits", "wrap", "fold"],
)
def test_what_seventeen_cannot_say(tools, function, reason):
    example = torch.randn(2, 4, 5)
    with pytest.raises(NotExportableError) as caught:
        tools.graph(Calls(function), example, opset=17)
    said = str(caught.value)
    assert said.startswith(reason)
    assert f"where: onnx/test_opset.py:{function.__code__.co_firstlineno}" in said
    assert "export with --opset 18 or newer" in said
    assert tools.graph(Calls(function), example, opset=18).model.opset_imports[""] == 18


@pytest.mark.parametrize("opset", [-1, 0, 16, highest_opset() + 1, 1000])
def test_out_of_range(opset):
    with pytest.raises(UsageError) as caught:
        check_opset(opset)
    assert str(caught.value).startswith(
        f"opset {opset} is out of range\n  hint: choose 17 to {highest_opset()},"
    )


def test_the_highest_is_what_onnxruntime_runs():
    assert 18 < highest_opset() <= onnx.defs.onnx_opset_version()


def test_ir_versions():
    assert [ir_version_for(opset) for opset in (17, 18, 19, 21, 1000)] == [8, 8, 9, 10, 10]


def model(body, opset=18, inputs="float[n, 5] x", outputs="float[a, b] y"):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]>\ng ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def lowered(body, **options):
    graph = model(body, **options)
    set_opset(graph, 17)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    return graph


def test_split_of_an_unequal_length():
    graph = lowered("y, z = Split <axis=1, num_outputs=2> (x)")
    assert graph.graph[0].inputs[1].const_value.numpy().tolist() == [3, 2]


def test_split_of_an_unknown_length_is_refused():
    with pytest.raises(NotExportableError, match="Split splits a dimension of unknown size"):
        lowered("y, z = Split <axis=0, num_outputs=2> (x)")


def test_pad_of_some_axes():
    body = """
      pads = Constant<value = int64[2] {1, 2}> ()
      axes = Constant<value = int64[1] {-1}> ()
      y = Pad (x, pads, , axes)
    """
    graph = lowered(body)
    assert graph.graph[-1].inputs[1].const_value.numpy().tolist() == [0, 1, 0, 2]


def test_a_reduction_over_no_axes():
    body = "axes = Constant<value = int64[0] {}> ()\n y = ReduceMax <noop_with_empty_axes=1> (x)"
    assert lowered(body).graph[-1].op_type == "Identity"


def test_axes_that_are_computed_are_refused():
    with pytest.raises(NotExportableError, match="axes or sizes that are computed at run time"):
        lowered("y = ReduceMax (x, axes)", inputs="float[n, 5] x, int64[1] axes")


def test_subgraphs_are_lowered_too():
    body = """
      y = If (c) <
        then_branch = a () => (float[p, q] u) { u = Mish (x) },
        else_branch = b () => (float[p, q] v) { v = Identity (x) }
      >
    """
    graph = lowered(body, inputs="float[n, 5] x, bool c")
    assert "Mish" not in {node.op_type for node in graph.graph.all_nodes()}


def test_a_converter_that_stopped_halfway_is_not_believed():
    with pytest.raises(NotExportableError, match="could not be converted from opset 18 to 20"):
        set_opset(model("y = Relu(x)"), 20)


def test_a_wrong_opset_is_refused_before_anything_runs(tools):
    with pytest.raises(UsageError, match="opset 3 is out of range"):
        export_subject(tools.subject(nn.ReLU(), torch.ones(2)), Options(opset=3))
