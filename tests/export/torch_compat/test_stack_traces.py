"""A traced node knows the lines of the functions that a `forward` calls."""

from __future__ import annotations

import traceback
from collections import Counter

import torch
from canaries import canary
from torch import fx, nn
from torch.utils._traceback import CapturedTraceback

from moe_export.export.torch_compat.stack_traces import frames_read_once


def gate(x):
    return x.sigmoid()


class Gated(nn.Module):
    def forward(self, x):
        return x * gate(x)


def test_canary_other_frames_are_kept():
    with canary(
        "export/torch_compat/stack_traces.py",
        "TracerBase._filter_traceback_frames is asked which frames go into node.meta['stack_trace']",
        todo="see create_node in torch/fx/proxy.py for what it asks now",
    ):
        from moe_export.export.torch_compat.stack_traces import kept_frames

        before = fx.proxy.TracerBase._filter_traceback_frames

        def keep(kept, frames):
            assert {frame.name for frame in kept} <= {frame.name for frame in frames}
            return [frame for frame in frames if frame.filename == __file__]

        with kept_frames(keep):
            program = torch.export.export(Gated(), (torch.ones(2),), strict=False)
        assert fx.proxy.TracerBase._filter_traceback_frames is before
        sigmoid = next(node for node in program.graph.nodes if node.target is torch.ops.aten.sigmoid.default)
        assert "in gate" in sigmoid.meta["stack_trace"]
        assert "in forward" in sigmoid.meta["stack_trace"]


def lines(program):
    return [node.meta.get("stack_trace") for node in program.graph.nodes]


def test_frames_that_are_read_once_are_the_same_frames(monkeypatch):
    """Of a deep call, with comprehensions and lambdas on one line, and a line that is run by several functions."""

    class Deep(nn.Module):
        def forward(self, x, depth=0):
            parts = [gate(x) for _ in range(2)]
            halved = {"half": lambda y: gate(y) / 2}["half"](x)
            return halved + sum(parts) + (self.forward(x * 2, depth + 1) if depth < 3 else x)

    def exported():
        return lines(torch.export.export(Deep(), (torch.ones(2),), strict=False))

    wanted = exported()
    read = Counter()
    original = traceback.FrameSummary.__init__

    def counted(self, filename, line, name, **others):
        read[filename, line, name] += not others  # the tracer's own are made with what was looked up
        original(self, filename, line, name, **others)

    with frames_read_once():
        monkeypatch.setattr(traceback.FrameSummary, "__init__", counted)
        assert exported() == wanted
    assert sum(read.values()) > 20
    assert read[gate.__code__.co_filename, gate.__code__.co_firstlineno + 1, "gate"] == 1


def test_canary_frames_are_made_by_one_function():
    with canary(
        "export/torch_compat/stack_traces.py",
        "CapturedTraceback.summary has _extract_symbolized_tb make the frames of dicts, innermost first",
        todo="traces are slower and as right: see where torch/utils/_traceback.py makes them now",
    ):
        wanted = CapturedTraceback.extract().summary()
        with frames_read_once():
            found = CapturedTraceback.extract().summary()
            assert found[-2] is CapturedTraceback.extract().summary()[-2]
        assert [(each.filename, each.name) for each in found] == [
            (each.filename, each.name) for each in wanted
        ]
        assert [each.line for each in found[:-1]] == [each.line for each in wanted[:-1]]
