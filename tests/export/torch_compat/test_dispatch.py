"""Every operator that runs is seen, and can be answered in another way."""

from __future__ import annotations

from typing import Any

import torch
from canaries import canary

FILE = "export/torch_compat/dispatch.py"


def test_canary_a_mode_sees_operators_below_the_functions_that_python_calls():
    with canary(
        FILE,
        "torch.utils._python_dispatch.TorchDispatchMode is called in the place of each ATen operator",
        todo="take the class that docs.pytorch.org/docs/stable/notes/extending.html now names; "
        "verify/torch_compat.py has the same line",
    ):
        from moe_export.export.torch_compat.dispatch import OperatorMode

        class Doubling(OperatorMode):
            def __init__(self) -> None:
                super().__init__()
                self.seen: list[str] = []

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.seen.append(str(func))
                result = func(*args, **(kwargs or {}))
                return 2 * result if func is torch.ops.aten.addmm.default else result

        x, layer = torch.ones(2, 3), torch.nn.Linear(3, 4)
        with torch.no_grad():
            plain = layer(x)
            with Doubling() as mode:
                doubled = layer(x)
        assert "aten.addmm.default" in mode.seen
        assert torch.equal(doubled, 2 * plain)


def test_canary_modes_can_be_left_within_a_trace():
    class Peeks(torch.nn.Module):
        def forward(self, x):
            from moe_export.export.torch_compat.dispatch import no_modes

            with no_modes():
                factor = float(torch.full((2,), 1.5).sum())
            return x * factor

    with canary(
        FILE,
        "torch.utils._python_dispatch._disable_current_modes lets real tensors be computed within a trace",
        todo="find what torch/fx/experimental/proxy_tensor.py enters where it leaves a trace for a moment",
    ):
        program = torch.export.export(Peeks(), (torch.ones(2),))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets == ["aten.mul.Tensor"]
        assert torch.equal(program.module()(torch.ones(2)), torch.full((2,), 3.0))
