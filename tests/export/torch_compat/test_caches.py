"""What is computed once instead of at every export is what PyTorch would compute."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch._ops
from canaries import canary
from slow_cases import slow
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

from moe_export.export.torch_compat.caches import cache_patches
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
