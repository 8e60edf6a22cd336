"""transformers' families with experts as tiny models of random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "n_group": 2, "topk_group": 1,
}  # fmt: skip
TWO_OF_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
TWO_OF_FOUR_TOO = {"num_experts": 4, "num_experts_per_tok": 2}
JAMBA = {
    **COMMON, **TWO_OF_FOUR_TOO, "num_hidden_layers": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
    "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": 4,
}  # fmt: skip
DBRX = {
    "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 32, "pad_token_id": 0,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
}  # fmt: skip
SWITCH = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_sparse_encoder_layers": 1,
    "num_heads": 2, "num_experts": 4, "expert_capacity": 3,
}  # fmt: skip
NLLB = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_experts": 4,
    "expert_capacity": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: its configuration and model in transformers, and where its first MoE block is."""

    name: str
    model: str
    config: str
    arguments: dict[str, Any]
    block: str

    def build_lm(self) -> nn.Module:
        """The family's language model, from tokens to logits."""
        from transformers import AutoModelForCausalLM

        return self._build(AutoModelForCausalLM.from_config)

    def build(self, model: str | None = None) -> nn.Module:
        """The model, or another class of the family, with random weights."""
        import transformers

        return self._build(getattr(transformers, model or self.model))

    def _build(self, of: Callable[[Any], nn.Module]) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = of(getattr(transformers, self.config)(**self.arguments)).eval()
        with torch.no_grad():
            for parameter in made.parameters():  # some are left as they came from the allocator, or zero
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
                elif not parameter.isfinite().all() or parameter.abs().max() in (0, torch.inf):
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
        return made


def _family(
    name: str,
    model: str,
    arguments: dict[str, Any],
    block: str,
    config: str | None = None,
) -> Family:
    return Family(name, f"{model}Model", config or f"{model}Config", arguments, block)


MOE = {**COMMON, "moe_intermediate_size": 8}
FAMILIES: tuple[Family, ...] = (
    _family("mixtral", "Mixtral", {**COMMON, **TWO_OF_FOUR}, "layers.0.mlp"),
    _family(
        "qwen2_moe",
        "Qwen2Moe",
        {**MOE, **TWO_OF_FOUR_TOO, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
        "layers.0.mlp",
    ),
    _family(
        "qwen3_moe",
        "Qwen3Moe",
        {**MOE, **TWO_OF_FOUR_TOO, "head_dim": 8, "decoder_sparse_step": 1},
        "layers.0.mlp",
    ),
    _family("deepseek_v2", "DeepseekV2", {**COMMON, **LATENT, "topk_method": "greedy"}, "layers.1.mlp"),
    _family("deepseek_v3", "DeepseekV3", {**COMMON, **LATENT}, "layers.1.mlp"),
    _family("olmoe", "Olmoe", {**COMMON, **TWO_OF_FOUR_TOO}, "layers.0.mlp"),
    _family(
        "gpt_oss", "GptOss", {**COMMON, **TWO_OF_FOUR, "head_dim": 8, "sliding_window": 8}, "layers.0.mlp"
    ),
    _family("granitemoe", "GraniteMoe", {**COMMON, **TWO_OF_FOUR}, "layers.0.block_sparse_moe"),
    _family("phimoe", "Phimoe", {**COMMON, **TWO_OF_FOUR}, "layers.0.mlp"),
    _family("jamba", "Jamba", JAMBA, "layers.1.feed_forward"),
    _family("dbrx", "Dbrx", DBRX, "blocks.0.ffn"),
    _family(
        "switch_transformers",
        "SwitchTransformersEncoder",
        SWITCH,
        "encoder.block.1.layer.1.mlp",
        config="SwitchTransformersConfig",
    ),
    _family("nllb_moe", "NllbMoe", NLLB, "encoder.layers.1.ffn"),
    _family(
        "llama4",
        "Llama4Text",
        {
            **COMMON,
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "moe_layers": [0, 1],
            "attention_chunk_size": 16,
        },
        "layers.0.feed_forward",
    ),
    _family(
        "jetmoe",
        "JetMoe",
        {
            **{key: value for key, value in COMMON.items() if key != "num_attention_heads"},
            **TWO_OF_FOUR,
            "kv_channels": 8,
        },
        "layers.0.mlp",
    ),
    _family(
        "glm4_moe",
        "Glm4Moe",
        {
            **MOE,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
        },
        "layers.1.mlp",
    ),
    _family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
        "layers.1.mlp",
    ),
    _family("minimax_m2", "MiniMaxM2", {**COMMON, **TWO_OF_FOUR, "head_dim": 8}, "layers.0.mlp"),
)
