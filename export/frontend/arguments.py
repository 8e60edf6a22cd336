"""`--init dim=512` and `--input ids=2x10:int64`: values and example tensors from the command line."""

from __future__ import annotations

import ast
import re
from typing import Any

import torch
from torch import nn

from moe_export.errors import UsageError

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_INPUT = re.compile(
    r"(?P<name>\w+)=(?P<shape>scalar|\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<limit>\d+))?$", re.ASCII
)


def parse_init(text: str) -> tuple[str, Any]:
    """`dim=512` → `("dim", 512)`; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--init {text!r} is not name=value", hint="for example: --init dim=512")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_input(text: str, model: nn.Module) -> tuple[str, torch.Tensor]:
    """`x=2x10x512:float32` → a seeded example tensor of that shape.

    Floats are normal. Integers lie below the limit of `ids=2x10:int64<1000`, or, where none is given, below the
    smallest vocabulary of the model's embeddings (2 if it has none): a token id must be in range.
    """
    match = _INPUT.match(text)
    dtype = _DTYPES.get(match["dtype"] or "float32") if match else None
    if match is None or dtype is None:
        raise UsageError(
            f"--input {text!r} is not name=SIZES:dtype",
            hint=f"for example: --input x=2x10x512:float32, --input ids=2x10:int64<1000; dtypes: {', '.join(_DTYPES)}",
        )
    shape = [] if match["shape"] == "scalar" else [int(size) for size in match["shape"].split("x")]
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return match["name"], torch.randn(shape, generator=generator).to(dtype)
    if dtype is torch.bool:
        return match["name"], torch.ones(shape, dtype=dtype)
    limit = int(match["limit"]) if match["limit"] else _smallest_vocabulary(model)
    return match["name"], torch.randint(0, limit, shape, generator=generator).to(dtype)


def _smallest_vocabulary(model: nn.Module) -> int:
    sizes = [layer.num_embeddings for layer in model.modules() if isinstance(layer, nn.Embedding)]
    return min(sizes, default=2)
