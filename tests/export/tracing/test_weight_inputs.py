"""Weights are told from inputs by the program's signature, whatever they are called."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moe_export.export.tracing.trace import quiet, trace
from moe_export.export.tracing.weight_inputs import is_weight, with_weights_marked


class Named(nn.Module):
    """Its inputs are called as `torch.export` calls weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("shift", torch.ones(4), persistent=False)
        self.constant = torch.full((4,), 2.0)

    def forward(self, p_x, b_mask, c_state):
        return (self.linear(p_x) * self.scale + self.shift) * b_mask + c_state * self.constant


def weights_of(graph):
    return [node.name for node in graph.nodes if is_weight(node)]


def test_the_signature_says_what_is_a_weight():
    inputs = tuple(torch.ones(2, 4) for _ in range(3))
    with quiet():
        program = torch.export.export(Named(), inputs, strict=False).run_decompositions({})
    assert not weights_of(program.graph)
    marked = with_weights_marked(program)
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    assert names[-3:] == ["p_x", "b_mask", "c_state"]
    assert weights_of(marked.graph) == names[:-3]
    assert len(names) == 8
    with quiet():
        assert weights_of(copy.deepcopy(marked.graph_module).graph) == names[:-3]


def test_a_trace_has_them_marked(tools):
    traced = trace(tools.subject(Named(), *(torch.ones(2, 4) for _ in range(3))))
    own = set(weights_of(traced.program.graph))
    inputs = set(traced.program.graph_signature.user_inputs)
    assert len(own) == 5
    assert len(inputs) == 3
    assert not own & inputs
