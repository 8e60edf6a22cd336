"""Every file of models/ becomes an engine for Turing, Ampere, Ada and Blackwell, at dynamic sizes."""

from __future__ import annotations

import pytest
from slow_cases import only

from moe_export.errors import NotExportableError
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.rules import find_refusals
from moe_export.export.precision.mixed import lower_precision

NAMES = ["attention", "gshard_moe", "hybrid", "mamba", "mamba2", "moe_gate", "sparse_moe"]
CAPABILITIES = ["sm75", "sm86", "sm89", "sm120"]


def test_every_model_is_named(tools):
    assert sorted(path.stem for path in tools.models.glob("[a-z]*.py")) == NAMES


@pytest.mark.parametrize("name", only(["attention", "sparse_moe"], NAMES))
def test_a_model_and_its_gates_build_for_every_gpu(exported, name):
    """In float32, and in float16 but for gates, which stay float32."""
    for graph in exported(name):
        assert graph.traced.dims, "no size is free"
        assert find_refusals(graph.model).refused == ()
        half = lower_precision(graph.model.clone(), "float16")
        assert bool(half.narrow) == (graph.kind == "model" and name != "moe_gate")
        ranges = {dim.name: (1, 2, 8) if dim.name == "batch" else (16, 64, 256) for dim in graph.traced.dims}
        for model in [graph.model, half.model] if half.narrow else [graph.model]:
            engines = build_engines(model, CAPABILITIES, ranges)
            assert [engine.capability for engine in engines] == CAPABILITIES
            for engine in engines:
                assert engine.size > 10_000
                assert engine.memory["activations"] >= 0
                profile = engine.profiles[0].items()
                assert {name: (r.minimum, r.best, r.maximum) for name, r in profile} == ranges


def test_kernels_know_the_nodes_that_they_compute(exported):
    graph = exported("sparse_moe")[0]
    (engine,) = build_engines(graph.model, ["sm89"])
    names = {node.name for node in graph.model.graph.all_nodes()}
    known = [set(kernel["nodes"]) for kernel in engine.layers["engine"] if kernel["nodes"]]
    assert len(known) > 10
    assert sum(bool(nodes & names) for nodes in known) > 0.9 * len(known)


def lowered(tools, experts):
    subject = load_subject(str(tools.models / "sparse_moe.py"))
    return export_subject(subject, Options(experts=experts, target="tensorrt", gates=False, simplify=False))[
        0
    ]


@pytest.mark.parametrize("experts", only(["auto"], ["auto", "dense", "slices", "gather"]))
def test_experts_build_in_every_form_that_a_gpu_can_run(tools, experts):
    graph = lowered(tools, experts)
    assert find_refusals(graph.model).refused == ()
    for engine in build_engines(graph.model, ["sm75", "sm89"], {"sequence": (1, 16, 128)}):
        assert engine.size > 10_000


@pytest.mark.slow
def test_the_loop_over_experts_is_refused_with_the_way_out(tools):
    graph = lowered(tools, "loop")
    refused = find_refusals(graph.model).refused
    assert any(
        "has no Sequence" in refusal.rule and "--experts blocks" in refusal.hint for refusal in refused
    )
    with pytest.raises(NotExportableError) as error:
        build_engines(graph.model, ["sm89"])
    for refusal in refused[:8]:
        assert str(refusal) in error.value.where
    assert "sparse_moe.py:" in error.value.where
