"""Weights in files, opened without reading them: where each tensor stands, by its name.

`model.safetensors`; `model.safetensors.index.json`, which names the file of each tensor; a folder with one of these;
or a checkpoint of `torch.save` (`weights_only`, so no code in it is run). Formats:
https://github.com/huggingface/safetensors#format; torch.save's zip stores each tensor as plain bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.weights.recipe import Recipe, Reshaped, Stored, Transposed, np_dtype

_SAFETENSORS: Mapping[str, ir.DataType] = {
    "F64": ir.DataType.DOUBLE, "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16,
    "I64": ir.DataType.INT64, "I32": ir.DataType.INT32, "I16": ir.DataType.INT16, "I8": ir.DataType.INT8,
    "U64": ir.DataType.UINT64, "U32": ir.DataType.UINT32, "U16": ir.DataType.UINT16, "U8": ir.DataType.UINT8,
    "BOOL": ir.DataType.BOOL, "F8_E4M3": ir.DataType.FLOAT8E4M3FN, "F8_E5M2": ir.DataType.FLOAT8E5M2,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MOST = 100 * 2**20
"""Bytes of a header; the format's own limit."""


def open_weights(path: Path) -> dict[str, Recipe]:
    """Where every tensor of a file, or of the files of an index, is stored.

    Raises:
        UsageError: There is no such file, it is none of these formats, or it is cut off.
    """
    if path.is_dir():
        found = next((path / name for name in (_INDEX, _SINGLE) if (path / name).exists()), None)
        if found is None:
            raise UsageError(f"no {_SINGLE} and no {_INDEX} in {path}", hint="name the file of the weights")
        path = found
    if not path.is_file():
        raise UsageError(f"no such file: {path}", hint="weights is the path of a file, seen from the model's")
    if path.suffix == ".json":
        return _of_index(path)
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    return _of_torch(path)


def _of_index(path: Path) -> dict[str, Recipe]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no index of safetensors files: {error!r}") from None
    found: dict[str, Recipe] = {}
    for file in files:
        if Path(file).name != file:
            raise UsageError(f"{path} names {file!r}: the files of an index lie beside it")
        held = open_weights(path.parent / file)
        found |= {name: recipe for name, recipe in held.items() if names.get(name) == file}
    missing = sorted(set(names) - set(found))
    if missing:
        raise UsageError(f"{path}: {missing[0]} is not in {names[missing[0]]}, which is to hold it")
    return found


def _of_safetensors(path: Path) -> dict[str, Recipe]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _MOST):
            raise UsageError(f"{path} is no safetensors file, or its header is cut off")
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise UsageError(f"{path} is no safetensors file: {error}") from None
    found: dict[str, Recipe] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        recipe = _entry(path, name, entry, 8 + length)
        if recipe.offset + recipe.nbytes > size:
            raise UsageError(f"{path} is cut off: it ends before {name} does")
        found[name] = recipe
    return found


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    try:
        dtype, shape = _SAFETENSORS.get(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: the header does not say where {name} is") from None
    if dtype is None:
        raise UsageError(f"{path}: {name} is {entry['dtype']}, which no ONNX tensor is")
    if begin < 0 or end - begin != math.prod(shape) * np_dtype(dtype).itemsize:
        raise UsageError(f"{path}: the header gives {name} {end - begin} bytes, which is not its size")
    return Stored(path, start + begin, dtype, shape)


def _of_torch(path: Path) -> dict[str, Recipe]:
    """A checkpoint opened on fake tensors: each storage knows its offset in the file."""
    import torch

    from moe_export.export.torch_compat.checkpoints import opened

    try:
        state = opened(path)
    except Exception as error:
        raise UsageError(
            f"{path} cannot be opened as weights: {str(error).strip().splitlines()[0]}",
            hint="weights are .safetensors files, their index, or what torch.save makes of a state_dict",
        ) from error
    inner = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(inner, dict):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a state_dict")
    return {
        str(name): _of_tensor(path, str(name), value)
        for name, value in inner.items()
        if isinstance(value, torch.Tensor)
    }


def _of_tensor(path: Path, name: str, tensor: Any) -> Recipe:
    """A tensor of a checkpoint: contiguous, or a transposed view of what is."""
    from onnx_ir import tensor_adapters

    from moe_export.export.torch_compat.checkpoints import offset_of

    offset = offset_of(tensor)
    if offset is None:
        raise UsageError(
            f"{path} is of an old format, which cannot be read in parts", hint="torch.save it again"
        )
    offset += tensor.storage_offset() * tensor.element_size()
    dtype = tensor_adapters.from_torch_dtype(tensor.dtype)
    order = sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), axis))
    inner = tensor.permute(order)
    if not inner.is_contiguous():
        raise UsageError(
            f"{path}: {name} is a part of a larger tensor", hint="save it as tensor.contiguous()"
        )
    stored = Stored(path, offset, dtype, tuple(inner.shape))
    if order == list(range(tensor.dim())):
        return stored
    if tensor.is_contiguous():  # axes of size 1 have any stride
        return Reshaped(stored, tuple(tensor.shape))
    return Transposed(stored, tuple(order.index(axis) for axis in range(tensor.dim())))
