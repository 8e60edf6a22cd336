"""Wrappers are taken off; what no graph can be made of is refused early and clearly."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from moe_export.errors import NotExportableError, UsageError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@torch.compile
def doubled(x):
    return x * 2


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.compile(nn.Linear(4, 4))
        self.second = nn.Linear(4, 4)
        self.second.compile()

    def forward(self, x):
        return doubled(self.second(self.first(x)))


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, lambda module: torch.compile(nn.DataParallel(module))]
)
def test_wrappers_are_taken_off(tools, wrap):
    subject = tools.subject(wrap(net()), torch.ones(2, 4))
    assert type(subject.module) is nn.Sequential
    assert list(subject.inputs) == ["input"]  # not the wrapper's *args


def test_compiled_parts_are_traced_as_they_were_written(tools):
    graph = tools.graph(Compiled(), torch.randn(2, 4))
    assert [node.op_type for node in graph.model.graph] == ["Gemm", "Gemm", "Mul"]
    tools.equal(graph, torch.randn(5, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 4))])
def test_torchscript_is_refused(tools, make):
    with pytest.raises(NotExportableError, match="is TorchScript, which has its own graph already") as caught:
        tools.subject(make(net()), torch.ones(2, 4))
    assert "export the module that torch.jit.script or torch.jit.trace was given" in str(caught.value)


def test_weights_on_the_meta_device_are_refused(tools):
    with torch.device("meta"):
        model = net()
    with pytest.raises(UsageError, match=r"weights of Sequential are on the meta device.*\(0\.weight\)"):
        tools.subject(model, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("tensor", "kind", "error"),
    [
        (torch.ones(2, 4, device="meta"), "is on the meta device", UsageError),
        (torch.eye(4).to_sparse(), "is sparse", NotExportableError),
    ],
)
def test_inputs_that_no_graph_can_take(tools, tensor, kind, error):
    with pytest.raises(error, match=f"the example input input {kind}"):
        tools.subject(nn.ReLU(), tensor)


def test_complex_inputs_and_outputs_are_pairs(tools):
    class Turned(nn.Module):
        def forward(self, x, z):
            turned = z * torch.exp(1j * x)
            return turned, z.conj().imag

    x, z = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.complex64)
    graph = tools.graph(Turned(), x, z)
    assert graph.traced.inputs == {"x": ("batch", "x_dim1"), "z": ("batch", "x_dim1", 2)}
    assert [note for note in graph.notes if "complex" in note] == [
        f"{name} is complex, and has pairs of a real and an imaginary part along a last axis in the graph"
        for name in ("input z", "output turned")
    ]
    tools.equal(graph, torch.randn(5, 4), torch.randn(5, 4, 2))


@pytest.mark.filterwarnings("ignore")
def test_packed_quantized_weights_are_refused(tools):
    model = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
    with pytest.raises(NotExportableError, match="0 is a quantized Linear, whose packed weights"):
        tools.subject(model, torch.ones(2, 4))


def test_lazy_modules_take_their_sizes_from_the_example(tools):
    graph = tools.graph(nn.Sequential(nn.LazyLinear(3), nn.ReLU()), torch.randn(2, 7))
    assert graph.traced.inputs == {"input": ("batch", 7)}
    tools.equal(graph, torch.randn(4, 7))


class Box:
    """A class that nobody but its user knows."""

    def __init__(self, x, y):
        self.x, self.y = x, y


class Registered(Box):
    """One that PyTorch was told of, without keys."""


_pytree.register_pytree_node(
    Registered, lambda box: ([box.x, box.y], None), lambda pair, _: Registered(*pair)
)


class Boxes(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, box):
        return self.kind(box.x * 2, [box.x + box.y])


def test_an_object_is_taken_apart(tools):
    graph = tools.graph(Boxes(Box), Box(torch.randn(2, 3), torch.randn(2, 3)))
    assert list(graph.traced.inputs) == ["box.x", "box.y"]
    assert list(graph.traced.outputs) == ["x", "y.0"]
    tools.equal(graph, torch.randn(4, 3), torch.randn(4, 3))


def test_tensors_behind_a_mapping_that_is_no_dict_are_refused(tools):
    box = types.MappingProxyType({"x": torch.ones(2), "y": torch.ones(2)})
    with pytest.raises(
        NotExportableError, match=r"box is a mappingproxy, whose tensor box\.x would be"
    ) as caught:
        tools.subject(Boxes(Box), box)
    assert "make mappingproxy a dataclass, register it" in caught.value.hint


def test_an_object_alone_is_no_output(tools):
    with pytest.raises(NotExportableError, match=r"Boxes\.forward returns no tensor but Box") as caught:
        tools.subject(Boxes(Box), Registered(torch.ones(2), 1))
    assert "torch.utils._pytree.register_pytree_node" in caught.value.hint


def test_a_registered_class_is_taken_apart(tools):
    graph = tools.graph(Boxes(Registered), Registered(torch.randn(2, 3), torch.randn(2, 3)))
    assert list(graph.traced.inputs) == ["box.x", "box.y"]
    assert list(graph.traced.outputs) == ["x", "y.0"]
    tools.equal(graph, torch.randn(4, 3), torch.randn(4, 3))


class Codes(torch.Tensor):
    """Codes and a scale that act as the weight which they stand for, as quantized tensors of packages do."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [each.dequantize() if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))

    def dequantize(self):
        return self.codes.to(self.scale.dtype) * self.scale


def test_quantized_tensors_are_weights_like_any_other(tools):
    module = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 6))
    codes = torch.arange(48).view(6, 8).to(torch.int8)
    module[0].weight = nn.Parameter(Codes(codes, torch.tensor(0.25)), requires_grad=False)
    wanted = module(torch.ones(3, 8)).detach()
    subject = tools.subject(module, torch.randn(3, 8))
    assert subject.notes[0].startswith("1 weight of Codes, as floats: --weights-dtype finds")
    assert (subject.module[0].weight == codes / 4).all()
    assert torch.equal(subject.module(torch.ones(3, 8)), wanted)
