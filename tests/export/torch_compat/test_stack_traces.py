"""A traced node knows the lines of the functions that a `forward` calls."""

from __future__ import annotations

import torch
from canaries import canary
from torch import fx, nn


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
