"""A decoder of a published model, made and verified with little more memory than its weights take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_large import measured, pytestmark  # noqa: F401  # slow, and where a process can tell its peak


def published(folder: Path, width: int) -> int:
    """Write a model of two layers into a folder; the bytes of its weights."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def peak_of(folder: Path, width: int) -> tuple[int, int]:
    """Bytes of the weights, and the most that the export had in memory."""
    size = published(folder, width)
    asked = ("--decoder", "--no-gate", "--weights", "reference", "--memory", "50MB", "-q", "-o", folder)
    code, peak, *_ = measured("export", "--hf", folder, *asked)
    assert code == 0
    notes = " ".join(json.loads((folder / "model.report.json").read_text())["graphs"][0]["notes"])
    assert ("referenced where they are stored" in notes) == (size > 50 * 10**6)
    return size, peak


def test_little_more_than_the_weights(tmp_path):
    """PyTorch's pages of the file, and onnxruntime's copy; no copy in float64, and none of a graph on its way."""
    _, least = peak_of(tmp_path / "small", 64)
    size, peak = peak_of(tmp_path / "large", 1536)
    assert size > 300 * 10**6
    assert peak - least < 3 * size
