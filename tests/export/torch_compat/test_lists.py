"""`tolist` of a traced tensor can be answered."""

from __future__ import annotations

import torch
from canaries import canary
from torch import nn


class Picked(nn.Module):
    def forward(self, x):
        rows = torch.where(x > 0)[0]
        return x[rows.tolist()]


def test_canary_a_list_is_answered():
    with canary(
        "export/torch_compat/lists.py",
        "`tolist` of a traced tensor gives the answer, and that of other tensors is their own",
        todo="see which class a traced tensor has now, and where its `tolist` is",
    ):
        from moe_export.export.torch_compat.lists import lists_answered

        asked = []

        def answer(tensor):
            asked.append(tensor)
            return tensor

        with lists_answered(answer):
            program = torch.export.export(Picked(), (torch.tensor([1.0, -1.0, 2.0]),))
            assert torch.tensor([1, 2]).tolist() == [1, 2]
        assert len(asked) == 1
        assert program.module()(torch.tensor([-3.0, 3.0, -1.0])).tolist() == [3]


def test_canary_it_is_still_needed():
    with canary(
        "export/torch_compat/lists.py",
        "torch.export cannot trace `tolist` of a number of elements that only the data knows",
        todo="torch.export does so by itself now: this file can go once older versions are no longer supported",
    ):
        try:
            torch.export.export(Picked(), (torch.tensor([1.0, -1.0, 2.0]),))
        except Exception as error:
            assert "data-dependent" in str(error)  # noqa: PT017
        else:
            raise AssertionError("it is traced")
