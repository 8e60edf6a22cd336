"""Weights of checkpoints that are stored quantized: the tensors that together are one weight, and their formula.

Letters: N outputs, K what a product sums over, E experts, g weights that share a scale, b codes in a word.

| layout | tensors | the weight (N, K) |
|---|---|---|
| 8 bits: DeepSeek-V3's FP8, compressed-tensors | W, W_scale_inv or W_scale, [W_zero_point] | (W - zero) * scale |
| MXFP4 of GPT-OSS | W_blocks (E, N, K / 32, 16), W_scales (E, N, K / 32) | table[code] * 2 ** (scale - 127), turned |
| GPTQ | qweight (K / b, N), qzeros (K / g, N / b), scales (K / g, N), g_idx (K) | (code - zero - 1) * scale, turned |
| AWQ | qweight (K, N / b), the others alike; words in another order | (code - zero) * scale, turned |
| packed | W_packed (N, K / b), W_scale (N, K / g), W_shape, [W_zero_point, W_g_idx] | (code - zero) * scale |
| bitsandbytes | W (N K / 2, 1), W.absmax (N K / g), W.quant_map (16), W.quant_state.* | quant_map[code] * absmax |

Scales of 8 bits may belong to blocks of any shape; `packed` is compressed-tensors' `pack-quantized`. NF4 and FP4 of
bitsandbytes have blocks of the flat weight, whose scales may be stored in 8 bits in the same way (W.nested_*).
A layout is recognised by names, shapes and types; `quantization_config` says only which of GPTQ's formats it is. What
is read here are headers, and what says the order of groups.

Sources: https://github.com/deepseek-ai/DeepSeek-V3 (inference/kernel.py), https://github.com/openai/gpt-oss
(weights.py), https://github.com/AutoGPTQ/AutoGPTQ (qlinear_torch), https://github.com/casper-hansen/AutoAWQ
(packing_utils), https://github.com/vllm-project/compressed-tensors (pack_quantized),
https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py: QuantState, dequantize_4bit)
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.weights.dequantized import Dequantized, Mapped, Picked, Unpacked
from moe_export.export.weights.recipe import Array, Recipe, Reshaped, Transposed

_EIGHT_BITS = {ir.DataType.FLOAT8E4M3FN: "float8e4m3", ir.DataType.FLOAT8E5M2: "", ir.DataType.INT8: "int8"}
"""Types of codes of 8 bits, and what `--weights-dtype` calls them."""
_WORD = 32
"""Bits of a word that codes are packed into."""
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""Floats of 4 bits (E2M1) without their sign, by code."""
_BIAS = 127
"""Of a scale that is stored as the exponent of two, in a byte."""
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in AWQ's words a code stands."""
_CONFIGS = ("config.json", "quantize_config.json")
_STATE = ".quant_state.bitsandbytes__"
"""What stands in a name before the kind of bitsandbytes' codes of 4 bits."""
_HIGH_FIRST = (1, 0)
"""Where in bitsandbytes' bytes a code of 4 bits stands: the first in the upper half."""
_BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of blocks that a graph can have."""
_OTHER = "no grid of a graph has so many bits, or blocks of their size"
_UNEVEN = "steps between codes of a table are uneven, and DequantizeLinear has even ones"
_ORDERED = (
    "blocks of a graph are weights behind one another, and these groups are in the order of activations"
)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that several stored tensors stand for.

    Attributes:
        recipe: Makes floats of them.
        tensors: Their names.
        options: The options that keep it as it is stored; empty if none do.
        lost: Why none do.
    """

    recipe: Recipe
    tensors: tuple[str, ...]
    options: str
    lost: str = _OTHER


def note_on_stored(weights: Collection[QuantizedWeight]) -> tuple[str, ...]:
    """For the report: how weights are stored, and what keeps them so."""
    counts = Counter(weight.options or f"no options keep them ({weight.lost})" for weight in weights)
    kept = (f"{count}: {options}" for options, count in counts.most_common())
    return (
        (f"weights that are stored quantized, and what keeps them as they are: {'; '.join(kept)}",)
        if weights
        else ()
    )


def quantized_weights(stored: Mapping[str, Recipe], folder: Path) -> dict[str, QuantizedWeight]:
    """The weights of a checkpoint that are stored quantized, by the name that a model gives them.

    Args:
        stored: Every tensor.
        folder: Where a `config.json` may be.

    Raises:
        UsageError: Shapes of a weight's tensors do not fit together.
    """
    found: dict[str, QuantizedWeight] = {}
    settings: dict[str, Any] | None = None
    for name in stored:
        if name.endswith("qweight"):
            settings = _settings(folder) if settings is None else settings
            made = _of_gptq(stored, name.removesuffix("qweight"), settings)
        elif name.endswith("_packed"):
            made = _of_packed(stored, name.removesuffix("_packed"))
        elif _STATE in name:
            made = _of_bitsandbytes(stored, name)
        elif name.endswith("_blocks"):
            made = _of_mxfp4(stored, name.removesuffix("_blocks"))
        else:
            made = _of_8_bits(stored, name)
        if made is not None:
            weight, made_of = made
            found[weight] = made_of
    return found


_Made = tuple[str, QuantizedWeight] | None


def _settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint's own files say of its quantization."""
    for name in _CONFIGS:
        try:
            text = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        inner = text.get("quantization_config", text if "bits" in text else None)
        if isinstance(inner, dict):
            return inner
    return {}


def _of_8_bits(stored: Mapping[str, Recipe], name: str) -> _Made:
    codes = stored[name]
    if codes.dtype not in _EIGHT_BITS:
        return None
    scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in stored), None)
    if scale is None:
        return None
    zero = f"{name}_zero_point" if f"{name}_zero_point" in stored else None
    tensors = tuple(each for each in (name, scale, zero) if each is not None)
    scales, zeros = (_lined_up(stored[each], codes.shape) if each else None for each in (scale, zero))
    assert scales is not None
    blocks = _blocks(codes.shape, scales.shape, tensors)
    options = _options(_EIGHT_BITS[codes.dtype], codes.shape[-1], blocks[-1], zero_points=zeros is not None)
    return name, QuantizedWeight(Dequantized(codes, scales, zeros, blocks), tensors, options)


def _of_mxfp4(stored: Mapping[str, Recipe], name: str) -> _Made:
    blocks, scales = stored[f"{name}_blocks"], stored.get(f"{name}_scales")
    if scales is None or blocks.dtype != ir.DataType.UINT8 or blocks.shape[:-1] != scales.shape:
        return None
    *lead, groups, halves = blocks.shape
    size = groups * halves * 2
    words = Reshaped(blocks, (*lead, groups * halves))
    codes = Mapped(Unpacked(words, len(lead), 4, size), _float4)
    shape = (*(1 for _ in lead), halves * 2)
    options = _options("int8", size, halves * 2, zero_points=False)
    whole = Dequantized(codes, Mapped(scales, _power), None, shape)
    order = (*range(len(lead) - 1), len(lead), len(lead) - 1)
    return name, QuantizedWeight(Transposed(whole, order), (f"{name}_blocks", f"{name}_scales"), options)


def _float4(codes: Array) -> Array:
    found: Array = np.where(codes & 8, -1, 1) * _FLOAT4[codes & 7]
    return found


def _power(exponents: Array) -> Array:
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - _BIAS)


def _of_bitsandbytes(stored: Mapping[str, Recipe], state: str) -> _Made:
    """Codes of 4 bits of a table, in blocks of the flat weight.

    Raises:
        UsageError: Sizes do not fit together, or what is said of them cannot be read.
    """
    name = state.partition(_STATE)[0]
    names = [name, f"{name}.absmax", f"{name}.quant_map"]
    if any(each not in stored for each in names):
        return None
    try:
        fields = json.loads(stored[state].array().tobytes())
        shape, block = tuple(int(size) for size in fields["shape"]), int(fields["blocksize"])
        nested = (
            (int(fields["nested_blocksize"]), float(fields["nested_offset"]))
            if "nested_offset" in fields
            else None
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{state} does not say what {name} is: {error!r}") from None
    words, scales, table = (stored[each] for each in names)
    size = math.prod(shape)
    if math.prod(words.shape) != -(-size // 2) or block < 1 or scales.shape != (-(-size // block),):
        raise UsageError(
            f"{name} is {list(words.shape)} with an absmax of {list(scales.shape)}, which is no weight of "
            f"{list(shape)} in 4 bits and blocks of {block}"
        )
    if nested is not None:
        more = [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
        if any(each not in stored for each in more):
            raise UsageError(f"{name}.absmax is in 8 bits, and {' and '.join(more)} are not all there")
        names += more
        scales = _looked_up(scales, stored[more[1]], stored[more[0]], nested[0])
        scales = Mapped(scales, lambda found: found + np.float32(nested[1]))
    codes = Unpacked(Reshaped(words, (math.prod(words.shape),)), 0, 4, size, _HIGH_FIRST)
    whole = _looked_up(codes, table, scales, block)
    return name, QuantizedWeight(Reshaped(whole, shape), (*names, state), "", _UNEVEN)


def _looked_up(codes: Recipe, table: Recipe, scales: Recipe, block: int) -> Recipe:
    """`table[code] * scale` of flat codes."""
    floats = table.array().astype(np.float32)
    return Dequantized(Mapped(codes, lambda found: floats[found]), scales, None, (block,))


def _of_gptq(stored: Mapping[str, Recipe], prefix: str, settings: Mapping[str, Any]) -> _Made:
    """GPTQ or AWQ: words along the summed axis, or along the outputs."""
    names = [f"{prefix}{each}" for each in ("qweight", "qzeros", "scales")]
    if any(name not in stored for name in names) or len(stored[names[2]].shape) != 2:
        return None
    words, packed_zeros, scales = (stored[name] for name in names)
    (groups, outputs), wide = scales.shape, packed_zeros.shape[-1]
    bits = wide * _WORD // max(1, outputs)
    if bits not in (2, 4, 8) or packed_zeros.shape[0] != groups:
        raise UsageError(
            f"{names[1]} is {list(packed_zeros.shape)}, which fits no scales of {list(scales.shape)}"
        )
    of_awq = words.shape[1] != outputs
    size = words.shape[0] if of_awq else words.shape[0] * _WORD // bits
    order = _AWQ if of_awq and bits == 4 else None
    codes = Unpacked(words, 1 if of_awq else 0, bits, outputs if of_awq else size, order)
    zeros: Recipe = Unpacked(packed_zeros, 1, bits, outputs, order)
    if not of_awq and settings.get("checkpoint_format") != "gptq_v2":
        zeros = Mapped(zeros, _one_more)  # the format stores one less
    blocks = _blocks((size, outputs), scales.shape, tuple(names))
    index = f"{prefix}g_idx"
    in_order = _in_order(stored.get(index), blocks[0])
    options = _options(f"int{bits}", size, blocks[0], zero_points=True) if in_order is None else ""
    if in_order is not None:
        scales, zeros, blocks = Picked(scales, 0, in_order), Picked(zeros, 0, in_order), (1, 1)
    whole = Transposed(Dequantized(codes, scales, zeros, blocks), (1, 0))
    tensors = (*names, *([index] if index in stored else []))
    return f"{prefix}weight", QuantizedWeight(whole, tensors, options, _lost(in_order))


def _one_more(zeros: Array) -> Array:
    return zeros.astype(np.float32) + 1


def _of_packed(stored: Mapping[str, Recipe], name: str) -> _Made:
    words, scales, shape = (stored.get(f"{name}_{each}") for each in ("packed", "scale", "shape"))
    if words is None or scales is None or shape is None:
        return None
    sizes = tuple(int(size) for size in shape.array())
    bits = next((bits for bits in (4, 8) if math.ceil(sizes[-1] * bits / _WORD) == words.shape[-1]), 0)
    if not bits or words.shape[:-1] != sizes[:-1]:
        raise UsageError(
            f"{name}_packed is {list(words.shape)}, which is no weight of {list(sizes)} in 4 or 8 bits"
        )
    middle = 2 ** (bits - 1)
    scales = _lined_up(scales, sizes)
    names = [f"{name}_{each}" for each in ("packed", "scale", "shape")]
    blocks = _blocks(sizes, scales.shape, tuple(names))
    zero, index = (stored.get(f"{name}_{each}") for each in ("zero_point", "g_idx"))
    zeros: Recipe | None = None
    if zero is not None:
        names.append(f"{name}_zero_point")
        packed = zero.dtype == ir.DataType.INT32
        zeros = (
            Mapped(Unpacked(zero, 0, bits, sizes[0]), lambda codes: _less(codes, middle)) if packed else zero
        )
    in_order = _in_order(index, blocks[-1])
    options = _options(f"int{bits}", sizes[-1], blocks[-1], zero_points=zeros is not None)
    if index is not None:
        names.append(f"{name}_g_idx")
    if in_order is not None:
        last = len(sizes) - 1
        zeros = Picked(zeros, last, in_order) if zeros is not None else None
        scales, blocks, options = Picked(scales, last, in_order), (*blocks[:-1], 1), ""
    codes = Mapped(Unpacked(words, len(sizes) - 1, bits, sizes[-1]), lambda codes: _less(codes, middle))
    whole = Dequantized(codes, scales, zeros, blocks)
    return name, QuantizedWeight(whole, tuple(names), options, _lost(in_order))


def _less(codes: Array, middle: int) -> Array:
    return codes.astype(np.float32) - middle


def _in_order(index: Recipe | None, group: int) -> Array | None:
    """The group of each weight along the summed axis, if groups are not one behind another."""
    if index is None:
        return None
    groups = index.array().astype(np.int64)
    if (groups < 0).any() or (groups == np.arange(len(groups)) // group).all():
        return None
    return groups


def _lost(in_order: Array | None) -> str:
    return _OTHER if in_order is None else _ORDERED


def _lined_up(scales: Recipe, shape: tuple[int, ...]) -> Recipe:
    """Scales with an axis for each of the weight's; those that they lack are the last ones."""
    have = scales.shape if math.prod(scales.shape) != 1 else ()
    return Reshaped(scales, (*have, *(1 for _ in range(len(shape) - len(have)))))


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """The size of a block along each axis.

    Raises:
        UsageError: There is none.
    """
    found = [_block(size, count) for size, count in zip(shape, scales, strict=False)]
    if len(shape) != len(scales) or None in found:
        raise UsageError(
            f"{', '.join(names)}: scales of {list(scales)} fit no weight of {list(shape)}",
            hint="is the checkpoint complete, and of a layout that docs/quantize.md names?",
        )
    return tuple(block for block in found if block is not None)


def _block(size: int, count: int) -> int | None:
    """The size of `count` blocks of an axis: a power of two if one fits, as for the 576 = 4.5 * 128 of DeepSeek-V3."""
    if count == 1:
        return size
    power = 2 ** math.ceil(math.log2(size / count)) if 0 < count <= size else 1
    return next((block for block in _fitting(size, count, power)), None)


def _fitting(size: int, count: int, power: int) -> Iterator[int]:
    if count and -(-size // power) == count:
        yield power
    if count and size % count == 0:
        yield size // count


def _options(packing: str, size: int, block: int, *, zero_points: bool) -> str:
    """What keeps a weight on its grid; empty if nothing does."""
    if packing not in ("int4", "int8", "float8e4m3") or (block < size and block not in _BLOCKS):
        return ""
    words = ["--weights-dtype", packing, *(["--block-size", str(block)] if block < size else [])]
    return " ".join([*words, *(["--zero-points"] if zero_points else [])])
