"""Weights in the layouts of quantized checkpoints, built by their specifications.

Letters as in `export/weights/layouts`. Each layout gives its tensors, the weight that its library's formula makes of
them (in the order of operations and the types that it has there), and the options that keep it.
"""

from __future__ import annotations

import json

import torch

N, K = 192, 320
FLOAT4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(low, high, *shape):
    return torch.randint(low, high, shape, generator=draw())


def packed(codes, axis, bits=4, order=range(8)):
    """Codes of few bits in words of 32, one behind another along an axis."""
    held = 32 // bits
    parts = codes.movedim(axis, -1).long()
    parts = torch.nn.functional.pad(parts, (0, -parts.shape[-1] % held)).unflatten(-1, (-1, held))
    shifts = torch.tensor(list(order)[:held]) * bits
    words = (parts << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(-1, axis).contiguous()


def spread(scales, blocks, shape):
    for axis, block in enumerate(blocks):
        scales = scales.repeat_interleave(block, axis)
    return scales[tuple(slice(size) for size in shape)]


def fp8(blocks):
    codes = torch.randn(N, K, generator=draw()).mul(100).to(torch.float8_e4m3fn)
    scales = torch.rand(
        [-(-size // block) for size, block in zip((N, K), blocks, strict=True)], generator=draw()
    )
    scales = scales * 0.01
    tensors = {"up.weight": codes, "up.weight_scale_inv": scales}
    return tensors, codes.float() * spread(scales, blocks, (N, K)), "--weights-dtype float8e4m3"


def deepseek_v3():
    tensors, w, options = fp8((128, 128))
    return tensors, w, f"{options} --block-size 128"


def fp8_of_each_output():
    tensors, w, options = fp8((1, K))
    return (
        {"up.weight": tensors["up.weight"], "up.weight_scale": tensors["up.weight_scale_inv"][:, 0]},
        w,
        options,
    )


def fp8_of_the_whole():
    tensors, w, options = fp8((N, K))
    return tensors | {"up.weight_scale_inv": tensors["up.weight_scale_inv"].squeeze()}, w, options


def int8_of_compressed_tensors():
    codes, scales = numbers(-128, 128, N, K).to(torch.int8), torch.rand(N, 1, generator=draw()) * 0.01
    return {"up.weight": codes, "up.weight_scale": scales}, codes.float() * scales, "--weights-dtype int8"


def int8_with_zero_points():
    tensors, _, _ = int8_of_compressed_tensors()
    zeros = numbers(-5, 5, N, 1).to(torch.int8)
    w = (tensors["up.weight"].float() - zeros.float()) * tensors["up.weight_scale"]
    return tensors | {"up.weight_zero_point": zeros}, w, "--weights-dtype int8 --zero-points"


def pack_quantized(bits=4, group=32):
    middle = 2 ** (bits - 1)
    codes, scales = numbers(-middle, middle, N, K), torch.rand(N, K // group, generator=draw()).half()
    tensors = {
        "up.weight_packed": packed(codes + middle, 1, bits),
        "up.weight_scale": scales,
        "up.weight_shape": torch.tensor([N, K]),
    }
    w = codes.half() * spread(scales, (1, group), (N, K))
    return tensors, w, f"--weights-dtype int{bits} --block-size {group}"


def pack_quantized_in_8_bits():
    return pack_quantized(8, 64)


def pack_quantized_with_zero_points():
    tensors, w, options = pack_quantized()
    zeros, scales = numbers(-8, 8, N, K // 32), tensors["up.weight_scale"]
    codes = (w / spread(scales, (1, 32), (N, K))).round().half()
    w = (codes - spread(zeros, (1, 32), (N, K)).half()) * spread(scales, (1, 32), (N, K))
    return tensors | {"up.weight_zero_point": packed(zeros + 8, 0)}, w, f"{options} --zero-points"


def gptq(order=None, *, newer=False):
    codes, zeros = numbers(0, 16, K, N), numbers(1, 16, K // 32, N)
    scales = torch.rand(K // 32, N, generator=draw()).half()
    groups = torch.arange(K) // 32 if order is None else order
    tensors = {
        "up.qweight": packed(codes, 0),
        "up.qzeros": packed(zeros - int(not newer), 1),
        "up.scales": scales,
        "up.g_idx": groups.int(),
    }
    w = (scales[groups] * (codes - zeros[groups]).half()).T
    options = "--weights-dtype int4 --block-size 32 --zero-points" if order is None else ""
    return tensors, w, options


def gptq_in_the_order_of_activations():
    return gptq(torch.randperm(K, generator=draw()) // 32)


def awq():
    codes, zeros = numbers(0, 16, K, N), numbers(0, 16, K // 64, N)
    scales = torch.rand(K // 64, N, generator=draw()).half()
    places = (0, 4, 1, 5, 2, 6, 3, 7)  # column 1 of eight is the fifth from the lowest bits on
    tensors = {
        "up.qweight": packed(codes, 1, order=places),
        "up.qzeros": packed(zeros, 1, order=places),
        "up.scales": scales,
    }
    w = ((codes - spread(zeros, (64, 1), (K, N))).half() * spread(scales, (64, 1), (K, N))).T
    return tensors, w, "--weights-dtype int4 --block-size 64 --zero-points"


def mxfp4():
    codes, scales = numbers(0, 16, 3, N, K // 32, 32), numbers(110, 130, 3, N, K // 32).to(torch.uint8)
    pairs = codes.view(3, N, K // 32, 16, 2)
    tensors = {
        "up.weight_blocks": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8),
        "up.weight_scales": scales,
    }
    w = torch.ldexp(FLOAT4[codes], scales.int()[..., None] - 127).flatten(-2).transpose(1, 2)
    return tensors, w, "--weights-dtype int8 --block-size 32"


NF4 = torch.tensor([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


def said(kind, **more):
    text = json.dumps({"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [N, K], **more})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def nf4(kind="nf4", table=NF4):
    """Two codes in a byte, the first in the upper half; blocks of 64 of the flat weight."""
    codes, scales = numbers(0, 16, N * K), torch.rand(N * K // 64, generator=draw())
    tensors = {
        "up.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "up.weight.absmax": scales,
        "up.weight.quant_map": table,
        f"up.weight.quant_state.bitsandbytes__{kind}": said(kind),
    }
    return tensors, (table[codes] * scales.repeat_interleave(64)).view(N, K), ""


def fp4():
    return nf4("fp4", FLOAT4 / 6)


def nf4_with_nested_scales():
    """Blocks of 256 scales in 8 bits, around their mean."""
    tensors, _, _ = nf4()
    map8, scales8 = torch.linspace(-1, 1, 256), torch.rand(-(-N * K // 64 // 256), generator=draw())
    codes8 = numbers(0, 256, N * K // 64).to(torch.uint8)
    scales = map8[codes8.long()] * scales8.repeat_interleave(256)[: len(codes8)] + torch.tensor(0.7)
    state = said("nf4", nested_blocksize=256, nested_offset=0.7, nested_dtype="float32")
    tensors |= {
        "up.weight.absmax": codes8,
        "up.weight.nested_absmax": scales8,
        "up.weight.nested_quant_map": map8,
        "up.weight.quant_state.bitsandbytes__nf4": state,
    }
    words = tensors["up.weight"][:, 0].long()
    codes = torch.stack([words >> 4, words & 15], 1).flatten()
    return tensors, (NF4[codes] * scales.repeat_interleave(64)).view(N, K), ""


LAYOUTS = [
    nf4,
    fp4,
    nf4_with_nested_scales,
    deepseek_v3,
    fp8_of_each_output,
    fp8_of_the_whole,
    int8_of_compressed_tensors,
    int8_with_zero_points,
    pack_quantized,
    pack_quantized_in_8_bits,
    pack_quantized_with_zero_points,
    gptq,
    gptq_in_the_order_of_activations,
    awq,
    mxfp4,
]
