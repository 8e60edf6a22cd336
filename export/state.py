"""Buffers that a model changes while it runs: counters, caches, running means.

A graph has no memory: every run starts from the buffers as they were in the file. So does every run of the
original here, or the second one could not be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Buffers:
    """The buffers of a module at one moment.

    Attributes:
        module: Whose buffers they are.
        saved: Owner, name, the tensor object (or None), and a copy of its values.
    """

    module: nn.Module
    saved: tuple[tuple[nn.Module, str, torch.Tensor | None, torch.Tensor | None], ...]

    @staticmethod
    def of(module: nn.Module, names: frozenset[str] | None = None) -> Buffers:
        """Save the buffers of a module; only those of the given names, if any are given."""
        saved = [
            (owner, name, tensor, tensor.detach().clone() if tensor is not None else None)
            for path, owner, name, tensor in _buffers(module)
            if names is None or path in names
        ]
        return Buffers(module, tuple(saved))

    def changed(self) -> frozenset[str]:
        """Paths of the buffers that are no longer what they were."""
        paths = {(id(owner), name): path for path, owner, name, _ in _buffers(self.module)}
        return frozenset(
            paths[id(owner), name]
            for owner, name, tensor, copy in self.saved
            if (id(owner), name) in paths and not _same(owner._buffers[name], tensor, copy)
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Put the same tensor objects back, with the values that they had."""
        for owner, name, tensor, copy in self.saved:
            owner._buffers[name] = tensor
            if tensor is not None and copy is not None:
                tensor.detach().copy_(copy)


def _buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor | None]]:
    for prefix, owner in module.named_modules():
        for name, tensor in owner._buffers.items():
            yield (f"{prefix}.{name}" if prefix else name), owner, name, tensor


def _same(now: torch.Tensor | None, then: torch.Tensor | None, copy: torch.Tensor | None) -> bool:
    if now is None or then is None or copy is None:
        return now is then
    if now.shape != copy.shape or now.dtype != copy.dtype:
        return False
    # Bit for bit, so that a NaN equals itself.
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (now, copy)))
