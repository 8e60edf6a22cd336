"""The one private name of PyTorch that `verify` needs is what it is taken for."""

from __future__ import annotations

from typing import Any

import torch
from canaries import canary

from moe_export.verify.torch_compat import leaves


def test_canary_a_mode_sees_and_answers_operators():
    with canary(
        "verify/torch_compat.py",
        "torch.utils._python_dispatch.TorchDispatchMode is called in the place of each ATen operator",
        todo="take the class that docs.pytorch.org/docs/stable/notes/extending.html now names; "
        "export/torch_compat/dispatch.py has the same line",
    ):
        from moe_export.verify.torch_compat import OperatorMode

        class Reversed(OperatorMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                return (
                    type(result)(value.flip(-1) for value in result)
                    if func is torch.ops.aten.topk.default
                    else result
                )

        x = torch.tensor([1.0, 3.0, 2.0])
        with Reversed():
            values, indices = x.topk(2)
        assert values.tolist() == [2.0, 3.0]
        assert indices.tolist() == [2, 1]


def test_the_leaves_of_what_an_operator_takes():
    assert list(leaves(((1, [2, None]), {"a": (3,), "b": 4}))) == [1, 2, None, 3, 4]
