"""What is changed while a model is traced is as it was afterwards."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from torch import fx, nn

from moe_export.export import trace
from moe_export.export.tracing.idioms import traceable_idioms, user_lines


def test_everything_is_put_back():
    before = (builtins.len, fx.proxy.TracerBase._filter_traceback_frames)
    with traceable_idioms(), user_lines():
        assert builtins.len is not before[0]
        assert len([1, 2]) == 2
        assert len(torch.ones(3, 2)) == 3
    assert (builtins.len, fx.proxy.TracerBase._filter_traceback_frames) == before
    with pytest.raises(RuntimeError), traceable_idioms():
        raise RuntimeError
    assert builtins.len is before[0]


def test_plain_calls_are_not_changed():
    with traceable_idioms():
        assert torch.equal(
            nn.functional.one_hot(torch.tensor([0, 2]), 3), torch.tensor([[1, 0, 0], [0, 0, 1]])
        )
        assert [part.shape[0] for part in torch.ones(5).chunk(4)] == [2, 2, 1]
        with pytest.raises(TypeError):
            len(torch.tensor(1.0))


class Chunked(nn.Module):
    """Chunks that are not alike: with another number of them, other values."""

    def __init__(self, chunks):
        super().__init__()
        self.chunks = chunks

    def forward(self, x):
        return torch.cat([part * (1 + k) for k, part in enumerate(x.chunk(self.chunks, 1))], 1)


@pytest.mark.parametrize("chunks", [2, 4, pytest.param(128, marks=pytest.mark.slow)])
def test_a_graph_of_chunks_claims_the_lengths_with_as_many_chunks(tools, chunks):
    graph = tools.graph(Chunked(chunks), torch.randn(2, 11, 3))
    batch, length, _ = graph.traced.inputs["x"]
    assert isinstance(batch, str)
    assert isinstance(length, str) == (chunks < 128)
    for size in range(2, 30):
        if size == length or (
            isinstance(length, str) and graph.traced.domain.holds({batch: 3, length: size})
        ):
            tools.equal(graph, torch.randn(3, size, 3))
    assert length == 11 or graph.traced.domain.holds({batch: 3, length: 11})


class Counted(nn.Module):
    """How many tokens each expert has, as a tensor made of `len`."""

    def forward(self, x):
        rows = [torch.where(x.argmax(-1) == expert)[0] for expert in range(3)]
        return x.new_tensor([len(each) for each in rows]), torch.tensor([x.shape[0], len(rows[0]), 7])


def test_tensors_are_made_of_numbers_that_a_trace_does_not_know(tools):
    graph = tools.graph(Counted(), torch.randn(8, 3))
    for tokens in (1, 2, 8, 40):
        tools.equal(graph, torch.randn(tokens, 3))
    with traceable_idioms():
        assert torch.tensor([1, 2]).dtype is torch.int64
        assert torch.equal(torch.ones(1).new_tensor([[1, 2]]), torch.tensor([[1.0, 2.0]]))


def test_experts_of_transformers_take_the_way_that_traces_and_are_put_back():
    from transformers import MixtralConfig
    from transformers.integrations import moe
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=4)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    before = moe.ExpertsInterface.get_interface
    with traceable_idioms():
        found = moe.ALL_EXPERTS_FUNCTIONS.get_interface(block.experts.config._experts_implementation, None)
        assert found is moe.batched_mm_experts_forward
    assert moe.ExpertsInterface.get_interface is before


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_size_are_rows_added_up(mode):
    bags = nn.EmbeddingBag(9, 4, mode=mode)
    indices, weights = torch.randint(0, 9, (3, 5)), torch.rand(3, 5) if mode == "sum" else None
    expected = bags(indices, per_sample_weights=weights)
    with traceable_idioms():
        program = torch.export.export(
            bags, (indices,), {"per_sample_weights": weights} if mode == "sum" else {}, strict=False
        )
    assert not any("embedding_bag" in str(node.target) for node in program.graph.nodes)
    found = program.module()(indices, **({"per_sample_weights": weights} if mode == "sum" else {}))
    torch.testing.assert_close(found, expected)


def test_grouped_mm_is_each_row_times_its_own_matrix():
    rows, stack = torch.randn(7, 4), torch.randn(3, 4, 5)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    with traceable_idioms():
        found = nn.functional.grouped_mm(rows, stack, offs=ends)
        assert torch.equal(found, torch._grouped_mm(rows, stack, ends))
    expected = torch.cat([rows[:2] @ stack[0], rows[2:] @ stack[2]])
    torch.testing.assert_close(found, expected)


def test_a_module_that_casts_itself_to_what_it_is_stays_as_it_is():
    layer = nn.Linear(2, 2)
    weight = layer.weight
    with traceable_idioms():
        assert layer.to(torch.float32) is layer
        assert layer.to("cpu") is layer.to(torch.device("cpu"), torch.float32, non_blocking=True) is layer
        assert layer.to(weight) is layer.to(device="cpu") is layer
        assert layer.weight is weight
        assert layer.to("meta").weight.is_meta
        layer = nn.Linear(2, 2)
        weight = layer.weight
        assert layer.to(torch.ones(1, dtype=torch.float64)).weight.dtype is torch.float64
        layer = nn.Linear(2, 2)
        weight = layer.weight
        assert layer.weight is weight
        assert layer.to(torch.float64).weight.dtype is torch.float64


class Blocks(nn.Module):
    """Rows in blocks of at most 128, in several layers one after another, as ghost batch norms have them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            blocks = x.chunk(int(np.ceil(x.shape[0] / 128)), 0)
            x = torch.cat([layer(block) for block in blocks])
        return x


def test_how_many_chunks_there_are_is_a_number_and_no_size(tools):
    """As sizes, the numbers of all layers stand within one another, and the tracer needs minutes for six layers."""
    traced = trace(tools.subject(Blocks(), torch.randn(5, 4)))
    shapes = [node.meta["val"].shape for node in traced.program.graph.nodes if node.name.startswith("linear")]
    assert len({str(shape) for shape in shapes}) == 1
    assert [dim.name for dim in traced.dims] == ["batch"]


class TakenAlong(nn.Module):
    """The largest two of each row, the same of each plane, and the numbers of all entries in one order."""

    def forward(self, x):
        rows = x.take_along_dim(x.topk(2, -1).indices, -1)
        planes = torch.take_along_dim(x, x.mean(-1, keepdim=True).topk(2, 1).indices, dim=1)
        return rows, planes, torch.take_along_dim(x, x.argmax())


def test_entries_are_taken_along_an_axis_at_any_sizes(tools):
    graph = tools.graph(TakenAlong(), torch.randn(2, 5, 3))
    assert all(isinstance(size, str) for size in graph.traced.inputs["x"])
    for sizes in ((1, 2, 3), (4, 9, 6)):
        tools.equal(graph, torch.randn(*sizes))


class SqueezedRows(nn.Module):
    """Rows that only the data counts: `squeeze` without an axis leaves theirs, even if there is one."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(3, 3)

    def forward(self, x):
        rows = (x.sum(-1) > 0).nonzero().squeeze()
        out = torch.zeros_like(x)
        out[rows] = self.expert(x[rows])
        return out


def test_one_row_of_those_that_the_data_picks_is_still_a_row(tools):
    graph = tools.graph(SqueezedRows(), torch.tensor([[1.0, 2, 3], [-1, -2, -3], [4, 5, 6], [7, 8, 9]]))
    for picked in ([], [0], [2], [1, 3], [0, 1, 2, 3]):
        x = -torch.ones(4, 3)
        x[picked] = torch.tensor([1.0, 2.0, 3.0])
        tools.equal(graph, x)
