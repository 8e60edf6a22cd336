"""A MoE decoder whose weights lie in safetensors files, and those files, of any size, written as a stream.

Run as `python streamed_moe.py FOLDER [EXPERTS HIDDEN INNER LAYERS VOCABULARY FORM]`: writes `model.py` and `weights/`.

Letters: B batch, L length, H hidden, I inner, E experts, k chosen, N = B*L.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HEAD = 64
"""Width of a head of attention."""


class Stacked(nn.Module):
    """Experts as stacks, one matrix product over groups of sorted rows; used as they are stored."""

    def __init__(self, experts, hidden, inner):
        super().__init__()
        self.experts = experts
        self.gate = nn.Parameter(torch.empty(experts, hidden, inner))
        self.up = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, hidden))

    def forward(self, x, indices, weights):
        flat = indices.flatten()  # (N*k,)
        order = torch.argsort(flat, stable=True)
        token = order // indices.shape[1]
        rows = x[token]  # (N*k, H)
        ends = torch.cumsum(torch.bincount(flat, minlength=self.experts), 0).to(torch.int32)
        inner = F.silu(F.grouped_mm(rows, self.gate, offs=ends)) * F.grouped_mm(rows, self.up, offs=ends)
        rows = F.grouped_mm(inner, self.down, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, rows)


class Expert(nn.Module):
    """One expert of three linear layers."""

    def __init__(self, hidden, inner):
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Listed(nn.Module):
    """Experts as a list of modules, each called on the tokens that chose it."""

    def __init__(self, experts, hidden, inner):
        super().__init__()
        self.all = nn.ModuleList(Expert(hidden, inner) for _ in range(experts))

    def forward(self, x, indices, weights):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.all):
            token, slot = torch.where(indices == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class Layer(nn.Module):
    """Attention, then experts."""

    def __init__(self, experts, hidden, inner, k, form):
        super().__init__()
        self.k = k
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = form(experts, hidden, inner)

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = (
            part.view(batch, length, -1, HEAD).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        rows = self.norm2(x).reshape(-1, hidden)  # (N, H)
        scores = self.router(rows).float().softmax(-1)  # (N, E)
        weights, indices = scores.topk(self.k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return x + self.experts(rows, indices, weights).view(batch, length, hidden)


class Decoder(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, experts=16, hidden=256, inner=128, layers=4, vocabulary=1000, form="Stacked", k=4):
        super().__init__()
        kind = {"Stacked": Stacked, "Listed": Listed}[form]
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(experts, hidden, inner, k, kind) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


MODEL = """
import torch

from streamed_moe import Decoder

with torch.device("meta"):
    model = Decoder({sizes}, form="{form}").half()
weights = "weights/model.safetensors.index.json"
example_inputs = {{"input_ids": torch.arange(10).view(2, 5)}}
"""


def write_files(folder, sizes=(16, 256, 128, 4, 1000), form="Stacked", seed=0):
    """Write `model.py` and its weights into a folder; float16, one file a layer.

    Returns:
        The bytes of the weights.
    """
    folder = Path(folder)
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "streamed_moe.py")
    text = MODEL.format(sizes=", ".join(map(str, sizes)), form=form)
    (folder / "model.py").write_text(text, encoding="utf-8")
    with torch.device("meta"):
        model = Decoder(*sizes, form=form)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.named_parameters():
        group = name.split(".")[1] if name.startswith("layers.") else "rest"
        groups.setdefault(group, {})[name] = tuple(tensor.shape)
    pool = np.random.default_rng(seed).standard_normal(2**22, np.float32)
    names, total = {}, 0
    for number, group in enumerate(groups.values()):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        total += _write_file(folder / "weights" / file, group, pool, number)
        names |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "weights/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _write_file(path, tensors, pool, number):
    """One safetensors file, tensor by tensor; no value of a large tensor depends on its size."""
    entries, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for place, (name, shape) in enumerate(tensors.items()):
            count = int(np.prod(shape))
            if "norm" in name:
                file.write(np.ones(count, np.float16).tobytes())
                continue
            scale = 1.0 if "embed" in name else 1.0 / np.sqrt(shape[-1] if len(shape) == 2 else shape[-2])
            values = (pool * scale).astype(np.float16)
            start = (7919 * (number * 131 + place)) % (len(values) // 2)
            while count:
                part = values[start : start + count]
                file.write(part.tobytes())
                count -= len(part)
                start = (start + 104729) % (len(values) // 2)
    return at


if __name__ == "__main__":
    given = sys.argv[2:]
    write_files(sys.argv[1], tuple(map(int, given[:5])) or (16, 256, 128, 4, 1000), *given[5:6])
