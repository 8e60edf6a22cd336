"""Every file of models/: exported at opset 17, checked, loaded, equal at other sizes; also as a plain script."""

from __future__ import annotations

import ast
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from slow_cases import only

from moe_export.errors import UsageError
from moe_export.export import load_subject
from moe_export.export.scans.captures import captures_as_states
from moe_export.verify import OnnxRuntimeRunner
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

NAMES = ["attention", "gshard_moe", "hybrid", "mamba", "mamba2", "moe_gate", "sparse_moe"]
# Mamba is exported by the tests of recurrences, and the hybrid is made of it and of parts of two others.
EXPORTED = only(["attention", "gshard_moe", "mamba2", "moe_gate", "sparse_moe"], NAMES)
STEP = {"mamba2": 8}  # its length must be a whole number of chunks
READS = {"hybrid", "mamba"}  # the body of their Scan reads a value that is computed outside
FREE = {"attention": ("batch", "sequence"), "mamba2": ("batch", "sequence")}


def sized(tensor, shape, sizes):
    """A tensor of the same kind whose named dimensions have other sizes."""
    wanted = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
    if tensor.dtype == torch.int64:
        return torch.randint(0, int(tensor.max()) + 1, wanted)
    return torch.ones(wanted).tril(3).bool() if tensor.dtype == torch.bool else torch.randn(wanted)


def other_sizes(graph, name):
    """Four sets of sizes: the smallest, two others, and those of the trace."""
    step = STEP.get(name, 1)
    yield {dim.name: dim.traced for dim in graph.traced.dims}
    for batch, length in ((1, 1), (3, 2), (5, 7)):
        yield {
            dim.name: max(dim.minimum, batch if dim.name == "batch" else length * step)
            for dim in graph.traced.dims
        }


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.slow_but_one
def test_the_file_is_what_was_asked_for(exported, name):
    for graph in exported(name):
        proto = ir.to_proto(graph.model)
        onnx.checker.check_model(proto, full_check=True)
        assert [(entry.domain, entry.version) for entry in proto.opset_import if entry.domain == ""] == [
            ("", 17)
        ]
        assert proto.ir_version == 8
        assert "Einsum" not in {node.op_type for node in graph.model.graph.all_nodes()}
        assert {node.domain for node in graph.model.graph.all_nodes()} <= {""}


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_it_is_equal_at_four_sizes(tools, exported, name):
    torch.manual_seed(0)
    graph = exported(name)[0]
    for sizes in other_sizes(graph, name):
        inputs = {
            key: sized(graph.traced.example[key], shape, sizes) for key, shape in graph.traced.inputs.items()
        }
        found = tools.run(graph.model, **inputs)
        expected = graph.reference.call_named(inputs)
        assert list(found) == list(graph.reference.outputs)
        for output, want in zip(found, expected, strict=True):
            if output in {indices for indices, _, _ in graph.routing}:
                assert np.array_equal(np.sort(found[output]), np.sort(want.numpy()))
            elif output in {weights for _, weights, _ in graph.routing}:
                np.testing.assert_allclose(
                    np.sort(found[output]), np.sort(want.numpy()), rtol=1e-5, atol=1e-5
                )
            else:
                np.testing.assert_allclose(
                    found[output], want.numpy(), rtol=1e-5, atol=1e-5, err_msg=str(sizes)
                )


@pytest.mark.parametrize("name", EXPORTED)
def test_openvino_computes_the_same(exported, name):
    """At four sizes; or it refuses the graph by node and line, and computes what `--target openvino` writes."""
    torch.manual_seed(0)
    graph = exported(name)[0]
    data = ir.to_proto(graph.model).SerializeToString()
    if name in READS:
        with pytest.raises(UsageError, match="the body of a Scan reads a value") as caught:
            OpenVinoRunner(data)
        assert re.search(r"node Scan \S+, mamba\.py:\d+, module \w+", caught.value.where)
    model = graph.model.clone()
    assert bool(captures_as_states(model)) == (name in READS)
    runner = OpenVinoRunner(ir.to_proto(model).SerializeToString())
    expects = OnnxRuntimeRunner(data)
    for sizes in other_sizes(graph, name):
        inputs = {
            key: sized(graph.traced.example[key], shape, sizes).numpy()
            for key, shape in graph.traced.inputs.items()
        }
        found, expected = runner.run(inputs), expects.run(inputs)
        assert list(found) == list(expected)
        for output, want in expected.items():
            anyhow = output in {each for routing in graph.routing for each in routing[:2]}
            got, right = (np.sort(each) if anyhow else each for each in (found[output], want))
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5, err_msg=f"{output} {sizes}")


@pytest.mark.parametrize("name", EXPORTED)
def test_every_batch_is_free(exported, name):
    graph = exported(name)[0]
    assert "batch" in {dim.name for dim in graph.traced.dims}


def as_script(text):
    """The source with `model` and `example_inputs` under other names, used once below the main guard."""
    tree = ast.parse(text)
    kept = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(ast.Module(kept, [])):
        if isinstance(node, ast.Name) and node.id in ("model", "example_inputs"):
            node.id = f"my_{node.id}"
        if isinstance(node, ast.FunctionDef) and node.name == "example_inputs":
            node.name = "my_example_inputs"
    call = """
if __name__ == "__main__":
    arguments = my_example_inputs() if callable(my_example_inputs) else my_example_inputs
    try:
        result = my_model(**arguments) if isinstance(arguments, dict) else my_model(*arguments)
    except Exception:
        raise SystemExit("never seen")
    for step in range(10**12):
        my_model.zero_grad()
"""
    return ast.unparse(ast.Module(kept, [])) + call


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_same_model_as_a_plain_script(tools, write, name):
    """The subject is the same module on the same arguments, and every later stage knows no more than that."""
    text = as_script((tools.models / f"{name}.py").read_text())
    # models/hybrid.py imports its parts as modules of this package; a script would have them beside it.
    found = load_subject(str(write(text, f"{name}_script.py", header="")))
    given = load_subject(str(tools.models / f"{name}.py"))
    assert found.how.startswith("the first module call of the script (")
    assert list(found.inputs) == list(given.inputs)
    assert (found.outputs, found.dropped) == (given.outputs, given.dropped)
    tensors = list(given.inputs.values())
    assert all(torch.equal(a, b) for a, b in zip(found.call(tensors), given.call(tensors), strict=True))
