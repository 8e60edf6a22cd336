"""`len` of a tensor stays a function of its size."""

from __future__ import annotations

import builtins

import torch
from canaries import canary
from torch import nn


class Mean(nn.Module):
    def forward(self, x):
        return x.sum(0) / len(x)


def test_canary_len_is_a_symbol_in_a_trace():
    with canary(
        "export/torch_compat/length.py",
        "a trace in which `len` gives `shape[0]` is right at every size",
        todo="see whether torch.export keeps `len(x)` symbolic by itself; if so, this file can go",
    ):
        from moe_export.export.torch_compat.length import symbolic_length

        before = builtins.len
        free = ({0: torch.export.Dim.DYNAMIC},)
        with symbolic_length():
            program = torch.export.export(Mean(), (torch.ones(4, 2),), dynamic_shapes=free)
            assert len([1, 2]) == 2
        assert builtins.len is before
        assert program.module()(torch.ones(6, 2)).tolist() == [1, 1]


def test_a_list_of_a_trace_is_as_long_as_its_shape_says():
    from moe_export.export.torch_compat.length import TracedList, symbolic_length

    class Rows(TracedList):
        shape = ("rows",)

    with symbolic_length():
        assert len(Rows()) == "rows"


def test_canary_it_is_still_needed():
    with canary(
        "export/torch_compat/length.py",
        "torch.export fixes a size that `len` is asked for",
        todo="torch.export keeps `len(x)` symbolic by itself now: this file can go once older versions are no longer "
        "supported",
    ):
        free = ({0: torch.export.Dim.AUTO},)
        program = torch.export.export(Mean(), (torch.ones(4, 2),), dynamic_shapes=free)
        node = next(node for node in program.graph.nodes if node.op == "placeholder")
        assert str(node.meta["val"].shape[0]) == "4"
