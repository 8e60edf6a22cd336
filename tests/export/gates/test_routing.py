"""Gates are recognised by what they do: every idiom of the field, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slow_cases import one_in
from torch import nn

TOKENS = (1, 3, 15, 64)


class Experts(nn.Module):
    """A loop over all experts, each on the tokens that chose it."""

    def __init__(self, experts=4, dim=8):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(experts))

    def forward(self, x, indices, weights):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = ((indices == number) * weights).sum(-1, keepdim=True)
            out = out + expert(x) * share
        return out


class Softmax(nn.Module):
    """Mixtral as it was published: softmax, topk, normalise."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4, bias=False), Experts()

    def route(self, x):
        weights, indices = self.gate(x).softmax(-1).topk(2, dim=-1)
        return indices, weights / weights.sum(-1, keepdim=True)

    def forward(self, x):
        indices, weights = self.route(x)
        return self.experts(x, indices, weights)


class Mixtral(Softmax):
    """transformers' order: topk of the logits, then softmax of the chosen."""

    def route(self, x):
        logits, indices = torch.topk(self.gate(x), 2, dim=-1)
        return indices, F.softmax(logits, dim=-1, dtype=torch.float).to(x.dtype)


class Unsorted(Softmax):
    def route(self, x):
        weights, indices = torch.topk(self.gate(x).softmax(-1), 3, dim=-1, sorted=False)
        return indices, weights * 2.5


class BiasGate(nn.Module):
    """DeepSeek-V3: sigmoid scores, a bias that only the choice sees, groups, weights gathered from the scores."""

    def __init__(self, groups=1):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(0.3 * torch.randn(8, 8))
        self.register_buffer("e_score_correction_bias", torch.randn(8))

    def forward(self, hidden_states):
        scores = F.linear(hidden_states.float(), self.weight.float()).sigmoid()
        choice = scores + self.e_score_correction_bias.unsqueeze(0)
        if self.groups > 1:
            n = len(hidden_states)
            by_group = choice.view(n, self.groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
            best = torch.topk(by_group, k=2, dim=-1, sorted=False)[1]
            mask = torch.zeros_like(by_group)
            mask.scatter_(1, best, 1)
            mask = mask.unsqueeze(-1).expand(n, self.groups, 8 // self.groups).reshape(n, -1)
            choice = choice.masked_fill(~mask.bool(), float("-inf"))
        _, indices = torch.topk(choice, k=2, dim=-1, sorted=False)
        weights = scores.gather(1, indices)
        return indices, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


class GroupLimited(nn.Module):
    """DeepSeek-V2: the best groups by their best expert, then the best experts in them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(8, 8))

    def forward(self, x):
        scores = F.linear(x, self.weight).softmax(dim=-1)
        groups = scores.view(len(x), 4, -1).max(dim=-1).values
        best = torch.topk(groups, k=2, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(groups).scatter_(1, best, 1)
        mask = mask.unsqueeze(-1).expand(len(x), 4, 2).reshape(len(x), -1)
        weights, indices = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=3, dim=-1, sorted=False)
        return indices, weights * 16.0


class InSubmodule(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.norm, self.gate, self.experts = nn.LayerNorm(8), gate, Experts(8)

    def forward(self, x):
        x = self.norm(x)
        return self.experts(x, *self.gate(x))


class Switch(nn.Module):
    """Top-1: argmax for the expert, max for the weight."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), Experts()

    def route(self, x):
        probabilities = self.router(x).softmax(-1)
        return torch.argmax(probabilities, -1), torch.max(probabilities, dim=-1).values

    def forward(self, x):
        index, weight = self.route(x)
        mask = F.one_hot(index, 4)
        parts = [expert(x) * mask[:, n : n + 1] for n, expert in enumerate(self.experts.experts)]
        return sum(parts) * weight.unsqueeze(-1)


class Top2Gate(nn.Module):
    """GShard: argmax, mask it away, argmax again; the weights read off the masks and normalised."""

    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(8, 4, bias=False)

    def choose(self, x):
        gates = self.wg(x).softmax(dim=1)
        first = torch.argmax(gates, dim=1)
        mask1 = F.one_hot(first, num_classes=4)
        second = torch.argmax(gates.masked_fill(mask1.bool(), float("-inf")), dim=1)
        mask2 = F.one_hot(second, num_classes=4)
        gates1, gates2 = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
        total = gates1 + gates2
        return (first, second), (gates1 / total, gates2 / total), (mask1, mask2)

    def forward(self, x):
        _, (weight1, weight2), (mask1, mask2) = self.choose(x)
        return weight1.unsqueeze(-1) * mask1 + weight2.unsqueeze(-1) * mask2


class GShard(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = Top2Gate(), Experts()

    def forward(self, x):
        combine = self.gate(x)
        return sum(expert(x) * combine[:, n : n + 1] for n, expert in enumerate(self.experts.experts))


class Chooser(nn.Module):
    def forward(self, logits):
        weights, indices = logits.softmax(-1).topk(2)
        return indices, weights / weights.sum(-1, keepdim=True)


class PicksResults(Softmax):
    """All experts compute all tokens, and the results of those that were chosen are picked."""

    def forward(self, x):
        indices, weights = self.route(x)
        results = torch.stack([expert(x) for expert in self.experts.experts], 1)  # (tokens, experts, width)
        picked = results.gather(1, indices.unsqueeze(-1).expand(-1, -1, results.shape[-1]))
        return (picked * weights.unsqueeze(-1)).sum(1)


class ChoicesApart(Softmax):
    """First and second choices are taken apart, as where each finds its slot."""

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        parts = scores.topk(2, dim=-1).indices.chunk(2, dim=-1)
        marks = [F.one_hot(part.view(-1), 4) for part in parts]
        weights = [(scores * mark).sum(-1, keepdim=True) for mark in marks]
        out = torch.zeros_like(x)
        for mark, weight in zip(marks, weights, strict=True):
            results = torch.stack([expert(x) for expert in self.experts.experts], -1)
            out = out + (results * mark.unsqueeze(1)).sum(-1) * weight
        return out


class LogitsOutside(nn.Module):
    """The module that chooses is given the logits: the gate begins where they are computed."""

    def __init__(self):
        super().__init__()
        self.wg, self.chooser, self.experts = nn.Linear(8, 4), Chooser(), Experts()

    def forward(self, x):
        return self.experts(x, *self.chooser(self.wg(x)))


class Behind(nn.Module):
    """Something before the block, so that the gate's input is no input of the model."""

    def __init__(self, moe):
        super().__init__()
        self.project, self.moe = nn.Linear(8, 8), moe

    def forward(self, tokens):
        return self.moe(self.project(tokens).relu())


def stacked(route):
    def eager(x):
        (first, second), (weight1, weight2), _ = route(x)
        return torch.stack([first, second], -1), torch.stack([weight1, weight2], -1)

    return eager


def single(route):
    return lambda x: tuple(value.unsqueeze(-1) for value in route(x))


torch.manual_seed(0)
CASES = [
    ("softmax", Softmax(), "model", lambda m: m.route, 4),
    ("mixtral", Mixtral(), "model", lambda m: m.route, 4),
    ("unsorted", Unsorted(), "model", lambda m: m.route, 4),
    ("behind a layer", Behind(Softmax()), "moe", lambda m: m.moe.route, 4),
    ("sigmoid and bias", InSubmodule(BiasGate()), "gate", lambda m: m.gate, 8),
    ("groups, v3", InSubmodule(BiasGate(4)), "gate", lambda m: m.gate, 8),
    ("groups, v2", InSubmodule(GroupLimited()), "gate", lambda m: m.gate, 8),
    ("switch", Switch(), "model", lambda m: single(m.route), 4),
    ("gshard", GShard(), "gate", lambda m: stacked(m.gate.choose), 4),
    ("results picked", PicksResults(), "model", lambda m: m.route, 4),
    ("logits outside", Behind(LogitsOutside()), "moe", lambda m: lambda x: m.moe.chooser(m.moe.wg(x)), 4),
]


@pytest.mark.parametrize(
    ("module", "path", "eager", "experts"),
    one_in(2, [case[1:] for case in CASES]),
    ids=[c[0] for c in CASES],
)
@pytest.mark.slow_but_one
def test_the_gate_is_found_and_right_at_other_token_counts(tools, module, path, eager, experts):
    torch.manual_seed(1)
    (gate,) = tools.gates(module.eval(), torch.randn(6, 8))
    assert gate.path == path
    assert [value.name for value in gate.model.graph.outputs] == ["topk_idx", "topk_weight"]
    assert len(gate.traced.inputs) == 1
    for tokens in TOKENS:
        tools.gate_equal(gate, eager(module), torch.randn(tokens, 8))


def test_choices_that_are_taken_apart_are_of_one_gate(tools):
    (gate,) = tools.gates(ChoicesApart().eval(), torch.randn(6, 8))
    assert gate.path == "model"
    assert gate.model.graph.outputs[0].name == "topk_idx"


def test_its_line_and_its_number_of_experts(tools):
    (routing,) = tools.routings(Softmax(), torch.randn(6, 8))
    assert routing.line == f"{__file__}:{Softmax.route.__code__.co_firstlineno + 1}"
    assert routing.experts == 4


def test_two_layers_are_two_gates(tools):
    model = nn.Sequential(Softmax(), nn.LayerNorm(8), Mixtral())
    first, second = tools.gates(model, torch.randn(6, 8))
    assert (first.path, second.path) == ("0", "2")
    for tokens in TOKENS:
        tools.gate_equal(first, model[0].route, torch.randn(tokens, 8))
        tools.gate_equal(second, model[2].route, torch.randn(tokens, 8))


def test_one_layer_called_twice_is_two_gates(tools):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = Softmax()

        def forward(self, x):
            return self.moe(self.moe(x))

    assert [routing.path for routing in tools.routings(Twice(), torch.randn(6, 8))] == ["moe", "moe@1"]


def test_a_model_that_counts_the_load_of_its_experts(tools):
    """The trace then returns the changed buffer before the user's outputs."""

    class Counting(Softmax):
        def __init__(self):
            super().__init__()
            self.register_buffer("load", torch.zeros(4))

        def forward(self, x):
            indices, weights = self.route(x)
            self.load += F.one_hot(indices, 4).sum((0, 1))
            return self.experts(x, indices, weights), indices, weights

    model, gate = tools.graphs(Counting(), torch.randn(6, 8), gates=True)
    assert model.routing == (("indices", "weights", None),)
    assert gate.path == "model"


def test_routing_outputs_of_the_model_are_named(exported):
    model, gate = exported("moe_gate")
    assert model.routing == (("topk_idx", "topk_weight", None),)
    assert gate.routing == (("topk_idx", "topk_weight", "scores"),)


class Head(nn.Module):
    """A language model's end."""

    def __init__(self, after):
        super().__init__()
        self.embedding, self.head, self.after = nn.Embedding(32, 8), nn.Linear(8, 32), after

    def forward(self, ids):
        return self.after(self, self.head(self.embedding(ids)))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x):
        return self.layers(x).softmax(-1).topk(3)


IDS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Head(lambda m, logits: (logits, logits.argmax(-1))), IDS),
        (Head(lambda m, logits: (logits, logits.topk(5))), IDS),
        (Head(lambda m, logits: m.embedding(logits.argmax(-1))), IDS),
        (Head(lambda m, logits: logits.gather(-1, logits.argmax(-1, keepdim=True))), IDS),
        (Head(lambda m, logits: logits * (logits.argmax(-1) == 3).unsqueeze(-1)), IDS),
        (Classifier(), torch.randn(4, 8)),
        (nn.Linear(8, 8), torch.randn(4, 8)),
        (nn.MaxPool1d(2), torch.randn(4, 8, 6)),
    ],
    ids=["argmax", "topk", "next word", "likelihood", "is it three", "classifier", "linear", "pooling"],
)
def test_what_is_no_gate(tools, module, example):
    assert tools.routings(module, example) == ()


def test_a_choice_among_tokens_is_a_gate_of_experts(tools):
    """Expert-choice routing: the experts choose tokens; see test_tokens.py."""

    class ExpertChoice(nn.Module):
        def __init__(self):
            super().__init__()
            self.wg = nn.Linear(8, 4)

        def forward(self, x):
            weights, tokens = self.wg(x).softmax(-1).t().topk(3, dim=-1)
            return x[tokens] * weights.unsqueeze(-1)

    (routing,) = tools.routings(ExpertChoice(), torch.randn(6, 8))
    assert routing.experts == 4
    assert routing.choices[0].tokens == 1
