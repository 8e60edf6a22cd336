"""transformers' families with recurrences as tiny models of random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False}


class Last(nn.Module):
    """A transformers model from tokens to hidden states, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden


def slow_path(name: str) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "Mamba":
        config = transformers.MambaConfig(**SIZES, state_size=4, use_mambapy=False)
    elif name == "FalconMamba":
        config = transformers.FalconMambaConfig(**SIZES, state_size=4)
    elif name == "RecurrentGemma":
        config = transformers.RecurrentGemmaConfig(
            **{**SIZES, "num_hidden_layers": 3}, intermediate_size=32, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, lru_width=16, attention_window_size=64,
        )  # fmt: skip
    elif name == "Jamba":
        config = transformers.JambaConfig(
            **SIZES, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
            num_experts_per_tok=1, mamba_d_state=4, use_mamba_kernels=False, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        )  # fmt: skip
    else:
        config = transformers.RwkvConfig(**SIZES, attention_hidden_size=16, intermediate_size=32)
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model.eval()


def by_chunks(name: str, chunk: int = 8) -> nn.Module:
    """Families whose own code computes chunks, or a gated delta rule (in chunks of 64), or convolutions only."""
    transformers: Any = pytest.importorskip("transformers")
    heads = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    mamba = {
        "mamba_d_state": 4,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": chunk,
    }
    options: dict[str, dict[str, Any]] = {
        "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": chunk},
        "Bamba": {**heads, **mamba, "attn_layer_indices": [1]},
        "GraniteMoeHybrid": {
            **heads, **mamba, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
            "num_experts_per_tok": 1, "shared_intermediate_size": 16,
        },
        "NemotronH": {
            **heads, "hybrid_override_pattern": "M*", "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
            "ssm_state_size": 4, "n_groups": 1, "chunk_size": chunk,
        },
        "Zamba2": {
            **heads, "mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 4, "mamba_ngroups": 1,
            "chunk_size": chunk, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4,
        },
        "FalconH1": {
            **heads, **mamba, "mamba_d_ssm": 32, "mamba_expand": 2, "head_dim": 8, "attention_in_multiplier": 1.0,
        },
        "Lfm2": {**heads, "layer_types": ["conv", "full_attention"]},
        "Lfm2Moe": {
            **heads, "layer_types": ["conv", "full_attention"], "moe_intermediate_size": 16, "num_experts": 4,
            "num_experts_per_tok": 2, "num_dense_layers": 1,
        },
        "Qwen3Next": {
            **heads, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention"],
            "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    }  # fmt: skip
    sizes = {**SIZES, "num_hidden_layers": 1 if name in ("Mamba2", "Qwen3Next") else 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **options[name])
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model.eval()


def delta_and_attention(name: str = "Qwen3Next") -> nn.Module:
    """A layer of each kind: a gated delta rule, and attention."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = "TextConfig" if name == "Qwen3_5Moe" else "Config"
    config = getattr(transformers, f"{name}{kind}")(
        **SIZES, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=8,
    )  # fmt: skip
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def states_by_argument() -> nn.Module:
    """RWKV, which takes a list of tensors as `state` and writes into it."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        **{**SIZES, "use_cache": True}, attention_hidden_size=16, intermediate_size=32
    )
    model: nn.Module = transformers.RwkvForCausalLM(config)
    return model.eval()
