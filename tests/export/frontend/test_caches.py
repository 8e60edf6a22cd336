"""A cache of transformers among the example inputs: its tensors are inputs, what the model makes of them outputs."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError

transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = 37
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PASTS = [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
PRESENTS = [name.replace("past_key_values", "present") for name in PASTS]


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, TOKENS, (batch, length))


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def mixtral(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **more)
    return transformers.MixtralForCausalLM(config).eval()


def filled(model: nn.Module, batch: int, length: int) -> Any:
    """The model's own cache of that many tokens."""
    cache = transformers.DynamicCache(config=model.config)
    if length:
        with torch.no_grad():
            model(input_ids=ids(batch, length), past_key_values=cache)
    return cache


def tensors_of(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def check(tools: Any, graph: Any, model: nn.Module, batch: int, past: int, length: int, **more: Any) -> None:
    """The graph is held against the model itself, called with a cache that was filled by it."""
    cache = filled(model, batch, past)
    given = tensors_of(cache) if past else [torch.zeros(batch, 1, 0, 8)] * len(PASTS)
    tokens, own = ids(batch, length), copy.deepcopy(cache)
    found = tools.run(graph.model, input_ids=tokens, **dict(zip(PASTS, given, strict=True)), **more)
    scores = model(input_ids=tokens, past_key_values=own, **more).logits
    for name, want in zip(["logits", *PRESENTS], [scores, *tensors_of(own)], strict=True):
        np.testing.assert_allclose(found[name], want.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("build", [llama, pytest.param(mixtral, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_any_length_of_a_cache(tools: Any, build: Any) -> None:
    model = build()
    graph = tools.graph(model, input_ids=ids(2, 4), past_key_values=filled(model, 2, 3))
    assert list(graph.traced.inputs) == ["input_ids", *PASTS]
    assert list(graph.traced.outputs) == ["logits", *PRESENTS]
    shapes = {value.name: list(map(str, value.shape)) for value in graph.model.graph.outputs}
    assert shapes["present.1.key"] == ["batch", "1", "past_sequence + sequence", "8"]
    assert not graph.traced.conditions
    for batch, past, length in ((2, 3, 4), (1, 9, 1), (3, 1, 5), (2, 0, 3)):
        check(tools, graph, model, batch, past, length)


@pytest.mark.slow
def test_a_mask_over_the_cache_and_the_tokens(tools: Any) -> None:
    model = llama()
    mask = torch.ones(2, 7, dtype=torch.int64)
    graph = tools.graph(model, input_ids=ids(2, 4), attention_mask=mask, past_key_values=filled(model, 2, 3))
    assert list(graph.traced.inputs) == ["input_ids", "attention_mask", *PASTS]
    for past, length in ((3, 4), (8, 1), (1, 5)):
        more = torch.ones(2, past + length, dtype=torch.int64)
        more[0, 0] = 0
        check(tools, graph, model, 2, past, length, attention_mask=more)


@pytest.mark.slow
def test_keys_of_a_window_become_those_of_all_tokens(tools: Any) -> None:
    model = mixtral(sliding_window=6)
    graph = tools.graph(model, input_ids=ids(2, 2), past_key_values=filled(model, 2, 3))
    cache, rows = [torch.zeros(2, 1, 0, 8)] * 4, []
    tokens = ids(2, 12)
    for place in range(12):
        given = dict(zip(PASTS, cache, strict=True))
        found = tools.run(graph.model, input_ids=tokens[:, place : place + 1], **given)
        rows.append(found["logits"])
        cache = [torch.from_numpy(found[name]) for name in PRESENTS]
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits.numpy()
    np.testing.assert_allclose(np.concatenate(rows, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_cache_that_lacks_tokens_is_refused(tools: Any) -> None:
    model = mixtral(sliding_window=4)
    with pytest.raises(NotExportableError, match="has the last 3 of 5 tokens") as caught:
        tools.subject(model, input_ids=ids(2, 2), past_key_values=filled(model, 2, 5))
    assert "fewer tokens than the window" in str(caught.value.hint)


def test_a_cache_of_a_fixed_length_is_refused(tools: Any) -> None:
    model = llama()
    cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(NotExportableError, match="a cache of StaticLayer") as caught:
        tools.subject(model, input_ids=ids(2, 2), past_key_values=cache)
    assert "give a DynamicCache" in str(caught.value.hint)


def test_an_empty_cache_is_filled_by_each_call_anew(tools: Any) -> None:
    model = llama()
    cache = transformers.DynamicCache(config=model.config)
    subject = tools.subject(model, input_ids=ids(2, 4), past_key_values=cache)
    assert (list(subject.inputs), list(subject.outputs)) == (["input_ids"], ["logits", *PRESENTS])
    for length in (4, 3):
        assert subject.call([ids(2, length)])[1].shape == (2, 1, length, 8)
    assert cache.get_seq_length() == 0


@pytest.mark.slow
def test_what_transformers_registers_for_export_changes_no_name(tools: Any) -> None:
    """Registration holds for the whole process, so it is made in one of its own."""
    code = """
import torch, transformers
from pathlib import Path
from transformers.integrations.executorch import register_dynamic_cache_export_support
from moe_export.export.frontend.subject import make_subject

register_dynamic_cache_export_support()
cache = transformers.DynamicCache([(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))])


class Grows(torch.nn.Module):
    def forward(self, x, past_key_values):
        past_key_values.update(x, x, 0)
        return x.sum(), past_key_values


subject = make_subject(Grows(), (torch.ones(1, 1, 1, 8), cache), {}, source=Path("f.py"), how="")
print(*subject.inputs, *subject.outputs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "x", "past_key_values.0.key", "past_key_values.0.value", "output_0", "present.0.key", "present.0.value"
    ]  # fmt: skip
