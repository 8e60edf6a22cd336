"""`weight_attributes_kept`: what a model's code hung on its weights is there while it is traced.

    weight.scale = scale                     in __init__: rows of int8 weights and what multiplies them
    weight.to(x.dtype) * weight.scale        in forward; a trace has another tensor for `weight`, without `scale`

An attribute that is a weight of the model itself is the trace's tensor for that.

Why: `torch.export` swaps tensors of its own for weights and buffers, and takes nothing along that Python code set on
them; there is no hook for that. A patch of `NamedMemberAccessor.swap_tensors_dict`, by which it swaps.

Seen in torch 2.13.0 and 2.14.1 (`torch.nn.utils.stateless._reparametrize_module`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils._named_member_accessor import NamedMemberAccessor

from moe_export.float64 import carry_attributes

_OF_A_TRACE = (FakeTensor, FunctionalTensor)


@contextmanager
def weight_attributes_kept() -> Iterator[None]:
    """While it runs, tensors that a trace has for weights have the attributes that were set on these."""
    original = NamedMemberAccessor.swap_tensors_dict
    # By the id of a trace's tensor: that tensor, which so lives as long as its id is looked up, and the true weight.
    weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def swapped(
        self: Any, named_tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], list[str]]:
        before, missing = original(self, named_tensors, *args, **kwargs)
        pairs = []
        for name, old in before.items():
            new = named_tensors[name]
            if isinstance(old, torch.Tensor) and isinstance(new, _OF_A_TRACE):
                _, weight = weights.get(id(old), (old, old))
                weights[id(new)] = new, weight
                pairs.append((weight, new))
        carry_attributes(pairs)
        return before, missing

    with mock.patch.object(NamedMemberAccessor, "swap_tensors_dict", swapped):
        yield
