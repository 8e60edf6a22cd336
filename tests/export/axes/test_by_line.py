"""What is said of each line of a model: in the field's words, as the comments of the models have it."""

from __future__ import annotations

import pytest
import torch
from experts_idioms import Block, OverHits
from opened import subject_of
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.by_line import lines_of, meaning_in_words
from moe_export.export.tracing.trace import trace

TOKENS, EXPERTS, SLOTS, WIDTH = 7, 5, 2, 4


def said_of(write) -> str:
    """The meaning of what a function of scores and of rows of tokens returns."""
    scores, rows = torch.randn(TOKENS, EXPERTS), torch.randn(TOKENS, WIDTH)
    graph = make_fx(write, tracing_mode="fake", pre_dispatch=True)(scores, rows).graph
    (result,) = (node for node in graph.output_node().all_input_nodes)
    return meaning_in_words(result, meanings_of(graph))


def counts(scores):
    mask = F.one_hot(scores.argmax(-1), EXPERTS)
    return (mask.cumsum(0) * mask).sum(-1)


WORDS = {
    "chosen": (
        lambda s, x: s.topk(SLOTS).indices,
        "(token, slot): numbers of experts, each expert once a token",
    ),
    "pairs": (lambda s, x: s.topk(SLOTS).indices.flatten(), "(pair,): numbers of experts"),
    "order": (
        lambda s, x: s.topk(SLOTS).indices.flatten().argsort(stable=True),
        "(pair in an order,): numbers of pairs",
    ),
    "tokens of pairs": (
        lambda s, x: s.topk(SLOTS).indices.flatten().argsort(stable=True) // SLOTS,
        "(pair in an order,): numbers of tokens",
    ),
    "rows of pairs": (
        lambda s, x: x[s.topk(SLOTS).indices.flatten().argsort(stable=True) // SLOTS],
        "(pair in an order, feature)",
    ),
    "mask": (
        lambda s, x: F.one_hot(s.topk(SLOTS).indices, EXPERTS).permute(2, 1, 0),
        "(expert, slot, token): set at the chosen expert",
    ),
    "one expert": (lambda s, x: s.topk(SLOTS).indices == 3, "(token, slot): set where expert 3 was chosen"),
    "gates": (
        lambda s, x: torch.zeros(TOKENS, EXPERTS).scatter(1, s.topk(SLOTS).indices, s.topk(SLOTS).values),
        "(token, expert): 0 where an expert was not chosen",
    ),
    "list": (
        lambda s, x: torch.zeros(TOKENS, EXPERTS).scatter(1, s.topk(SLOTS).indices, 1.0).nonzero(),
        "(pair in an order, feature): numbers of tokens and experts side by side",
    ),
    "loads": (lambda s, x: torch.bincount(s.argmax(-1), None, EXPERTS), "(expert,)"),
    "running counts": (lambda s, x: counts(s), "(token,): from a running count"),
    "capacity": (
        lambda s, x: (counts(s) - 1)[:, None] == torch.arange(3),
        "(token, capacity slot): set at its capacity slot",
    ),
    "dropped": (
        lambda s, x: torch.where(s.amax(-1) > 0, s.argmax(-1), -1),
        "(token,): numbers of experts, below 0 for none",
    ),
    "without a rule": (lambda s, x: s.topk(SLOTS).indices.cummax(0).values, "(?, ?)"),
}


@pytest.mark.parametrize("way", WORDS)
def test_the_meaning_of_a_value_in_words(way):
    write, words = WORDS[way]
    assert said_of(write) == words


def test_each_line_is_said_once_with_what_it_gives_to_others():
    graph: fx.Graph = trace(subject_of(OverHits().eval())).program.graph
    lines = {line.text: list(line.values) for line in lines_of(graph, meanings_of(graph))}
    assert lines["mask = F.one_hot(indices, num_classes=self.num_experts).permute(2, 1, 0)"] == [
        "(expert, slot, token): set at the chosen expert"
    ]
    assert lines["return self.moe(tokens, weights, indices).view(x.shape)"] == ["(s21, s41, feature)"]
    assert sum("F.gelu" in text for text in lines) == 1


class WithoutRule(Block):
    """An operator that no rule covers."""

    def moe(self, x, weights, indices):
        return x[indices.cummax(0).values].sum(1)


def test_an_operator_without_a_rule_is_named_on_its_line():
    graph = trace(subject_of(WithoutRule().eval())).program.graph
    line = lines_of(graph, meanings_of(graph))[-2]
    assert list(line.lost) == ["`cummax`"]
    assert str(line).endswith("no rule for `cummax`: nothing is known of what its axes run over")
