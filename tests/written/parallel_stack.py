"""A stack of experts whose routing the input decides, and its export for several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_export.cli import run

LAYERS, EXPERTS, WIDTH, INNER = 2, 6, 8, 16
STACK = f"""
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)

class Moe(nn.Module):
    '''The first features of a token are its logits, so that an input decides where it goes.'''

    def __init__(self, experts={EXPERTS}, width={WIDTH}, inner={INNER}):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, inner, width) / 3)
        self.down = nn.Parameter(torch.randn(experts, width, inner) / 3)
        self.shared = nn.Linear(width, width)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        scores = tokens[:, : len(self.up)].softmax(-1)
        weights, indices = scores.topk(2, dim=-1)
        rows = torch.einsum("nkfh,nh->nkf", self.up[indices], tokens)
        rows = torch.einsum("nkhf,nkf->nkh", self.down[indices], F.silu(rows))
        out = (rows * weights.unsqueeze(-1)).sum(1)
        return (out + self.shared(tokens)).reshape(x.shape)

class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Moe() for _ in range({LAYERS}))

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return x

model = Stack()
example_inputs = {{"x": torch.randn(4, 5, {WIDTH})}}
"""


def routed(kind: str, batch: int, length: int = 5) -> np.ndarray:
    """Tokens (batch, length, WIDTH) whose logits send them to experts evenly, unevenly, or all to the same two."""
    generator = np.random.default_rng(1)
    tokens = generator.normal(0, 0.1, (batch * length, WIDTH))
    rows = np.arange(len(tokens))
    if kind == "balanced":
        first = rows % EXPERTS
    elif kind == "skewed":
        first = np.minimum(rows % 10, EXPERTS - 1) // 5 * 4  # most to the first, some to the fifth
    else:
        first = np.full(len(rows), int(kind.removeprefix("expert ")))
    tokens[rows, first] += 6
    tokens[rows, (first + 1) % EXPERTS] += 4
    return tokens.reshape(batch, length, WIDTH).astype(np.float32)


ROUTINGS = ["balanced", "skewed", "expert 0", "expert 5"]


def export(folder: Path, *options: object, text: str = STACK, name: str = "stack") -> Path:
    """Export a model with the given options into a folder; the manifest."""
    source = folder / f"{name}.py"
    source.write_text(text)
    assert run([str(source), "-o", str(folder), "--no-gate", "--no-simplify", "-q", *map(str, options)]) == 0
    return folder / f"{name}.parallel.json"
