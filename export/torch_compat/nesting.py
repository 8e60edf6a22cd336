"""`pytree`: nested arguments and results as a flat list of leaves with a structure, and back.

Why: `torch.export` and `torch.onnx.export` take nested arguments apart by `torch.utils._pytree`, and so must we, to
name the leaves in the same order. PyTorch registers its own and its users' classes there: `register_dataclass` is
public, looking up what is registered is not.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from torch.utils import _pytree as pytree

__all__ = ["pytree"]
