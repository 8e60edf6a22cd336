"""The whole way, in order, for models as people have them."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slow_cases import slow
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.pipeline import Graph, choose, describe, gate_dims, is_only_a_gate
from moe_export.export.stages import PIPELINE
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.fixed_sizes import Fixed
from moe_export.export.tracing.trace import trace


def test_a_gate_in_a_loop_is_cut_out_once():
    paths = ["first", "cell", "cell@1", "cell@2", "last"]
    routings = tuple(SimpleNamespace(path=path) for path in paths)
    assert [routing.path for routing in choose(routings, True, folded=True)] == ["first", "cell", "last"]
    assert [routing.path for routing in choose(routings, True, folded=False)] == paths
    assert [routing.path for routing in choose(routings, "cell@2", folded=True)] == ["cell@2"]
    assert choose(routings, False, folded=True) == ()


def test_the_facts_in_a_graph(tools):
    graph = tools.graph(nn.ReLU(), torch.ones(2, 3))
    facts = {
        "version": "1.2",
        "source": "model.py",
        "opset": "17",
        "kind": "gate",
        "module": "moe",
        "dtype": "float32",
    }
    describe(graph.model, facts)
    assert (graph.model.producer_name, graph.model.producer_version) == ("moe-export", "1.2")
    assert graph.model.metadata_props == {f"moe_export.{key}": value for key, value in facts.items()}
    assert graph.model.graph.name == "model.gate"
    assert str(graph.model.graph.doc_string).splitlines() == [
        "model.py: gate of moe, exported at opset 17, float32",
        "in   input: float[batch, input_dim1]",
        "out  output: float[batch, input_dim1]",
    ]


def test_a_graph_has_a_name_where_its_model_has_no_file_of_its_own(tools):
    graph = tools.graph(nn.ReLU(), torch.ones(2, 3))
    facts = {
        "version": "1.2",
        "source": "model",
        "opset": "17",
        "kind": "model",
        "module": "",
        "dtype": "float32",
    }
    describe(graph.model, facts)
    assert graph.model.graph.name == "model"


def test_steps_are_announced_in_order(tools):
    seen = []
    export_subject(
        tools.subject(nn.ReLU(), torch.ones(2, 3)), Options(), lambda name: seen.append(name) or nullcontext()
    )
    assert seen == [stage.doing for stage in PIPELINE if stage.doing]


def test_no_einsum_is_left_and_each_is_reported(tools):
    class Einsums(nn.Module):
        def forward(self, x, y):
            z = torch.einsum("bij,bjk->bik", x, y)
            return torch.einsum("bii->b", z)

    graph = tools.graph(Einsums(), torch.randn(2, 3, 4), torch.randn(2, 4, 3))
    assert "Einsum" not in {node.op_type for node in graph.model.graph.all_nodes()}
    first = Einsums.forward.__code__.co_firstlineno + 1
    assert [(site.equation, site.line) for site in graph.sites] == [
        ("bij,bjk->bik", first),
        ("bii->b", first + 1),
    ]
    tools.equal(graph, torch.randn(5, 3, 6), torch.randn(5, 6, 3))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "onnxruntime-cuda", "openvino", "tensorrt"])
def test_permutes_are_kept_apart_for_the_engine_that_is_faster_then(tools, target):
    class Chunks(nn.Module):
        """States of chunks, as Mamba-2 permutes them before and behind a concatenation."""

        def forward(self, x):
            states = x.permute(0, 1, 3, 4, 2)
            return torch.cat([torch.zeros_like(states[:, :1]), states], 1).permute(0, 2, 1, 3, 4)

    subject = tools.subject(Chunks(), torch.randn(2, 9, 16, 4, 16))
    (graph,) = export_subject(subject, Options(gates=False, target=target))
    kinds = [node.op_type for node in graph.model.graph.all_nodes()]
    assert kinds.count("Flatten") == (target == "onnxruntime-cpu")
    assert kinds.count("Transpose") == 2
    for sizes in ((2, 9, 16, 4, 16), (1, 1, 16, 4, 16), (3, 64, 16, 4, 16)):
        tools.equal(graph, torch.randn(sizes))


def test_static_is_static(tools):
    graph = tools.graph(nn.ReLU(), torch.ones(2, 3), dims=DimRequest(static=True))
    assert [list(value.shape) for value in graph.model.graph.inputs] == [[2, 3]]
    assert graph.traced.fixed == ()


def test_as_numpy():
    assert as_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype.name == "bfloat16"
    assert np.array_equal(as_numpy(torch.arange(3)), np.arange(3))


def test_sizes_baked_into_a_gate_stay_fixed(tools):
    """A gate cut out of a trace that fixed a length would only look right at others, where it computes with it."""

    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.div, (graph.placeholder("x"), 6)))
    module = nn.Module()
    module.add_module("gate", torch.fx.GraphModule(nn.Module(), graph))
    cut = tools.subject(nn.ReLU(), torch.ones(6, 8))
    cut = dataclasses.replace(cut, module=module, inputs={"x": torch.ones(6, 8)})
    traced = trace(tools.subject(nn.ReLU(), torch.ones(6, 8)))

    def with_fixed(size):
        return dataclasses.replace(traced, fixed=(Fixed("x", 0, size, True),))

    assert gate_dims(cut, DimRequest(), with_fixed(6)).fixed == {("x", 0)}
    assert gate_dims(cut, DimRequest(), with_fixed(7)) == DimRequest(False, {})


@pytest.mark.parametrize("count", [1, 3])
def test_only_a_gate_needs_one_gate(tools, count):
    graph = tools.graph(nn.ReLU(), torch.ones(2, 3))
    assert isinstance(graph, Graph)
    assert not is_only_a_gate((graph,) * count)
    assert not is_only_a_gate((graph, dataclasses.replace(graph, kind="step")))
    assert is_only_a_gate((graph, dataclasses.replace(graph, kind="gate")))


LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixtral_of_transformers(tools):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2))
    ids = torch.randint(0, 64, (1, 7))
    whole, *gates = tools.graphs(model, gates=True, input_ids=ids)
    assert [gate.path for gate in gates] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert "output past_key_values is a DynamicCache, not a tensor, and is dropped" in whole.notes
    assert whole.traced.inputs == {"input_ids": ("batch", "sequence")}
    for shape in ((1, 1), (2, 5), (3, 12)):
        tools.equal(whole, torch.randint(0, 64, shape))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Bert", slow("GPT2")])
def test_dense_models_of_transformers(tools, kind):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "Bert": {"intermediate_size": 48, "num_hidden_layers": 1},
        "GPT2": {"n_layer": 1, "use_cache": False},
    }
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, num_attention_heads=4, max_position_embeddings=64, **sizes[kind]
    )
    model = getattr(transformers, f"{kind}Model")(config)
    graph = tools.graph(model, input_ids=torch.randint(0, 64, (1, 7)))
    assert graph.traced.outputs[0] == "last_hidden_state"
    for shape in ((1, 1), (3, 12)):
        tools.equal(graph, torch.randint(0, 64, shape), atol=1e-4)
