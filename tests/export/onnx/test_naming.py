"""Nodes are called after modules, values after the variables of the model's code, and einsums are told."""

from __future__ import annotations

import torch
from torch import nn

from moe_export.export.onnx import naming


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        hidden = self.proj(x)
        gated = self.act(hidden) * hidden.exp()
        top, place = torch.topk(gated, 2)
        for _ in range(2):
            top = top.tanh()
        scores = torch.einsum(
            "bk,bd->bkd",
            top,
            gated,
        )
        return scores.sum((1, 2)), place


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        first, places = self.layers[0](x)
        mixed = x * first.unsqueeze(-1)
        second, _ = self.layers[1](mixed)
        return second.sqrt(), places


def test_modules_and_variables(tools):
    model = tools.graph(Model(), torch.randn(3, 4)).model
    names = [node.name for node in model.graph]
    values = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    layer = [name.removeprefix("layers.0.") for name in names if name.startswith("layers.0.")]
    assert layer[0].startswith("proj.linear")
    assert {"act.silu", "exp", "mul", "topk", "tanh", "tanh_1", "sum"} <= set(layer)
    for index in (0, 1):
        for variable in ("hidden", "gated", "top", "top_1", "scores"):
            assert f"layers.{index}.{variable}" in values
    assert "mixed" in values
    assert not any(name.startswith(("node_", "val_")) for name in (*names, *values))


class Swapped(nn.Module):
    """Variables that one expression gives, in another order than they are computed in."""

    def forward(self, x):
        weights, places = [each * 3 for each in torch.topk(x, 2)][::-1]
        last, first = [function(x) for function in (torch.sin, torch.cos)][::-1]
        sinh, cosh = x.sinh(), x.cosh()
        top, at = torch.topk(sinh - cosh, 2)
        return weights + 2, places * 2.5, last * 2, first + 1, sinh * 2, cosh * 2, top * 2, at + 1


def test_a_value_has_no_name_of_another(tools):
    model = tools.graph(Swapped(), torch.randn(3, 4)).model
    names = {
        (node.op_type, place): value.name for node in model.graph for place, value in enumerate(node.outputs)
    }
    assert (names["Sinh", 0], names["Cosh", 0]) == ("sinh", "cosh")
    assert {("top", "at"), ("topk.0", "topk.1")} == {
        tuple(value.name for value in node.outputs) for node in model.graph if node.op_type == "TopK"
    }
    assert not {"weights", "places", "last", "first"} & set(names.values())


def test_an_einsum_is_told_on_what_it_became(tools):
    model = tools.graph(Block(), torch.randn(3, 4)).model
    told = {node.metadata_props.get("einsum") for node in model.graph}
    assert told == {None, "bk,bd->bkd"}


def test_an_unreadable_file_has_no_variables(tmp_path):
    assert naming._statement(str(tmp_path / "gone.py"), 3) == (3, (), True)
    broken = tmp_path / "broken.py"
    broken.write_text("def (", encoding="utf-8")
    assert naming._statement(str(broken), 1) == (1, (), True)
