"""What `mamba_ssm` builds of its blocks: `Block`, `MixerModel` and `MambaLMHeadModel`, with its parameters' names.

    hidden, residual = block(hidden, residual)        Add → Norm → Mixer (→ Add → Norm → MLP)

Layers of attention are refused, as is generation.

Source: the package's documented arguments, https://github.com/state-spaces/mamba.

Letters: b batch, l length, m model size, v vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.frontend.kernels.mamba_blocks import Mamba, Mamba2
from moe_export.export.frontend.kernels.refusals import refuse_arguments
from moe_export.export.frontend.kernels.residual_norms import RMSNorm, add_and_norm

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}
CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclass
class MambaConfig:
    """A model's sizes and choices, as its `config.json` has them."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class GenerationMixin:
    """Generation is a loop around a model, and no part of its graph."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            NotExportableError: Always.
        """
        raise NotExportableError(
            "generate() is a loop around the model",
            code=Code.GENERATION,
            hint="call the model: model(input_ids)",
        )


@dataclass
class InferenceParams:
    """The cache of a generation loop, which the blocks refuse."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None


class GatedMLP(nn.Module):
    """A gated MLP whose first projection holds both halves."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = math.ceil(hidden / multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **made)
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, **made)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, m) → (b, l, out)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * self.activation(gate))
        return out


def _add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor | None, wide: bool) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum."""
    rms = isinstance(norm, RMSNorm)
    weight: Any = norm.weight
    y, _, total = add_and_norm(x, weight, norm.bias, residual, norm.eps, wide, rms)  # type: ignore[arg-type]
    return y.to(weight.dtype), total


class Block(nn.Module):
    """Add → Norm → Mixer, and Add → Norm → MLP where there is one."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2, self.mlp = norm_cls(dim), mlp_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """(b, l, m), (b, l, m) → the same."""
        refuse_arguments("Block", inference_params=inference_params)
        x, residual = _add_and_norm(self.norm, hidden_states, residual, self.residual_in_fp32)
        x = self.mixer(x, **mixer_kwargs)
        if self.mlp is not None:
            x, residual = _add_and_norm(self.norm2, x, residual, self.residual_in_fp32)
            x = self.mlp(x)
        return x, residual

    def allocate_inference_cache(self, *args: Any, **kwargs: Any) -> Any:
        """The mixer's."""
        allocate: Any = self.mixer.allocate_inference_cache
        return allocate(*args, **kwargs)


class MixerBlock(Block):
    """The same as older versions of the package have it, without an MLP among its arguments."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Block:
    """A block of the mixer that `ssm_cfg` names.

    Raises:
        NotExportableError: It is a layer of attention, or another mixer.
    """
    made = {"device": device, "dtype": dtype}
    config = copy.deepcopy(ssm_cfg or {})
    kind = config.pop("layer", "Mamba1")
    if layer_idx in (attn_layer_idx or ()) or kind not in _MIXERS:
        what = kind if kind not in _MIXERS else "attention"
        raise NotExportableError(
            f"layer {layer_idx} of the mamba_ssm model is {what}, which no kernel shim provides",
            code=Code.KERNEL,
            hint="install mamba_ssm, or write the layer in plain PyTorch",
        )
    norm = RMSNorm if rms_norm else nn.LayerNorm
    block = Block(
        d_model,
        partial(_MIXERS[kind], layer_idx=layer_idx, **config, **made),
        nn.Identity
        if not d_intermediate
        else partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **made),
        partial(norm, eps=norm_epsilon, **made),
        fused_add_norm,
        residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Draw the weights of a model that is not trained yet."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    for name, weight in module.named_parameters(recurse=False):
        del name
        if rescale_prenorm_residual and isinstance(module, nn.Linear) and weight.dim() == 2:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class MixerModel(nn.Module):
    """Embedding, blocks, norm: ids (b, l) → (b, l, m)."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int = 0,
        vocab_size: int = 50277,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32,
                fused_add_norm, layer, **made,
            )
            for layer in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **made)
        nn.init.normal_(self.embedding.weight, std=(initializer_cfg or {}).get("initializer_range", 0.02))

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """(b, l) → (b, l, m)."""
        refuse_arguments("MixerModel", inference_params=inference_params)
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, **mixer_kwargs)
        return _add_and_norm(self.norm_f, hidden, residual, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model of Mamba's blocks: ids (b, l) → logits (b, l, v)."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocabulary = math.ceil(config.vocab_size / multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocabulary, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, device=device, dtype=dtype,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocabulary, bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Any = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Any:
        """(b, l) → logits (b, l, v), of the last tokens only if they are counted."""
        hidden = self.backbone(input_ids, inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return CausalLMOutput(self.lm_head(hidden))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Any = None, dtype: Any = None, **options: Any
    ) -> MambaLMHeadModel:
        """The model in a folder of `config.json` and `pytorch_model.bin`.

        Raises:
            UsageError: There is no such folder.
        """
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **options)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device, dtype))
        return model


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The configuration in a folder."""
    found: dict[str, Any] = json.loads(_file_in(model_name, "config.json").read_text(encoding="utf-8"))
    return found


def load_state_dict_hf(model_name: str, device: Any = None, dtype: Any = None) -> dict[str, Tensor]:
    """The weights in a folder."""
    path = _file_in(model_name, "pytorch_model.bin")
    found = torch.load(path, map_location=device or "cpu", weights_only=True)
    return {name: weight if dtype is None else weight.to(dtype) for name, weight in found.items()}


def _file_in(folder: str, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise UsageError(
            f"there is no {name} in {folder}",
            hint="download the model, and name its folder in from_pretrained",
        )
    return path
