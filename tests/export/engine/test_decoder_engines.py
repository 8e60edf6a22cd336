"""Decoders as TensorRT engines: one for a prompt and for the tokens after it, each with a profile of its own."""

from __future__ import annotations

from pathlib import Path

import families
import hybrid_families
import pytest
import torch
from torch import nn

from moe_export.export.engines.build import build_engines
from moe_export.export.engines.profiles import Range
from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")

PROMPT = {"sequence": (1, 128, 512), "past_sequence": (0, 0, 0)}
TOKEN = {"sequence": (1, 1, 1), "past_sequence": (1, 128, 512)}


def experts() -> nn.Module:
    return next(each for each in families.FAMILIES if each.name == "mixtral").build_lm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "model", [experts, lambda: hybrid_families.by_chunks("Lfm2")], ids=["experts", "hybrid"]
)
def test_a_prompt_and_a_token_have_profiles_in_one_engine(model, dtype):
    ids = {"input_ids": torch.randint(3, 32, (2, 7))}
    subject = make_subject(model(), (), ids, source=Path(__file__), how="a test")
    options = Options(gates=False, simplify=False, decoder=True, dtype=dtype)
    graph = export_subject(subject, options)[0].model
    # What is kept between calls is float32 in every type: a runtime hands it on without looking at it.
    kept = [value for value in graph.graph.inputs if str(value.name).startswith("past_key_values.")]
    assert {str(value.dtype) for value in kept} == {"FLOAT"}
    (engine,) = build_engines(graph, ["sm89"], [PROMPT, TOKEN])
    prompt, token = engine.profiles
    assert prompt["past_sequence"] == Range(0, 0, 0)
    assert token["sequence"] == Range(1, 1, 1)
    assert 0 < engine.size < 64 * 2**20
