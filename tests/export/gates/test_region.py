"""What a part of a graph depends on, from a node on."""

from __future__ import annotations

import torch
from torch import nn

from moe_export.export.gates.region import ancestors


class Layers(nn.Module):
    def forward(self, x, y):
        for _ in range(4):
            y = y.sin()
            x = x * y.cos() + x.tanh()
        return x


def test_what_lies_before_a_node_is_left_out_of_what_others_depend_on():
    program = torch.export.export(Layers(), (torch.ones(2), torch.ones(2)))
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    place = {node: number for number, node in enumerate(nodes)}
    for result in nodes:
        whole = ancestors([result])
        for since in nodes:
            later = {node for node in whole if place[node] >= place[since]}
            assert ancestors([result], since=since) == later
