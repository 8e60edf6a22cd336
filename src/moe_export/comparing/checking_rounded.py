"""A model with only its weights rounded to a narrower type: the least error that half precision costs it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moe_export.export.frontend.subject import Subject
from moe_export.verify import Array, TorchRunner


class RoundedRunner:
    """A model with rounded weights, which computes in its own types; the weights are copied at the first run.

    Args:
        subject: The model.
        outputs: Names for its outputs, in order.
        dtype: The type that its float weights are rounded to, `float16` or `bfloat16`.
    """

    def __init__(self, subject: Subject, outputs: Sequence[str], dtype: str) -> None:
        self.name = f"torch, weights rounded to {dtype}"
        self._subject, self._outputs = subject, outputs
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._runner: TorchRunner | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        if self._runner is None:
            subject = self._subject.of(_rounded(copy.deepcopy(self._subject.module), self._dtype))
            self._runner = TorchRunner(subject.call_named, self._outputs, self.name)
        return self._runner.run(inputs)


def _rounded(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for weight in module.parameters():
            parts = torch.view_as_real(weight) if weight.is_complex() else weight
            if parts.is_floating_point():
                parts.copy_(parts.to(dtype).to(parts.dtype))
    return module
