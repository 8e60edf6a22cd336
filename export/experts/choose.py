"""Which lowering expands a block, by what the user asked for, the engine that the graph is for, and the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import onnx_ir as ir

from moe_export.export.experts.batched import blocks, dense, gather
from moe_export.export.experts.contrib import contrib
from moe_export.export.experts.one_at_a_time import Opaque, loop, slices
from moe_export.export.experts.trt_moe import trt_moe
from moe_export.graph_builder import GraphBuilder

Target = Literal["onnxruntime-cpu", "onnxruntime-cuda", "openvino", "tensorrt", "tensorrt-sm100"]
TARGETS: tuple[Target, ...] = get_args(Target)
Lowering = Literal["dense", "slices", "blocks", "gather", "loop", "contrib", "trt_moe"]
Choice = Literal["auto", "keep", Lowering]

LOWERINGS: dict[Lowering, Callable[[GraphBuilder, Opaque], ir.Value]] = {
    "dense": dense,
    "slices": slices,
    "blocks": blocks,
    "gather": gather,
    "loop": loop,
    "contrib": contrib,
    "trt_moe": trt_moe,
}

IN_WORDS: dict[Lowering, str] = {
    "dense": "every expert computes every token, a mask selects",
    "slices": "tokens sorted by expert, one slice per expert",
    "blocks": "tokens sorted by expert into blocks of one size, batched matmuls",
    "gather": "weights gathered for every pair of token and expert",
    "loop": "tokens sorted by expert, a Loop over experts",
    "contrib": "onnxruntime's MoE operator",
    "trt_moe": "TensorRT's MoE layer",
}
"""What each computes, for the report."""

SLICES_UP_TO = 64
"""Experts: with more of them, the speed of `slices` is no longer worth a graph that grows with their number."""


PACKED_SLICES_UP_TO = 256
"""The same where weights are packed: what `loop` picks it dequantises each time, which takes ten times as long as
products that are joined with their weights."""


def choose(choice: Choice, count: int, target: Target, *, packed: bool = False) -> Lowering:
    """The lowering to use: the user's, or the one that `auto` stands for.

    Args:
        choice: What the user asked for; not `keep`.
        count: E.
        target: The engine. On a GPU no shape may depend on the data, or the host would wait for the device.
        packed: Whether the experts' weights will be packed.
    """
    assert choice != "keep"  # with it, nothing is outlined
    if choice != "auto":
        return choice
    if (
        target == "openvino"
    ):  # it cannot run `loop`, and is faster at slices than at blocks, whatever their number
        return "slices"
    if target != "onnxruntime-cpu":
        return "trt_moe" if target == "tensorrt-sm100" else "blocks"
    return "slices" if count <= (PACKED_SLICES_UP_TO if packed else SLICES_UP_TO) else "loop"


def instead(name: Lowering, count: int) -> Lowering:
    """The lowering that `auto` falls back to if `name` cannot write a block; `name` itself if there is none."""
    simpler: dict[Lowering, Lowering] = {"trt_moe": "blocks", "loop": "slices"}
    return simpler.get(name) or choose("auto", count, "onnxruntime-cpu")
