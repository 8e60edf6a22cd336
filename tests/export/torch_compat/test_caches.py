"""What is computed once instead of at every export is what PyTorch would compute."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch._ops
from canaries import canary
from slow_cases import slow
from torch._export import utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.overrides import TorchFunctionMode

from moe_export.export.torch_compat.caches import cache_patches, decomposed_if_needed
from moe_export.export.tracing.trace import quiet
from moe_export.models import mamba, sparse_moe


def table(registry):
    """Everything that a registry says, comparable: which function, with which signature, for what."""
    return {
        str(target): [
            (one.onnx_function, str(one.signature), one.is_complex, one.is_custom, one.opset_introduced)
            for one in functions
        ]
        for target, functions in registry.functions.items()
    }


@pytest.mark.parametrize("opset", [18, 21])
def test_the_table_of_functions_is_pytorchs_own(opset):
    theirs = ONNXRegistry.from_torchlib(opset)
    with cache_patches():
        ours, again = (ONNXRegistry().from_torchlib(opset_version=opset) for _ in range(2))
    assert len(table(theirs)) > 400
    assert table(ours) == table(again) == table(theirs)
    assert list(ours.functions) == list(theirs.functions)
    assert ours.opset_version == theirs.opset_version == opset


def test_a_function_that_one_export_adds_is_not_in_the_next():
    def silu(x):
        return x

    target = torch.ops.aten.silu.default
    with cache_patches():
        one = ONNXRegistry.from_torchlib(18)
        one.register_op(target, silu)
        other = ONNXRegistry.from_torchlib(18)
    assert one.get_decomps(target)[0].onnx_function is silu
    assert silu not in [function.onnx_function for function in other.get_decomps(target)]


def test_the_second_table_is_not_made_again(monkeypatch):
    with cache_patches():
        ONNXRegistry.from_torchlib(18)
    parsed = []
    original = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: parsed.append(args) or original(*args))
    with cache_patches():
        ONNXRegistry.from_torchlib(18)
    assert not parsed
    ONNXRegistry.from_torchlib(18)
    assert len(parsed) > 400


def test_an_operator_of_a_new_library_is_found():
    with cache_patches():
        before = utils._collect_all_valid_cia_ops()
    library = torch.library.Library("moe_export_new", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
    with cache_patches():
        after = utils._collect_all_valid_cia_ops()
    assert after == utils._collect_all_valid_cia_ops()
    assert {str(op) for op in after - before} == {"moe_export_new.twice.default"}


def test_everything_is_as_before_when_it_ends():
    def patched():
        return (
            ONNXRegistry.__dict__["from_torchlib"],
            utils._materialize_cpp_cia_ops,
            torch._ops.Callable,
        )

    before = patched()
    with cache_patches():
        inside = patched()
        assert all(one is not other for one, other in zip(before, inside, strict=True))
        with cache_patches():  # one in another
            ONNXRegistry.from_torchlib(18)
        assert patched() == inside
    assert patched() == before
    with pytest.raises(ZeroDivisionError), cache_patches():
        raise ZeroDivisionError
    assert patched() == before


@pytest.mark.parametrize("example", [slow(mamba), sparse_moe], ids=["mamba", "sparse_moe"])
@pytest.mark.slow
def test_a_graph_is_the_same_byte_by_byte(example):
    def exported():
        with quiet(), torch.no_grad():
            program = torch.export.export(
                example.model, example.example_inputs, strict=False
            ).run_decompositions({})
            written = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
        return str(program.graph), written.model_proto.SerializeToString(deterministic=True)

    theirs = exported()
    with cache_patches():
        assert exported() == theirs
        assert exported() == theirs


def exported(forward, *args):
    """A program as the stages hand it over: decomposed, its composite operators kept."""

    class Model(torch.nn.Module):
        def forward(self, *given):
            return forward(*given)

    with quiet(), torch.no_grad():
        return torch.export.export(Model(), args, strict=False).run_decompositions({})


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def test_a_program_with_nothing_to_decompose_is_not_traced_again():
    program = decomposed_if_needed(exported(lambda x: x.exp() + 1, X))
    with quiet():
        assert program.run_decompositions(torch.export.default_decompositions()) is program
        assert program.run_decompositions() is not program  # any operator might stand for others


def unseen(program):
    """As a rule of ours leaves it that writes a number without an example value."""
    with program.graph.inserting_before(next(node for node in program.graph.nodes if node.op == "output")):
        program.graph.call_function(torch.ops.aten.sym_size.int, (next(iter(program.graph.nodes)), 0))
    return program


@pytest.mark.parametrize(
    "program",
    [
        lambda: exported(lambda x: torch.nn.functional.one_hot(x, 9), torch.tensor([2, 0])),
        lambda: exported(lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), X),
        lambda: unseen(exported(lambda x: x + 1, X)),
    ],
    ids=["an operator", "a graph inside", "a value without a type"],
)
def test_one_that_may_have_something_is(program):
    theirs = program()
    ours = decomposed_if_needed(program())
    with quiet():
        found, wanted = (
            each.run_decompositions(torch.export.default_decompositions()) for each in (ours, theirs)
        )
    assert found is not ours
    assert str(found.graph) == str(wanted.graph)


@pytest.mark.parametrize("example", [slow(mamba), sparse_moe], ids=["mamba", "sparse_moe"])
@pytest.mark.slow
def test_the_operators_of_a_graph_are_the_same_either_way(example):
    def operators(through):
        with quiet(), torch.no_grad(), cache_patches():
            program = torch.export.export(example.model, example.example_inputs, strict=False)
            written = torch.onnx.export(
                through(program.run_decompositions({})), dynamo=True, opset_version=18, verbose=False
            )
        return Counter(node.op_type for node in written.model_proto.graph.node)

    theirs = operators(lambda program: program)
    assert sum(theirs.values()) > 20
    assert operators(decomposed_if_needed) == theirs


class Mixed(torch.nn.Module):
    """Numbers of other types than what they meet, an operator computed in a wider type, a size in a product."""

    def forward(self, x, half, whole):
        several = torch.stack([x, whole.float()]).unbind(0)
        return (
            x + whole,
            half * 2.5 + whole,
            whole.pow(2) / 3,
            torch.where(whole > 1, whole, 0.5),
            (whole > 0) + whole,
            half.softmax(-1) + x,
            whole * x.shape[0] + 0.5,
            several[1] * whole,
        )


class Plain(torch.nn.Module):
    def forward(self, x, half, whole):
        return (x.exp() + x).sum(-1), half * half, whole[:1] + whole


def written(model):
    """The exporter's graph, and how many nodes ran while types were made equal."""
    ran = []
    original = torch.fx.Interpreter.run_node
    given = X, X.half(), torch.arange(6).reshape(2, 3)
    program = torch.export.export(
        model, given, dynamic_shapes=[{0: torch.export.Dim("rows")}] * 3, strict=False
    ).run_decompositions({})
    with mock.patch.object(
        torch.fx.Interpreter, "run_node", lambda self, node: ran.append(node.op) or original(self, node)
    ):
        made = torch.onnx.export(
            decomposed_if_needed(program), dynamo=True, opset_version=18, verbose=False, optimize=False
        )
    return made.model_proto.SerializeToString(deterministic=True), ran.count("call_function")


@pytest.mark.parametrize("model", [Mixed(), Plain()], ids=["mixed", "plain"])
def test_types_are_made_equal_as_before_and_known_values_are_not_computed_again(model):
    with quiet(), torch.no_grad():
        wanted, all_run = written(model)
        with cache_patches():
            found, run = written(model)
    assert found == wanted
    assert run < all_run
    assert (run == 0) == isinstance(model, Plain)


def test_canary_types_are_made_equal_by_an_interpreter():
    with slower(
        "_TypePromotionInterpreter.run_node calls _maybe_promote_node where there is a rule, then runs the node"
    ):
        from torch.onnx._internal.fx.passes import type_promotion

        theirs = type_promotion._TypePromotionInterpreter
        assert {"run_node", "_maybe_promote_node"} <= vars(theirs).keys()
        assert callable(type_promotion.get_type_promotion_rule)
        before = theirs.run_node
        with cache_patches():
            assert theirs.run_node is not before
        assert theirs.run_node is before


def slower(relied_on):
    return canary(
        "export/torch_compat/caches.py",
        relied_on,
        todo="exports are slower and as right: run tests/bench/test_export_bench.py, and see what is computed anew now",
    )


def test_canary_the_table_of_functions_is_made_by_a_class_method():
    with slower(
        "ONNXRegistry.from_torchlib makes the table; TracedOnnxFunction.function_ir parses, for its domain"
    ):
        from onnxscript._internal.values import TracedOnnxFunction

        assert isinstance(ONNXRegistry.__dict__["from_torchlib"], classmethod)
        assert isinstance(TracedOnnxFunction.__dict__["function_ir"], property)
        with cache_patches():
            assert isinstance(ONNXRegistry.__dict__["from_torchlib"], staticmethod)


def test_canary_operators_that_stand_for_others_are_looked_up_by_one_function():
    with slower("torch._export.utils._materialize_cpp_cia_ops looks all operators up by their dispatch key"):
        theirs = utils._materialize_cpp_cia_ops
        with cache_patches():
            assert utils._materialize_cpp_cia_ops is not theirs
        assert torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")


def test_canary_types_of_kernels_are_written_with_collections_abc():
    with slower("torch._ops writes types with the `Callable` of collections.abc"):
        theirs = torch._ops.Callable
        with cache_patches():
            assert torch._ops.Callable is not theirs


def test_canary_a_trace_notes_the_layout_of_each_value():
    with slower(
        "torch.fx.experimental.proxy_tensor._extract_tensor_metadata(include_contiguity) finds the layout"
    ):
        theirs = proxy_tensor._extract_tensor_metadata
        assert theirs(X).memory_format is torch.contiguous_format
        with cache_patches():
            ours = proxy_tensor._extract_tensor_metadata(X)
        assert ours == theirs(X)._replace(memory_format=None)


def test_canary_an_exporter_asks_the_program_to_decompose_itself(monkeypatch):
    with slower("torch.onnx.export calls `run_decompositions(table)` of the program that it is given"):
        traces = []
        original = torch.export.ExportedProgram.run_decompositions
        program = decomposed_if_needed(exported(lambda x: x.exp() @ x.T, X))
        monkeypatch.setattr(
            torch.export.ExportedProgram,
            "run_decompositions",
            lambda *args: traces.append(args) or original(*args),
        )
        with quiet():
            torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
        assert not traces


class Heard(TorchFunctionMode):
    """Counts what is asked of tensors, with a tensor of a class of the user's own among them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A class of tensors of the user's own."""


def weights_of_all_kinds():
    model = torch.nn.Linear(3, 4)
    model.register_buffer("turned", torch.ones(4, 3).t())
    model.register_buffer("part", torch.ones(2, 3)[:, 1:])
    model.tied = model.weight
    return [
        *model.parameters(),
        *model.buffers(),
        torch.ones(0),
        torch.tensor(2),
        torch.ones(2).as_subclass(Own),
    ]


def test_fake_weights_are_made_unheard_and_are_the_same():
    found = []
    for how in (nullcontext, cache_patches):
        with how(), Heard() as heard:
            mode = FakeTensorMode(shape_env=ShapeEnv())
            fakes = [mode.from_tensor(weight, static_shapes=True) for weight in weights_of_all_kinds()]
            asked = heard.count
        kept = [(type(each), each.shape, each.stride(), each.storage_offset(), each.dtype) for each in fakes]
        grads = [(each.requires_grad, each.is_leaf, each._is_view()) for each in fakes]
        found.append((kept, grads, asked))
    (theirs, their_grads, asked), (ours, our_grads, heard) = found
    assert ours == theirs
    assert our_grads == their_grads
    assert heard < asked / 2


def test_canary_a_trace_makes_fake_weights_by_from_tensor():
    with canary(
        "export/torch_compat/caches.py",
        "torch.export makes a fake tensor of each weight by FakeTensorMode.from_tensor, its tensor the first argument",
        todo="traces are slower and as right: see _fakify_params_buffers in torch/_export/utils.py",
    ):
        made = []
        original = FakeTensorMode.from_tensor

        def noted(mode, tensor, **how):
            made.append(tuple(tensor.shape))
            return original(mode, tensor, **how)

        with mock.patch.object(FakeTensorMode, "from_tensor", noted):
            torch.export.export(torch.nn.Linear(3, 4), (torch.ones(2, 3),), strict=False)
        assert {(4, 3), (4,)} <= set(made)
