"""What a mask selects, as `one_hot_mask_of` reads it, against the mask's values."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from moe_export.export.axes.one_hot import OneHotMask, one_hot_mask_of

EXPERTS = 5


def outputs_of(write, *given):
    """What a function returns, as nodes of its trace, and as values."""
    graph = make_fx(write, tracing_mode="fake", pre_dispatch=True)(*given).graph
    results = write(*given)
    nodes = graph.output_node().args[0]
    several = isinstance(results, tuple)
    return list(nodes) if several else [nodes], results if several else (results,), graph


def chosen(tokens: int = 4, slots: int = 2) -> torch.Tensor:
    scores = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    return scores.topk(slots).indices


def meaning(mask: OneHotMask, indices: torch.Tensor) -> torch.Tensor:
    """The values of a mask, by its claim alone: for each entry, the tokens, slots and experts that it runs over."""
    grid = indices if indices.dim() == 2 else indices[:, None]
    pairs = F.one_hot(grid, EXPERTS).bool()
    axes = [axis for axis in ("token", "slot", "expert") if axis in mask.axes]
    if mask.expert is not None:
        pairs = pairs[..., mask.expert : mask.expert + 1]
    for place, axis in reversed(list(enumerate(("token", "slot", "expert")))):
        if axis not in mask.axes:
            pairs = pairs.any(place)
    return pairs.permute([axes.index(axis) for axis in mask.axes if axis != "one"])


WAYS = {
    "compared with a numbering": lambda idx: idx[..., None] == torch.arange(EXPERTS),
    "the numbering first": lambda idx: torch.arange(EXPERTS)[None, None] == idx.unsqueeze(-1),
    "from 0 by 1": lambda idx: idx.view(*idx.shape, 1) == torch.arange(0, EXPERTS, 1),
    "an axis of experts first": lambda idx: (idx[..., None] == torch.arange(EXPERTS)).permute(2, 0, 1),
    "one choice": lambda idx: idx[:, :1] == torch.arange(EXPERTS),
    "one choice without its axis": lambda idx: idx[:, 0].unsqueeze(1) == torch.arange(EXPERTS),
    "one-hot": lambda idx: F.one_hot(idx, EXPERTS),
    "scattered": lambda idx: torch.zeros(idx.shape[0], EXPERTS).scatter(1, idx, 1),
    "one expert": lambda idx: idx == 3,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_a_mask_means_what_it_is_read_as(way, tokens):
    indices = chosen(tokens)
    (node,), (value,), graph = outputs_of(WAYS[way], indices)
    mask = one_hot_mask_of(node)
    assert mask is not None
    (given,) = (each for each in graph.nodes if each.op == "placeholder")
    source = indices if mask.indices is given else fx.Interpreter(_until(graph, mask.indices)).run(indices)
    assert torch.equal(meaning(mask, source), value.bool())


def _until(graph: fx.Graph, node: fx.Node) -> fx.GraphModule:
    """The part of a graph that computes one node."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for each in graph.nodes:
        if each.op != "output":
            copies[each] = part.node_copy(each, lambda source: copies[source])
    part.output(copies[node])
    return fx.GraphModule(torch.nn.Module(), part)


def test_each_mask_of_a_loop_over_masks_is_that_of_one_expert():
    def masks(idx):
        return tuple((idx[..., None] == torch.arange(EXPERTS)).permute(2, 0, 1))

    indices = chosen()
    nodes, values, _ = outputs_of(masks, indices)
    for expert, (node, value) in enumerate(zip(nodes, values, strict=True)):
        mask = one_hot_mask_of(node)
        assert mask is not None
        assert (mask.expert, mask.axes) == (expert, ("token", "slot"))
        assert torch.equal(meaning(mask, indices), value)


NONE = {
    "a numbering from 1": lambda idx: idx[..., None] == torch.arange(1, EXPERTS + 1),
    "by 2": lambda idx: idx[..., None] == torch.arange(0, 2 * EXPERTS, 2),
    "down": lambda idx: idx[..., None] == torch.arange(EXPERTS - 1, -1, -1),
    "other numbers": lambda idx: idx[..., None] == torch.tensor([0, 2, 1, 4, 3]),
    "unequal": lambda idx: idx[..., None] != torch.arange(EXPERTS),
    "the slots against their numbers": lambda idx: idx == torch.arange(2),
    "tokens against their numbers": lambda idx: idx[None] == torch.arange(4)[:, None, None],
    "floats": lambda idx: idx.float()[..., None] == torch.arange(EXPERTS),
}


@pytest.mark.parametrize("way", NONE)
def test_what_is_no_one_hot_mask_is_not_read_as_one(way):
    (node,), _, _ = outputs_of(NONE[way], chosen())
    assert one_hot_mask_of(node) is None


def test_one_of_several_tokens_is_no_expert():
    """Masks taken apart by tokens, not by experts."""
    nodes, _, _ = outputs_of(lambda idx: tuple(idx[..., None] == torch.arange(EXPERTS)), chosen())
    assert [one_hot_mask_of(node) for node in nodes] == [None] * 4
