"""A question that a model asks of its tensors comes from the model's line."""

from __future__ import annotations

from typing import Any

import torch
from canaries import canary
from torch.overrides import TorchFunctionMode

MODEL = "/models/asks.py"
CODE = """
from torch import nn

class Asks(nn.Module):
    def forward(self, x):
        return x + 1 if (x > 0).any() else x - 1

class Compares(nn.Module):
    def forward(self, x):
        rows = x[x > 0]
        return rows.sum() if rows.shape[0] > 3 else rows.sum() - 1
"""
MODELS: dict[str, Any] = {"__name__": "asks"}
exec(compile(CODE, MODEL, "exec"), MODELS)  # a file of its own: the modes below are in this one


def is_model(path: str) -> bool:
    return path == MODEL


def canary_frames(what: str):
    return canary(
        "export/torch_compat/frames.py",
        f"between a model's {what} there are frames that hand the question on, only",
        todo="print the frames between the two, and add the function or the file that is new",
    )


def test_canary_a_truth_of_a_tensor_is_asked_by_the_model():
    with canary_frames("`if tensor:` and a function mode"):
        from moe_export.export.torch_compat.frames import asking_frame

        asked = []

        class Answers(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is torch.Tensor.__bool__:
                    asked.append(asking_frame(is_model))
                    return True
                return func(*args, **(kwargs or {}))

        with Answers():
            torch.export.export(MODELS["Asks"](), (torch.ones(2),), strict=False)
        assert asked[-1].f_code.co_name == "forward"


def test_canary_a_condition_on_sizes_is_asked_by_the_model():
    with canary_frames("`if size > 3:` and the tracer"):
        from moe_export.export.torch_compat.frames import asking_frame
        from moe_export.export.torch_compat.sizes import undecided

        asked = []

        def answer(env, expression):
            asked.append(asking_frame(is_model))
            return True

        with undecided(answer):
            torch.export.export(MODELS["Compares"](), (torch.randn(9),), strict=False)
        names = [frame.f_code.co_name for frame in asked if frame is not None]
        assert "forward" in names
