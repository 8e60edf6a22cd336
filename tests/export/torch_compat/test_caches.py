"""What is computed once instead of at every export is what PyTorch would compute."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch._ops
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

from moe_export.export.torch_compat.caches import made_once
from moe_export.export.tracing import quiet
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
    with made_once():
        ours, again = (ONNXRegistry().from_torchlib(opset_version=opset) for _ in range(2))
    assert len(table(theirs)) > 400
    assert table(ours) == table(again) == table(theirs)
    assert list(ours.functions) == list(theirs.functions)
    assert ours.opset_version == theirs.opset_version == opset


def test_a_function_that_one_export_adds_is_not_in_the_next():
    def silu(x):
        return x

    target = torch.ops.aten.silu.default
    with made_once():
        one = ONNXRegistry.from_torchlib(18)
        one.register_op(target, silu)
        other = ONNXRegistry.from_torchlib(18)
    assert one.get_decomps(target)[0].onnx_function is silu
    assert silu not in [function.onnx_function for function in other.get_decomps(target)]


def test_the_second_table_is_not_made_again(monkeypatch):
    with made_once():
        ONNXRegistry.from_torchlib(18)
    parsed = []
    original = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: parsed.append(args) or original(*args))
    with made_once():
        ONNXRegistry.from_torchlib(18)
    assert not parsed
    ONNXRegistry.from_torchlib(18)
    assert len(parsed) > 400


def test_an_operator_of_a_new_library_is_found():
    with made_once():
        before = utils._collect_all_valid_cia_ops()
    library = torch.library.Library("moe_export_new", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
    with made_once():
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
    with made_once():
        inside = patched()
        assert all(one is not other for one, other in zip(before, inside, strict=True))
        with made_once():  # one in another
            ONNXRegistry.from_torchlib(18)
        assert patched() == inside
    assert patched() == before
    with pytest.raises(ZeroDivisionError), made_once():
        raise ZeroDivisionError
    assert patched() == before


@pytest.mark.parametrize("example", [mamba, sparse_moe], ids=["mamba", "sparse_moe"])
def test_a_graph_is_the_same_byte_by_byte(example):
    def exported():
        with quiet(), torch.no_grad():
            program = torch.export.export(
                example.model, example.example_inputs, strict=False
            ).run_decompositions({})
            written = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
        return str(program.graph), written.model_proto.SerializeToString(deterministic=True)

    theirs = exported()
    with made_once():
        assert exported() == theirs
        assert exported() == theirs
