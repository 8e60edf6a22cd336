"""The gate alone: cut out, exported, verified; also where PyTorch's own exporter fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slow_cases import slow
from torch import nn

from moe_export.errors import UsageError
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.gates import gate
from moe_export.export.gates.routing import find_routings
from moe_export.export.pipeline import is_only_a_gate
from moe_export.export.tracing.trace import trace


def load(tools, name):
    return load_subject(str(tools.models / f"{name}.py"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, slow(False)])
def test_pytorchs_own_exporters_fail_on_moe_gate(tools, dynamo, tmp_path):
    """The day they do not, this project's reason for a way around them is gone."""
    subject = load(tools, "moe_gate")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever they raise
        torch.onnx.export(
            subject.module,
            tuple(subject.inputs.values()),
            str(tmp_path / "gate.onnx"),
            dynamo=dynamo,
            verbose=False,
        )


def test_moe_gate_is_right_all_the_same(tools, exported):
    model, gate = exported("moe_gate")
    module = model.reference.module
    assert is_only_a_gate((model, gate))
    assert "output output_2 is the constant 0 and is dropped" in model.notes
    for batch, sequence in ((1, 1), (1, 3), (3, 5), (4, 16)):
        for graph in (model, gate):
            tools.gate_equal(graph, lambda x: module(x)[:2], torch.randn(batch, sequence, 32))


@pytest.mark.parametrize("tokens", [1, 3, 15, 64])
def test_the_gate_of_sparse_moe(tools, exported, tokens):
    _, gate = exported("sparse_moe")
    module = gate.reference  # the cut; the module's own weights are compared below
    block = exported("sparse_moe")[0].reference.module

    def eager(x):
        weights, indices = torch.topk(block.gate(x.reshape(-1, 32)).softmax(-1), 2, dim=-1)
        return indices, weights / weights.sum(-1, keepdim=True)

    assert module.outputs == ("topk_idx", "topk_weight", "scores")
    assert list(gate.traced.inputs) == ["hidden_states"]
    x = torch.randn(1, tokens, 32)
    tools.gate_equal(gate, eager, x)
    assert torch.allclose(eager(x)[1], block(x)[1])  # expert_weights, as the block itself returns them


@pytest.mark.parametrize("tokens", [1, 3, 15, 64])
def test_the_gate_of_gshard_moe(tools, exported, tokens):
    model, gate = exported("gshard_moe")
    wg = model.reference.module.gate.wg

    def eager(x):
        scores = wg(x).softmax(dim=1)
        weights, indices = scores.topk(2, dim=1)
        return indices, weights

    x = torch.randn(tokens, 32)
    found = tools.run(gate.model, x=x)
    assert (found["topk_idx"] == eager(x)[0].numpy()).all()  # first choice first
    combine = model.reference.module.gate(x)[0].sum(-1)  # (s, e): what each token gets of each expert
    kept = combine.gather(1, eager(x)[0])
    assert ((kept == 0) | torch.isclose(kept, torch.tensor(found["topk_weight"]), atol=1e-6)).all()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3, 15, 64])
def test_the_gate_of_the_hybrid(tools, exported, tokens):
    model, gate = exported("hybrid")
    block = model.reference.module.moe

    def eager(x):
        weights, indices = torch.topk(block.gate(x.reshape(-1, 32)).softmax(-1), 2, dim=-1)
        return indices, weights / weights.sum(-1, keepdim=True)

    assert gate.path == "moe"
    tools.gate_equal(gate, eager, torch.randn(1, tokens, 32))


def test_the_reference_also_returns_the_scores_it_chose_by(tools):
    subject = load(tools, "moe_gate")
    traced = trace(subject)
    (routing,) = find_routings(traced)
    cut = tools.cut(traced, routing, subject, with_scores=True)
    indices, weights, scores = cut.call([torch.randn(2, 3, 32)])
    assert indices.shape == weights.shape == (6, 2)
    assert torch.allclose(scores.sum(-1), torch.ones(6))
    assert tools.cut(traced, routing, subject).outputs == ("topk_idx", "topk_weight")


def test_a_gate_keeps_the_lines_it_came_from(exported):
    _, gate = exported("sparse_moe")
    sources = {node.metadata_props.get("source", "").partition(":")[0] for node in gate.model.graph}
    assert sources - {""} == {"sparse_moe.py"}


def test_no_gate_is_asked_for(tools):
    assert len(export_subject(load(tools, "moe_gate"), Options(gates=False, simplify=False))) == 1


def test_one_gate_is_asked_for_by_its_path(tools):
    graphs = export_subject(load(tools, "moe_gate"), Options(gates="model", simplify=False))
    assert [graph.kind for graph in graphs] == ["model", "gate"]


def test_a_path_without_a_gate(tools):
    with pytest.raises(UsageError) as caught:
        export_subject(load(tools, "moe_gate"), Options(gates="layers.3"))
    assert str(caught.value) == "no gate in module 'layers.3'\n  hint: the gates of this model: model"


def test_a_model_without_any_gate(tools):
    with pytest.raises(UsageError, match="no gate was recognised in this model"):
        tools.graphs(nn.Linear(4, 4), torch.ones(2, 4), gates="model")


def test_a_gate_that_cannot_be_cut_out_does_not_stop_the_model(tools, monkeypatch):
    from moe_export.export import pipeline

    def fail(*args, **kwargs):
        raise UsageError("the cut went wrong")

    monkeypatch.setattr(pipeline, "gate_subject", fail)
    (graph,) = export_subject(load(tools, "moe_gate"), Options(simplify=False))
    assert "the gate of model could not be cut out: the cut went wrong" in graph.notes
    with pytest.raises(UsageError, match="the cut went wrong"):
        export_subject(load(tools, "moe_gate"), Options(gates="model", simplify=False))


def test_dimensions_that_the_user_names_reach_the_gate(tools):
    from moe_export.export.tracing.dims import DimRequest

    dims = DimRequest(True, {("hidden_states", 1): "time"})
    for graph in export_subject(load(tools, "moe_gate"), Options(dims=dims, simplify=False)):
        assert graph.traced.inputs == {"hidden_states": (2, "time", 32)}


class BehindALoop(nn.Module):
    """A loop over time and experts in one forward. The router reads the loop's result, or the input, too."""

    def __init__(self, two_routers: bool) -> None:
        super().__init__()
        self.mix, self.router, self.other = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.two_routers = two_routers

    def forward(self, x):
        h, hs = x.new_zeros(x.shape[0], 8), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.mix(h) + x[:, t])
            hs.append(h)
        y = torch.stack(hs, 1)
        logits = self.router(y) + self.other(x) if self.two_routers else self.router(y)
        weights, indices = logits.softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(y)
        for e, expert in enumerate(self.experts):
            out += (weights * (indices == e)).sum(-1, keepdim=True) * expert(y)
        return out, indices


@pytest.mark.parametrize("recurrence", ["auto", pytest.param("unrolled", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_gate_behind_a_loop_begins_behind_it(tools, recurrence):
    """The trace has a step for each place of the example: a gate that began before would cut off longer inputs."""
    x = torch.randn(2, 6, 8)
    subject = make_subject(BehindALoop(False), (x,), {}, source=Path(__file__), how="a test")
    gate = export_subject(subject, Options(simplify=False, recurrence=recurrence))[1]
    ((name, shape),) = gate.traced.inputs.items()
    assert name != "x"
    assert shape == ("batch", "sequence", 8)
    module = subject.module
    for batch, sequence in ((1, 1), (3, 9)):
        tools.gate_equal(
            gate,
            lambda y: torch.topk(module.router(y).softmax(-1), 2, dim=-1)[::-1],
            torch.randn(batch, sequence, 8),
        )


def test_a_gate_that_cannot_begin_behind_a_loop_has_its_length():
    x = torch.randn(2, 6, 8)
    subject = make_subject(BehindALoop(True), (x,), {}, source=Path(__file__), how="a test")
    gate = export_subject(subject, Options(simplify=False))[1]
    assert gate.traced.inputs == {"x": ("batch", 6, 8)}


class RoutedCell(nn.Module):
    """A gate that joins two inputs: only the sum of their widths stands in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.w = nn.Linear(16, 3), nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(self, x, h):
        z = torch.cat([x, h], -1)
        weights, indices = self.gate(z).softmax(-1).topk(2, dim=-1)
        y = torch.einsum("bd,bkdo->bko", z, self.w[indices])
        return torch.tanh((weights.unsqueeze(-1) * y).sum(1))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = RoutedCell()

    def forward(self, x):
        h, ys = x.new_zeros(x.shape[0], 8), []
        for step in x.unbind(1):
            h = self.cell(step, h)
            ys.append(h)
        return torch.stack(ys, 1)


@pytest.mark.slow
def test_widths_that_the_model_has_for_itself_are_no_dimensions_of_a_gate():
    subject = make_subject(Routed(), (torch.randn(2, 5, 8),), {}, source=Path(__file__), how="a test")
    model, gate = export_subject(subject, Options(simplify=False))
    assert model.traced.inputs == {"x": ("batch", "sequence", 8)}
    assert set(gate.traced.inputs.values()) == {("batch", 8)}


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 4, bias=False)

    def forward(self, hidden):
        return self.scores(hidden).softmax(-1).topk(2)


class Layers(nn.Module):
    """Three gates: one of the input, two of what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(Router() for _ in range(3))
        self.mixing = nn.Linear(8, 8)

    def forward(self, x):
        first = self.routers[0](x)
        x = self.mixing(x).tanh()
        return *first, *self.routers[1](x), *self.routers[2](x)


def test_the_model_runs_once_for_all_gates_and_each_has_its_own_inputs(tools, monkeypatch):
    model, x = Layers(), torch.randn(5, 8)
    runs = []
    original = gate.values_of
    monkeypatch.setattr(
        gate, "values_of", lambda traced, nodes: runs.append(nodes) or original(traced, nodes)
    )
    gates = tools.graphs(model, x, gates=True)[1:]
    assert len(gates) == 3
    assert len(runs) == 1
    assert len(runs[0]) == 2  # the second and the third have one input
    with torch.no_grad():
        behind = model.mixing(x).tanh()
    for each, wanted in zip(gates, (x, behind, behind), strict=True):
        (own,) = each.reference.inputs.values()
        torch.testing.assert_close(own, wanted)
        tools.equal(each, torch.randn(3, 8))
