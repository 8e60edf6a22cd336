"""What is changed while a model is traced is as it was afterwards."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import fx, nn

from moe_export.export.idioms import traceable_idioms, user_lines


def test_everything_is_put_back():
    before = (builtins.len, fx.proxy.TracerBase._filter_traceback_frames)
    with traceable_idioms(), user_lines():
        assert builtins.len is not before[0]
        assert len([1, 2]) == 2
        assert len(torch.ones(3, 2)) == 3
    assert (builtins.len, fx.proxy.TracerBase._filter_traceback_frames) == before
    with pytest.raises(RuntimeError), traceable_idioms():
        raise RuntimeError
    assert builtins.len is before[0]


def test_plain_calls_are_not_changed():
    with traceable_idioms():
        assert torch.equal(
            nn.functional.one_hot(torch.tensor([0, 2]), 3), torch.tensor([[1, 0, 0], [0, 0, 1]])
        )
        assert [part.shape[0] for part in torch.ones(5).chunk(4)] == [2, 2, 1]
        with pytest.raises(TypeError):
            len(torch.tensor(1.0))


def test_experts_of_transformers_take_the_way_that_traces_and_are_put_back():
    from transformers import MixtralConfig
    from transformers.integrations import moe
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=4)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    before = moe.ExpertsInterface.get_interface
    with traceable_idioms():
        found = moe.ALL_EXPERTS_FUNCTIONS.get_interface(block.experts.config._experts_implementation, None)
        assert found is moe.batched_mm_experts_forward
    assert moe.ExpertsInterface.get_interface is before
