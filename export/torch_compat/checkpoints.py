"""`opened`, `offset_of`: tensors of a checkpoint of `torch.save` without their values, and where in the file these are.

Why: PyTorch's page on serialization shows how: a checkpoint that is opened on fake tensors leaves the offset of each
storage in `_checkpoint_offset`. Both names are private, and no public function tells offsets.
Source: https://docs.pytorch.org/docs/stable/notes/serialization.html

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def opened(path: Path) -> Any:
    """What a checkpoint holds, on tensors without values; no code in it is run."""
    with FakeTensorMode():
        return torch.load(path, weights_only=True, map_location="cpu")


def offset_of(tensor: torch.Tensor) -> int | None:
    """The byte of the file at which a tensor's storage begins; None in a file of the old format."""
    found: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return found
