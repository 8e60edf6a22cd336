"""What a graph is compared with: the model is traced only where an output may be expert indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from torch import Tensor, nn

from moe_export.comparing import matching
from moe_export.export.frontend.subject import Subject, make_subject


class Router(nn.Module):
    """Weights (b, k) and indices (b, k), as integers, as floats or not at all."""

    def __init__(self, indices: str) -> None:
        super().__init__()
        self.scores, self.indices = nn.Linear(4, 6), indices

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights, chosen = torch.topk(self.scores(x).softmax(-1), 2)
        if self.indices == "none":
            return (weights,)
        return weights, chosen if self.indices == "integers" else chosen.float()


def subject_of(indices: str) -> Subject:
    inputs = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)
    return make_subject(Router(indices).eval(), inputs, {}, source=Path(__file__), how="a test")


def reference(subject: Subject) -> matching.Reference:
    return matching.reference_of(subject, cast(Any, None), {})


def test_without_whole_numbers_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(subject: Subject) -> NoReturn:
        raise AssertionError("traced")

    monkeypatch.setattr(matching, "trace", refuse)
    subject = subject_of("none")
    found = reference(subject)
    assert found.subject is subject
    assert not found.routing


@pytest.mark.parametrize("indices", ["integers", "floats"])
def test_indices_are_found_in_the_trace_whatever_type_they_have(indices: str) -> None:
    subject = subject_of(indices)
    assert list(reference(subject).routing) == [(subject.outputs[1], subject.outputs[0], None)]
