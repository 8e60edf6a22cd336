"""What is claimed of gates (N, E), against their values: where they are 0, their sign, which of them are listed."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moe_export.export.axes.listing import counted_entries, listing_of
from moe_export.export.axes.support import is_never_negative, support_of

TOKENS, EXPERTS = 7, 5
INF = float("inf")


def written(write):
    """A program that returns its choice, and what it writes of that."""

    def program(scores):
        values, indices = scores.topk(2)
        return indices, write(scores, values, indices)

    return program


def traced(write) -> tuple[fx.Node, fx.Node]:
    """The choice of a program, and what it returns."""
    graph = make_fx(written(write), tracing_mode="fake", pre_dispatch=True)(
        torch.randn(TOKENS, EXPERTS)
    ).graph
    indices, result = graph.output_node().args[0]
    return indices, result


def zeros() -> torch.Tensor:
    return torch.zeros(TOKENS, EXPERTS)


SPARSE = {
    "scattered": lambda s, v, i: zeros().scatter(1, i, v),
    "in place": lambda s, v, i: zeros().scatter_(-1, i, v.sigmoid()),
    "softmax of -inf": lambda s, v, i: torch.full((TOKENS, EXPERTS), -INF).scatter(1, i, v).softmax(1),
    "masked": lambda s, v, i: s * zeros().scatter(1, i, 1.0),
    "one-hot": lambda s, v, i: s.softmax(-1) * F.one_hot(i, EXPERTS).sum(1),
    "weighted one-hot": lambda s, v, i: (F.one_hot(i, EXPERTS) * v[..., None]).sum(1),
    "where": lambda s, v, i: torch.where(zeros().scatter(1, i, 1.0) > 0, s, 0.0),
    "normalised": lambda s, v, i: (g := zeros().scatter(1, i, v.exp())) / (g.sum(1, keepdim=True) + 1e-6),
    "filled": lambda s, v, i: s.masked_fill(~zeros().scatter(1, i, 1.0).bool(), -INF).softmax(-1),
}
OTHERS = {
    "scattered into ones": lambda s, v, i: torch.ones(TOKENS, EXPERTS).scatter(1, i, v),
    "softmax of zeros": lambda s, v, i: zeros().scatter(1, i, v).softmax(-1),
    "softmax over tokens of -inf": lambda s, v, i: (
        torch.full((TOKENS, EXPERTS), -INF).scatter(1, i, v).softmax(0).add(1)
    ),
    "what was not chosen": lambda s, v, i: torch.where(zeros().scatter(1, i, 1.0) > 0, 0.0, s),
    "filled where chosen": lambda s, v, i: s.masked_fill(zeros().scatter(1, i, 1.0).bool(), 0.0),
    "plus one": lambda s, v, i: zeros().scatter(1, i, v) + 1,
    "over tokens": lambda s, v, i: zeros()[:, :2].scatter(0, i % TOKENS, v),
}


@pytest.mark.parametrize("way", SPARSE)
def test_gates_are_0_where_they_are_claimed_to_be(way):
    indices, gates = traced(SPARSE[way])
    assert support_of(gates) is indices
    for seed in range(5):
        scores = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)) * 3
        chosen = zeros().scatter(1, scores.topk(2).indices, 1.0).bool()
        found = written(SPARSE[way])(scores)[1]
        assert (found[~chosen] == 0).all()
        assert found[chosen].ne(0).any()
        if is_never_negative(gates):
            assert (found >= 0).all()


@pytest.mark.parametrize("way", OTHERS)
def test_nothing_is_claimed_of_other_matrices(way):
    assert support_of(traced(OTHERS[way])[1]) is None


@pytest.mark.parametrize(
    ("write", "never"),
    [
        (lambda s, v, i: s.softmax(-1).topk(2).values / (v.abs().sum(1, keepdim=True) + 1e-6), True),
        (lambda s, v, i: zeros().scatter(1, i, v.relu()), True),
        (lambda s, v, i: torch.stack([s.sigmoid(), s.exp()], 1).sum(1) * 2, True),
        (lambda s, v, i: s.clamp(min=0), True),
        (lambda s, v, i: v, False),
        (lambda s, v, i: s.sigmoid() - 1, False),
        (lambda s, v, i: s.sigmoid() * -1, False),
        (lambda s, v, i: torch.add(s.sigmoid(), s.exp(), alpha=-1), False),
        (lambda s, v, i: zeros().scatter(1, i, v), False),
        (lambda s, v, i: s.clamp(max=0), False),
        (lambda s, v, i: torch.full((TOKENS, EXPERTS), -1.0) * s.sigmoid(), False),
    ],
)
def test_what_is_never_negative(write, never):
    assert is_never_negative(traced(write)[1]) is never


@pytest.mark.parametrize(
    ("write", "axes"),
    [
        (lambda s, v, i: zeros().scatter(1, i, v).nonzero(), ("token", "expert")),
        (lambda s, v, i: (zeros().scatter(1, i, v) > 0).nonzero(), ("token", "expert")),
        (lambda s, v, i: zeros().scatter(1, i, v).t().nonzero(), ("expert", "token")),
        (lambda s, v, i: zeros().scatter(1, i, v).t().bool().t().nonzero(), ("token", "expert")),
        (lambda s, v, i: F.one_hot(i, EXPERTS).permute(2, 0, 1).nonzero(), ("expert", "token", "slot")),
        (lambda s, v, i: (i == 3).nonzero(), None),
        (lambda s, v, i: zeros().scatter(1, i, v)[:, 2].nonzero(), None),
    ],
)
def test_what_a_list_holds(write, axes):
    listing = listing_of(traced(write)[1])
    assert (listing.axes if listing is not None else None) == axes
    if listing is None:
        return
    scores = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).abs()
    indices, found = written(write)(scores)
    columns = dict(zip(listing.axes, found.unbind(1), strict=True))
    pairs = set(zip(columns["token"].tolist(), columns["expert"].tolist(), strict=True))
    assert pairs == {(token, expert) for token, row in enumerate(indices.tolist()) for expert in row}


@pytest.mark.parametrize(
    ("write", "column"),
    [
        (lambda m, n, e: n.expand(EXPERTS, TOKENS).masked_select(m.t()), "token"),
        (lambda m, n, e: n[None].expand(EXPERTS, -1).masked_select(m.T.contiguous()), "token"),
        (lambda m, n, e: e[:, None].expand(-1, TOKENS).masked_select(m.t()), "expert"),
        (lambda m, n, e: e.expand(TOKENS, EXPERTS).masked_select(m), "expert"),
        (lambda m, n, e: n[:, None].expand(-1, EXPERTS).masked_select(m), "token"),
        (lambda m, n, e: (n + 1).expand(EXPERTS, TOKENS).masked_select(m.t()), None),
        (lambda m, n, e: n.flip(0).expand(EXPERTS, TOKENS).masked_select(m.t()), None),
        (lambda m, n, e: m.float().masked_select(m), None),
    ],
)
def test_which_number_of_each_pair_a_mask_picks(write, column):
    def picked(s, v, i):
        return write(zeros().scatter(1, i, v) > 0, torch.arange(TOKENS), torch.arange(EXPERTS))

    listing = listing_of(traced(picked)[1])
    assert (listing.column if listing is not None else None) == column
    if listing is None:
        return
    scores = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).abs()
    indices, found = written(picked)(scores)
    pairs = [(token, expert) for token, row in enumerate(indices.tolist()) for expert in row]
    ordered = sorted(pairs, key=lambda pair: [pair[("token", "expert").index(axis)] for axis in listing.axes])
    assert found.tolist() == [pair[("token", "expert").index(column)] for pair in ordered]


@pytest.mark.parametrize(
    ("write", "counts"),
    [
        (lambda g: (g > 0).sum(0), True),
        (lambda g: torch.count_nonzero(g, dim=0), True),
        (lambda g: g.bool().t().long().sum(-1), True),
        (lambda g: g.sum(0), False),
        (lambda g: (g > 0).sum(1), False),
        (lambda g: (g > 0.5).long().sum(0), True),  # of another matrix, that of what is above 0.5
        (lambda g: g.long().sum(0), False),
    ],
)
def test_what_counts_entries(write, counts):
    _, node = traced(lambda s, v, i: write(zeros().scatter(1, i, v.sigmoid())))
    assert (counted_entries(node) is not None) is counts
