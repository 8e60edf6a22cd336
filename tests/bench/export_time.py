"""How the time of an export grows with what a model repeats: experts, layers, modules, steps.

    python tests/bench/export_time.py                 each row by moe-export
    python tests/bench/export_time.py --torch         and by torch.onnx.export
    python tests/bench/export_time.py --only experts --most 256

Each export is a process of its own, and what is printed is its CPU seconds: imports, export, writing; no verification.
The processes run one at a time in random order, and of several rounds the fastest counts. Behind the seconds stands how
many times those of the first number they are; the exit code is 1 if that is more than the row's limit.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters import ROOT, apart

_EXPERTS = """
import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    def __init__(self, d=32, h=64):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    def __init__(self, count, d=32, k=2):
        super().__init__()
        self.router, self.k = nn.Linear(d, count, bias=False), k
        self.experts = nn.ModuleList(Expert(d) for _ in range(count))

    def forward(self, x):  # (n, d)
        weights, chosen = self.router(x).softmax(-1).topk(self.k)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


"""
_LAYERS = """
import torch
from transformers import {name}Config, {name}ForCausalLM

config = {name}Config(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers={{count}}, num_attention_heads=2,
    num_key_value_heads=2, {options}
    attn_implementation="eager", use_cache=False,
)
model = {name}ForCausalLM(config).eval()
example_inputs = {{"input_ids": torch.randint(0, 64, (2, 7))}}
"""
_MODULES = """
import torch
from torch import nn

model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range({count} // 3)))
example_inputs = (torch.randn(5, 8),)
"""


@dataclass(frozen=True)
class Row:
    """A model whose size is a number.

    Attributes:
        name: What `--only` takes.
        code: The model file, with `{count}` where the number stands.
        counts: The numbers, the first of which all others are divided by.
        at_most: How many times the first one's seconds the others may take.
        free: For each input the names of its free axes.
    """

    name: str
    code: str
    counts: Sequence[int]
    at_most: Mapping[int, float]
    free: Mapping[str, Sequence[str]]


def _layers(name: str, options: str) -> str:
    return _LAYERS.format(name=name, options=options)


_TOKENS = {"x": ["token"]}
_IDS = {"input_ids": ["batch", "sequence"]}
ROWS = (
    Row(
        "experts",
        _EXPERTS + "model, example_inputs = MoE({count}), (torch.randn(7, 32),)\n",
        (8, 64, 256, 512),
        {256: 2.0, 512: 2.0},
        _TOKENS,
    ),
    Row(
        "mixtral",
        _layers("Mixtral", "num_local_experts=4, num_experts_per_tok=2,"),
        (4, 32, 60),
        {60: 5.0},
        _IDS,
    ),
    Row(
        "deepseek",
        _layers(
            "DeepseekV3",
            "n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, "
            "first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, "
            "v_head_dim=8,",
        ),
        (4, 32, 60),
        {60: 5.0},
        _IDS,
    ),
    Row("modules", _MODULES, (10, 100, 1000), {1000: 10.0}, {"input": ["batch"]}),
    Row(
        "steps",
        _EXPERTS
        + """
class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoE(8)

    def forward(self, x):
        for _ in range({count}):
            x = x + self.moe(x)
        return x


model, example_inputs = Steps(), (torch.randn(7, 32),)
""",
        (1, 10),
        {10: 5.0},
        _TOKENS,
    ),
)


def main() -> int:
    """Print each row; the exit code is 1 if one grows faster than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[row.name for row in ROWS], metavar="ROW")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="leave out numbers above this one")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--torch", action="store_true", help="measure torch.onnx.export, too")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "export_time")
    asked = parser.parse_args()
    shutil.rmtree(asked.build, ignore_errors=True)
    rows = [row for row in ROWS if row.name in asked.only]
    exporters = ("moe-export", "torch") if asked.torch else ("moe-export",)
    tasks = [
        (row, count, who) for row in rows for count in row.counts for who in exporters if count <= asked.most
    ] * asked.rounds
    random.shuffle(tasks)
    found: dict[tuple[str, str], dict[int, list[float | str]]] = {}
    for row, count, who in tasks:
        seconds = once(row, count, who, asked.build / f"{row.name}-{count}")
        found.setdefault((row.name, who), {}).setdefault(count, []).append(seconds)
        print(f"{row.name} {count} {who}: {seconds}", flush=True)
    print()
    for row in rows:
        for who in exporters:
            print(f"{row.name:10} {who:10} {'   '.join(cells(found[row.name, who]))}")
    return int(any(is_slow(row, found[row.name, "moe-export"]) for row in rows))


def best(values: Sequence[float | str]) -> float:
    """The fastest of several exports in seconds; NaN if none came to an end."""
    return min((value for value in values if isinstance(value, float)), default=math.nan)


def cells(found: Mapping[int, Sequence[float | str]]) -> list[str]:
    """`64: 12.3 s (2.1)` for each number."""
    first = best(found[min(found)])
    return [
        f"{count}: {best(values):.1f} s ({best(values) / first:.1f})"
        for count, values in sorted(found.items())
    ]


def is_slow(row: Row, found: Mapping[int, Sequence[float | str]]) -> bool:
    """Whether a number takes more times the seconds of the first than it may, or came to no end."""
    first = best(found[min(found)])
    return any(
        not best(values) / first <= row.at_most.get(count, math.inf) for count, values in found.items()
    )


def once(row: Row, count: int, who: str, place: Path) -> float | str:
    """The CPU seconds of one export, or why there is none."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.py").write_text(row.code.replace("{count}", str(count)))
    given = ("model.py", f"{who}.onnx", "--free", json.dumps(row.free))
    done = apart(place, "exporters_apart.py", who, *given, "--no-verify")
    return str(done["error"]) if "error" in done else float(done["cpu"])


if __name__ == "__main__":
    sys.exit(main())
