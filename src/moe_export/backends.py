"""What can run each kind of file; names only, so that `--help` imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["model", "graph", "engine", "golden"]

KINDS: Mapping[str, Kind] = {".onnx": "graph", ".engine": "engine", ".safetensors": "golden"}
ONNXRUNTIME = ("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt")
OPENVINO = "openvino"
BACKENDS: Mapping[Kind, tuple[str, ...]] = {
    "model": ("torch", "torch-float64"),
    "graph": (*ONNXRUNTIME, OPENVINO, "onnx-reference"),
    "engine": ("tensorrt", "tensorrt-rtx"),
    "golden": (),
}
