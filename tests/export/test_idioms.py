"""What is changed while a model is traced is as it was afterwards."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import fx, nn

from moe_export.export.idioms import traceable_idioms, user_lines


def test_everything_is_put_back():
    before = (builtins.len, fx.proxy.TracerBase._filter_traceback_frames)
    with traceable_idioms(nn.ReLU()), user_lines():
        assert builtins.len is not before[0]
        assert len([1, 2]) == 2
        assert len(torch.ones(3, 2)) == 3
    assert (builtins.len, fx.proxy.TracerBase._filter_traceback_frames) == before
    with pytest.raises(RuntimeError), traceable_idioms(nn.ReLU()):
        raise RuntimeError
    assert builtins.len is before[0]


def test_plain_calls_are_not_changed():
    with traceable_idioms(nn.ReLU()):
        assert torch.equal(
            nn.functional.one_hot(torch.tensor([0, 2]), 3), torch.tensor([[1, 0, 0], [0, 0, 1]])
        )
        assert [part.shape[0] for part in torch.ones(5).chunk(4)] == [2, 2, 1]
        with pytest.raises(TypeError):
            len(torch.tensor(1.0))


def test_experts_of_transformers_are_traced_and_put_back():
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = MixtralModel(config)
    before = model.get_experts_implementation()
    with traceable_idioms(model):
        assert set(model.get_experts_implementation().values()) == {"batched_mm"}
    assert model.get_experts_implementation() == before
