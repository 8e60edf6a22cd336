"""A checkpoint says where its tensors stand."""

from __future__ import annotations

import torch
from canaries import canary


def test_canary_offsets_lead_to_the_values(tmp_path):
    with canary(
        "export/torch_compat/checkpoints.py",
        "torch.load under FakeTensorMode leaves `_checkpoint_offset` on storages",
        todo="see https://docs.pytorch.org/docs/stable/notes/serialization.html for how a checkpoint tells offsets now",
    ):
        from moe_export.export.torch_compat.checkpoints import offset_of, opened

        values = torch.arange(5, dtype=torch.float32)
        path = tmp_path / "weights.pt"
        torch.save({"first": torch.ones(3), "second": values}, path)
        found = opened(path)["second"]
        assert found.shape == (5,)
        start = offset_of(found)
        assert path.read_bytes()[start : start + 20] == values.numpy().tobytes()
