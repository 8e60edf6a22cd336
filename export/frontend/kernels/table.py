"""Which names of which module get a shim, and in which file it stands.

    "mamba_ssm.ops.triton.selective_state_update": {"scans": ("selective_state_update", ...)}

`name=form` is a name that is called otherwise here.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_export.export.frontend.kernels.linear_attention import KERNELS

Names = Mapping[str, tuple[str, ...]]

_SCAN = ("selective_scan_fn", "selective_scan_ref")
_INNER = ("mamba_inner_fn", "mamba_inner_ref", "mamba_inner_fn_no_out_proj")
_NORM_FNS = ("layer_norm_fn", "rms_norm_fn", "layer_norm_ref", "rms_norm_ref")
_GATED_NORMS: Names = {"gated_norms": ("RMSNorm", "LayerNorm", "rmsnorm_fn", "layernorm_fn", "rms_norm_ref")}
_RESIDUAL_NORMS: Names = {"residual_norms": ("RMSNorm", *_NORM_FNS)}
_CONV: Names = {
    "convolutions": (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "causal_conv1d_ref",
        "causal_conv1d_update_ref",
    )
}
_MODELS = ("MambaLMHeadModel", "MixerModel", "create_block", "_init_weights")
_BLOCKS = ("Mamba", "Mamba2")

_SLOTS = ("chunk_gsa", "fused_recurrent_gsa", "naive_recurrent_gsa", "chunk_abc")
_HGRN = ("fused_recurrent_hgrn", "chunk_hgrn", "naive_recurrent_hgrn")
_FLA_OPS = (*KERNELS, *_SLOTS, *_HGRN, "fused_mul_recurrent_rwkv7")
_FLA_GATES = (
    "fused_kda_gate=kda_gate", "naive_kda_gate=kda_gate", "kda_gate_fwd=kda_gate",
    "fused_gdn_gate=gdn_gate", "naive_gdn_gate=gdn_gate",
)  # fmt: skip
_FLA_NORMS = (
    "RMSNorm", "LayerNorm", "GroupNorm", "FusedRMSNormGated", "FusedRMSNormSwishGate", "FusedLayerNormGated",
    "L2Norm", "l2_norm", "l2norm",
)  # fmt: skip
_FLA_MODULES: Names = {
    "fla_modules": (
        *_FLA_NORMS, "GatedMLP", "RotaryEmbedding", "ACT2FN", "swish", "sigmoid", "logsigmoid", "sqrelu", "swiglu",
        "swiglu_linear", "token_shift", "rms_norm_linear", "rms_norm_swish_gate_linear",
    ),
    "convolutions": ("ShortConvolution", "causal_conv1d"),
    "gated_norms": ("RMSNormGated=RMSNorm", "LayerNormGated=LayerNorm", "rmsnorm_fn", "layernorm_fn"),
}  # fmt: skip

MODULES: Mapping[str, Names] = {
    "mamba_ssm": {
        "scans": ("selective_scan_fn",),
        "mamba_inner": ("mamba_inner_fn",),
        "mamba_blocks": _BLOCKS,
        "mamba_models": ("MambaLMHeadModel",),
    },
    "mamba_ssm.ops.selective_scan_interface": {"scans": _SCAN, "mamba_inner": _INNER},
    "mamba_ssm.ops.triton.ssd_combined": {
        "scans": (
            "mamba_chunk_scan_combined",
            "mamba_chunk_scan",
            "ssd_chunk_scan_combined_ref",
            "ssd_selective_scan",
        ),
        "mamba_inner": (
            "mamba_split_conv1d_scan_combined",
            "mamba_split_conv1d_scan_ref",
            "mamba_conv1d_scan_ref",
        ),
    },
    "mamba_ssm.ops.triton.selective_state_update": {
        "scans": ("selective_state_update", "selective_state_update_ref")
    },
    "mamba_ssm.ops.triton.layernorm_gated": _GATED_NORMS,
    "mamba_ssm.ops.triton.layer_norm": _RESIDUAL_NORMS,
    "mamba_ssm.ops.triton.layernorm": _RESIDUAL_NORMS,
    "mamba_ssm.modules.mamba_simple": {"mamba_blocks": ("Mamba",), "mamba_models": ("Block=MixerBlock",)},
    "mamba_ssm.modules.mamba2": {"mamba_blocks": ("Mamba2",)},
    "mamba_ssm.modules.mamba2_simple": {"mamba_blocks": ("Mamba2Simple",)},
    "mamba_ssm.modules.block": {"mamba_models": ("Block",)},
    "mamba_ssm.modules.mlp": {"mamba_models": ("GatedMLP",)},
    "mamba_ssm.models.mixer_seq_simple": {"mamba_models": _MODELS},
    "mamba_ssm.models.config_mamba": {"mamba_models": ("MambaConfig",)},
    "mamba_ssm.utils.generation": {"mamba_models": ("GenerationMixin", "InferenceParams")},
    "mamba_ssm.utils.hf": {"mamba_models": ("load_config_hf", "load_state_dict_hf")},
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "selective_scan_cuda": {"compiled_scans": ("fwd=fwd_mamba",)},
    "selective_scan_cuda_core": {"compiled_scans": ("fwd=fwd_core",)},
    "selective_scan_cuda_oflex": {"compiled_scans": ("fwd=fwd_oflex",)},
    "fla.ops": {"linear_attention": (*_FLA_OPS, *_FLA_GATES)},
    "fla.modules": _FLA_MODULES,
    "fla.utils": {
        "fla_modules": tuple(f"{name}=unchanged" for name in ("tensor_cache", "input_guard", "contiguous"))
    },
}
"""A module → a file of this folder → the names that it has. The modules above each are packages."""

KERNELS_BELOW = (
    "causal_conv1d", "fla.modules", "fla.ops", "fla.utils", "mamba_ssm.ops", "selective_scan_cuda",
    "selective_scan_cuda_core", "selective_scan_cuda_oflex",
)  # fmt: skip
"""Modules that are kernels, with all modules in them: shimmed even where the package's own files are there."""

ANY_DEPTH = ("fla.modules", "fla.ops")
"""Packages whose names may be imported from any module in them: `fla.ops.gla.chunk`."""
