"""Checkpoints that are stored quantized are read as their libraries read them, to the last bit."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_layouts import LAYOUTS, K, N, deepseek_v3, gptq, nf4, nf4_with_nested_scales, pack_quantized
from safetensors.torch import save_file
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.weights.files import open_weights
from moe_export.export.weights.layouts import quantized_weights
from moe_export.export.weights.lazy import attach_weights


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_has_the_weights_that_its_library_would_give_it(tmp_path, layout):
    tensors, w, options = layout()
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = quantized_weights(open_weights(tmp_path), tmp_path).values()
    assert set(found.tensors) == set(tensors)
    with torch.device("meta"):
        module = nn.Module()
        module.up = nn.Module()
        module.up.weight = nn.Parameter(torch.empty(w.shape, dtype=w.dtype), requires_grad=False)
    attach_weights(module, tmp_path, 2**30, tmp_path)
    assert (bits(module.up.weight) == bits(w)).all()
    assert found.options == options


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_a_weight_is_that_part_of_the_whole(tmp_path, layout):
    tensors, w, _ = layout()
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = quantized_weights(open_weights(tmp_path), tmp_path).values()
    whole = found.recipe.array()
    assert found.recipe.shape == whole.shape == tuple(w.shape)
    for axis, size in enumerate(whole.shape):
        start, stop = (33, 97) if size > 97 else (1, size)
        part = found.recipe.read(axis, start, stop)
        assert (part == whole[(slice(None),) * axis + (slice(start, stop),)]).all()


def test_the_newer_format_of_gptq_is_told_by_the_config(tmp_path):
    tensors, w, _ = gptq(newer=True)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"checkpoint_format": "gptq_v2"}})
    )
    (found,) = quantized_weights(open_weights(tmp_path), tmp_path).values()
    assert (torch.from_numpy(found.recipe.array().copy()).half() == w).all()


def test_a_module_of_codes_gets_codes(tmp_path):
    """It has the scales itself, and multiplies by them."""
    tensors, _, _ = deepseek_v3()
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = nn.Module()
        module.up = nn.Module()
        module.up.weight = nn.Parameter(torch.empty(N, K, dtype=torch.bfloat16), requires_grad=False)
        module.up.register_buffer("weight_scale_inv", torch.empty(2, 3))
    attach_weights(module, tmp_path, 2**30, tmp_path)
    assert (module.up.weight == tensors["up.weight"].bfloat16()).all()


@pytest.mark.parametrize(
    ("layout", "name", "shape", "says"),
    [
        (deepseek_v3, "up.weight_scale_inv", (7, 3), r"scales of \[7, 3\] fit no weight of \[192, 320\]"),
        (gptq, "up.qzeros", (10, 23), r"up.qzeros is \[10, 23\], which fits no scales"),
        (pack_quantized, "up.weight_packed", (N, 7), "is no weight of"),
        (nf4, "up.weight", (N * K // 2 - 1, 1), "which is no weight of"),
        (nf4, "up.weight.absmax", (N * K // 64 + 1,), r"with an absmax of \[961\], which is no weight"),
        (nf4, "up.weight.quant_state.bitsandbytes__nf4", (9,), "does not say what up.weight is"),
    ],
)
def test_shapes_that_do_not_fit_together(tmp_path, layout, name, shape, says):
    tensors, _, _ = layout()
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=says):
        quantized_weights(open_weights(tmp_path), tmp_path)


def test_scales_in_8_bits_without_their_own(tmp_path):
    tensors, _, _ = nf4_with_nested_scales()
    del tensors["up.weight.nested_absmax"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"absmax is in 8 bits, and up\.weight\.nested_absmax"):
        quantized_weights(open_weights(tmp_path), tmp_path)
