"""The cases of a verification block by block: ids of the whole table, as those of an example choose few experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.dims import Dim
from moe_export.large.layerwise import _plan, _runs
from moe_export.large.layerwise_torch import find_blocks
from moe_export.verify.specs import TensorSpec

ROWS = 50


class Chooses(nn.Module):
    """Token by id, then two layers. `most`: it refuses greater ids than this, though the table has them."""

    def __init__(self, most: int = ROWS) -> None:
        super().__init__()
        self.embed, self.most = nn.Embedding(ROWS, 4), most
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        if int(ids.max()) > self.most:
            raise ValueError("no such token")
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Inputs:
    """What a cut graph says of its inputs."""

    def specs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("ids", "int64", ("batch", "sequence")),)


@pytest.mark.parametrize(("most", "greatest"), [(ROWS, ROWS - 1), (5, 4)])
def test_ids_are_those_of_the_table_or_of_the_example(most: int, greatest: int) -> None:
    ids = torch.arange(5).view(1, 5)
    subject = make_subject(Chooses(most), (ids,), {}, source=Path(__file__), how="a test")
    dims = (Dim("batch", "s0", 1, 1, None), Dim("sequence", "s1", 5, 1, None))
    plan = _plan(Inputs(), subject.inputs, dims, 0)  # type: ignore[arg-type]
    blocks = find_blocks(subject.module)
    (first, ran), (second, _) = _runs(subject, plan, blocks)
    assert first.inputs["ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert ran.tables == {"ids": (0, ROWS - 1)}
    assert second.inputs["ids"].size > 300
    assert second.inputs["ids"].max() == greatest
