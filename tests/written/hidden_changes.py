"""Small models that do something else at a size, a count or a value that their example does not show."""

from __future__ import annotations

HEADER = """import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
TABLE = torch.randn(300, 4)
"""
FLOATS = "example_inputs = (torch.randn(2, 7, 4),)"
IDS = "example_inputs = (torch.randint(0, 9, (2, 7)),)"

_LOOP = """
h, out = torch.zeros(x.shape[0], 4), []
for t in range(x.shape[1]):
    {}
    out.append(h)
return torch.stack(out, 1)"""
TEMPLATES: dict[str, tuple[str, str]] = {
    "break": (_LOOP.format("if t >= {c}: break\n    h = 0.9 * h + x[:, t]"), FLOATS),
    "a shorter range": (
        "h, out = torch.zeros(x.shape[0], 4), []\nfor t in range(min(x.shape[1], {c})):\n    h = 0.9 * h + x[:, t]\n"
        "    out.append(h)\nreturn torch.stack(out, 1)",
        FLOATS,
    ),
    "another decay": (_LOOP.format("h = (0.99 if t < {c} else 0.5) * h + x[:, t]"), FLOATS),
    "a reset": (_LOOP.format("h = (0 if t == {c} else 0.9) * h + x[:, t]"), FLOATS),
    "a reset every so often": (_LOOP.format("h = (0 if t % {c} == 0 else 0.9) * h + x[:, t]"), FLOATS),
    "a long sequence": ("return 2 * x if x.shape[1] > {c} else x.tanh()", FLOATS),
    "a large batch": ("return 2 * x if x.shape[0] > {c} else x.tanh()", FLOATS),
    "many tokens": ("return x + 1 if x.reshape(-1, 4).shape[0] > {c} else x.tanh()", FLOATS),
    "one length": ("return x + 1 if x.shape[1] == {c} else x.tanh()", FLOATS),
    "the first tokens": ("return x[:, :{c}].sum(1)", FLOATS),
    "the last tokens": ("return x[:, -{c}:].mean(1)", FLOATS),
    "a remainder of the length": ("return x * (x.shape[1] % {c})", FLOATS),
    "a quotient of the length": ("return x + x.shape[1] // {c}", FLOATS),
    "a limit of the length": ("return x / min(x.shape[1], {c})", FLOATS),
    "a mask of the first": ("return x * (torch.arange(x.shape[1]) < {c}).unsqueeze(-1)", FLOATS),
    "chunks": (
        "pad = -x.shape[1] % {c}\nc = F.pad(x, (0, 0, 0, pad)).reshape(x.shape[0], -1, {c}, 4).cumsum(2)\n"
        "return c.reshape(x.shape[0], -1, 4)[:, : x.shape[1]]",
        FLOATS,
    ),
    "one id": ("return TABLE[torch.where(x == {c}, 0, x)]", IDS),
    "a remainder of ids": ("return TABLE[x % {c}]", IDS),
    "a limit of ids": ("return TABLE[x.clamp(0, {c})]", IDS),
    "ids far away": ("return torch.where(x > {c}, -1.0, 1.0) * x", IDS),
}  # fmt: skip
CONSTANTS = (13, 20, 48, 50, 60, 100)


def source_of(template: str, constant: int) -> str:
    """A model file."""
    body, example = TEMPLATES[template]
    lines = body.replace("{c}", str(constant)).strip().splitlines()
    forward = "\n".join(f"        {line}" for line in lines)
    return f"{HEADER}\n\nclass Net(nn.Module):\n    def forward(self, x):\n{forward}\n\n\nmodel = Net()\n{example}\n"
