"""A traced node knows the lines of the functions that a `forward` calls."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from canaries import canary
from torch import fx, nn
from torch.utils._traceback import CapturedTraceback

from moe_export.export.torch_compat.stack_traces import frames_read_once, kept_frames


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


def all_frames():
    """Let the tracer keep every frame."""
    return mock.patch.object(fx.proxy.TracerBase, "_filter_traceback_frames", lambda self, frames: frames)


def exported_lines(model):
    return lines(torch.export.export(model, (torch.ones(2),), strict=False))


class Deep(nn.Module):
    """Calls itself, with comprehensions and lambdas on one line, and a line that is run by several functions."""

    def forward(self, x, depth=0):
        parts = [gate(x) for _ in range(2)]
        halved = {"half": lambda y: gate(y) / 2}["half"](x)
        return halved + sum(parts) + (self.forward(x * 2, depth + 1) if depth < 3 else x)


def test_frames_that_are_read_once_are_the_same_frames(monkeypatch):
    wanted = exported_lines(Deep())
    read = Counter()
    original = traceback.FrameSummary.__init__

    def counted(self, filename, line, name, **others):
        read[filename, line, name] += not others  # the tracer's own are made with what was looked up
        original(self, filename, line, name, **others)

    with frames_read_once():
        monkeypatch.setattr(traceback.FrameSummary, "__init__", counted)
        assert exported_lines(Deep()) == wanted
    assert sum(read.values()) > 20
    assert read[gate.__code__.co_filename, gate.__code__.co_firstlineno + 1, "gate"] == 1


def test_the_text_of_a_stack_is_pytorchs_own():
    """Calls, comprehensions, a call over several lines, a line that goes on, code without a file, equal code twice."""

    class Written(nn.Module):
        def forward(self, x):
            y = sum(
                gate(part)
                for part in (x, x * 2)
            ) \
                + torch.relu(x)  # fmt: skip
            for function in functions:
                y = function(y)
            return torch.cat([each.exp() for each in (y, y)])

    source = "def double(x):\n    return x + x\n"
    functions = []
    for name in ("<made>", "one.py", "other.py"):
        namespace = {}
        exec(compile(source, name, "exec"), namespace)
        functions.append(namespace["double"])

    found = []
    for how in (frames_read_once, nullcontext):
        with all_frames(), how():
            found.append([text or "" for text in exported_lines(Written())])
    texts, wanted = found
    assert texts == wanted
    assert sum(text.count("in forward") for text in texts) > 6
    for name in ("<made>", "one.py", "other.py"):
        assert any(f'File "{name}", line 2, in double' in text for text in texts)
    assert any("    gate(part)" in text and "in <genexpr>" in text for text in texts)


def test_canary_a_tracer_reads_the_stack_of_a_node():
    with canary(
        "export/torch_compat/stack_traces.py",
        "TracerBase.create_node calls CapturedTraceback.extract().summary(), of torch.fx.proxy",
        todo="traces are slower and as right: see where torch/fx/proxy.py reads the stack now",
    ):
        assert fx.proxy.CapturedTraceback is CapturedTraceback
        wanted = CapturedTraceback.extract().summary()
        with frames_read_once():
            assert fx.proxy.CapturedTraceback is not CapturedTraceback
            found = fx.proxy.CapturedTraceback.extract().summary()
            asked = mock.patch.object(fx.proxy.CapturedTraceback, "extract", side_effect=ValueError("asked"))
            with asked, pytest.raises(ValueError, match="asked"):
                exported_lines(Gated())
        assert fx.proxy.CapturedTraceback is CapturedTraceback
        assert [(each.filename, each.name) for each in found] == [
            (each.filename, each.name) for each in wanted
        ]
        assert [each.line for each in found[:-1]] == [each.line for each in wanted[:-1]]
