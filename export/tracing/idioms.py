"""Calls whose trace would bake in a size, traced as an equal form that does not. One rule an idiom.

The user's file is not touched: the calls are seen while the model is traced, whoever makes them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_export.export.frontend.source import inside_call, is_user_file
from moe_export.export.torch_compat.length import symbolic_length
from moe_export.export.torch_compat.modules import conversions
from moe_export.export.torch_compat.operators import GROUPED_MM
from moe_export.export.torch_compat.sizes import require
from moe_export.export.torch_compat.stack_traces import Frames, kept_frames
from moe_export.export.tracing.other_forms import InOtherForms
from moe_export.export.tracing.transformers_experts import traceable_experts


def _one_hot(tensor: torch.Tensor, num_classes: Any = -1) -> Any:
    """`one_hot(x, n)` with a symbolic n → `x[..., None] == arange(n)`.

    torch.export notes n as a guard, which the ONNX exporter drops: the file would silently be wrong at any other
    size. Capacities of GShard and DeepSpeed are such an n.
    """
    if not isinstance(num_classes, torch.SymInt):
        return torch.nn.functional.one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)  # type: ignore[call-overload]
    return (tensor.unsqueeze(-1) == classes).to(torch.int64)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`scaled_dot_product_attention`: keys and values are equally long, and 3 dimensions are 4 of batch 1.

    PyTorch's fast kernel does not look whether they are, and reads beyond the shorter one; ONNX cannot. The
    exporter translates 4 dimensions only.
    """
    require(key.shape[-2] == value.shape[-2])
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = args[0] if args else kwargs.get("attn_mask")
    if query.dim() != 3 or (mask is not None and mask.dim() > 3):
        return attend(query, key, value, *args, **kwargs)
    if mask is not None:
        args, kwargs = args[1:], {**kwargs, "attn_mask": mask.unsqueeze(0) if mask.dim() == 3 else mask}
    return attend(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), *args, **kwargs).squeeze(0)


def _chunk(tensor: torch.Tensor, chunks: int | torch.SymInt, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """`chunk` along a symbolic dimension → slices.

    The exporter makes a sequence of it whose length it does not know, and then fails on that.
    """
    if isinstance(chunks, torch.SymInt):  # `ceil(rows / 128)`: as sizes, those of all layers would be nested
        number = int(chunks.node.hint)
        require(chunks == number)
        chunks = number
    length: Any = tensor.shape[dim]
    if not isinstance(length, torch.SymInt):
        return tensor.chunk(chunks, dim)
    size = (length + chunks - 1) // chunks
    hint = length.node.hint  # how many chunks there are is the model's structure, as it was traced
    count = -(-hint // -(-hint // chunks)) if hint else chunks
    if (
        chunks > 1
    ):  # of 11 steps, 128 chunks are 11: the trace holds for as many steps as make that many chunks
        require((length + size - 1) // size == count)
    before = (slice(None),) * (dim % tensor.dim())
    return tuple(tensor[(*before, slice(index * size, (index + 1) * size))] for index in range(count))


def _grouped_mm(rows: torch.Tensor, stack: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`grouped_mm` of sorted rows (S, a) and stacked matrices (E, a, b) → each row times its own matrix.

    It has no ONNX form, and traces in bfloat16 only. `offs` (E,) says where the rows of each matrix end.
    """
    ends = kwargs.get("offs", args[0] if args else None)
    if ends is None or rows.dim() != 2 or stack.dim() != 3 or kwargs.get("bias") is not None:
        return torch.nn.functional.grouped_mm(rows, stack, *args, **kwargs)
    numbers = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)  # (S, 1)
    own = stack[(numbers >= ends).sum(1)]  # (S, a, b)
    return torch.bmm(rows.unsqueeze(1), own).squeeze(1).to(kwargs.get("out_dtype") or rows.dtype)


def _embedding_bag(
    input: torch.Tensor, weight: torch.Tensor, offsets: Any = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`embedding_bag` of bags of one size (B, k) → the rows looked up, weighted, and added up.

    The exporter writes a loop over the bags, with sequences. A memory of product keys is read so.
    """
    names = ("max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights")
    given = dict(zip(names, args, strict=False)) | kwargs
    mode, weights = given.get("mode", "mean"), given.get("per_sample_weights")
    plain = offsets is None and given.get("max_norm") is None and given.get("padding_idx") is None
    if not plain or len(args) > len(names) or input.dim() != 2 or mode not in ("sum", "mean", "max"):
        return torch.nn.functional.embedding_bag(input, weight, offsets, *args, **kwargs)
    rows = torch.nn.functional.embedding(input, weight)  # (B, k, d)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    return rows.sum(1) if mode == "sum" else rows.mean(1) if mode == "mean" else rows.amax(1)


def _squeezed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`rows.squeeze()` where only the data knows how many rows there are → the axes that are 1 in the trace.

    A trace takes their number for another than 1. ONNX's `Squeeze` would look in each run, and find one row to be none.
    """
    if args or kwargs or not any(map(free_unbacked_symbols, tensor.shape)):
        return tensor.squeeze(*args, **kwargs)
    for axis in reversed(range(tensor.dim())):
        if isinstance(tensor.shape[axis], int) and tensor.shape[axis] == 1:
            tensor = tensor.squeeze(axis)
    return tensor


def _taken_along(tensor: torch.Tensor, indices: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """`take_along_dim` → `gather`, with axes of size 1 spread before it: by itself it fixes all other sizes."""
    if dim is None or tensor.dim() != indices.dim():
        return torch.take_along_dim(tensor, indices, dim)
    axis = dim % tensor.dim()

    def spread(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        is_one = [isinstance(size, int) and size == 1 for size in value.shape]
        return value.expand([other.shape[n] if is_one[n] and n != axis else -1 for n in range(tensor.dim())])

    return spread(tensor, indices).gather(axis, spread(indices, tensor))


def _rolled(tensor: torch.Tensor, shifts: Any, dims: Any = None) -> torch.Tensor:
    """`roll` by a symbolic number of places → two slices; the exporter takes numbers only."""
    given = (shifts,) if isinstance(shifts, (int, torch.SymInt)) else shifts
    if dims is None or not any(isinstance(shift, torch.SymInt) for shift in given):
        return torch.roll(tensor, shifts, dims)
    for shift, axis in zip(given, (dims,) if isinstance(dims, int) else dims, strict=True):
        size = tensor.shape[axis]
        start = (size - shift) % size
        tensor = torch.cat([tensor.narrow(axis, start, size - start), tensor.narrow(axis, 0, start)], axis)
    return tensor


def _shifted(tensor: torch.Tensor, dim: Any = None, *, back: bool = False) -> torch.Tensor:
    """`fftshift`, and with `back` the inverse of it → `roll`."""
    axes = range(tensor.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    for axis in axes:
        size = tensor.shape[axis]
        tensor = _rolled(tensor, (size + 1) // 2 if back else size // 2, axis)
    return tensor


def _to(original: Callable[..., nn.Module], module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`module.to(...)` in a `forward`, where the module is so already → the module.

    Routers of Switch and NLLB are given their dtype at every call, experts of others their device. The tracer forbids
    to swap parameters, also for themselves.
    """
    there = [*module.parameters(), *module.buffers()]
    already = [_is_already(there, each) for each in args[:2]]
    already += [_is_already(there, each) for name, each in kwargs.items() if name != "non_blocking"]
    return module if all(already) else original(module, *args, **kwargs)


def _is_already(there: Sequence[torch.Tensor], asked: Any) -> bool:
    """Whether tensors have the device, the dtype of floats, or both as a tensor has them, that `to` is asked for."""
    if asked is None or isinstance(asked, bool):
        return True
    if isinstance(asked, torch.dtype):
        return all(tensor.dtype is asked for tensor in there if tensor.is_floating_point())
    if isinstance(asked, torch.Tensor):
        return _is_already(there, asked.dtype) and _is_already(there, asked.device)
    if not isinstance(asked, str | torch.device):
        return False
    return all(tensor.device == torch.device(asked) for tensor in there)


def _new_tensor(like: torch.Tensor, data: Any, **options: Any) -> Any:
    """`x.new_tensor([len(rows), 3])` of numbers that a trace does not know → one tensor a number, stacked."""
    return _stacked(data, **{"dtype": like.dtype, "device": like.device, **options})


def _stacked(data: Any, **options: Any) -> Any:
    symbolic = isinstance(data, (list, tuple)) and any(isinstance(each, torch.SymInt) for each in data)
    if not symbolic or not all(isinstance(each, (int, torch.SymInt)) for each in data):
        return NotImplemented
    kept = {name: value for name, value in options.items() if name in ("dtype", "device")}
    kept["dtype"] = kept.get("dtype") or torch.int64
    return torch.stack([torch.full((), each, **kept) for each in data])


_IDIOMS: dict[Any, Callable[..., Any]] = {
    torch.tensor: _stacked,
    torch.Tensor.new_tensor: _new_tensor,
    torch.nn.functional.one_hot: _one_hot,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    **dict.fromkeys(GROUPED_MM, _grouped_mm),
    torch.nn.functional.embedding_bag: _embedding_bag,
    **dict.fromkeys((torch.roll, torch.Tensor.roll), _rolled),
    **dict.fromkeys((torch.squeeze, torch.Tensor.squeeze), _squeezed),
    **dict.fromkeys((torch.take_along_dim, torch.Tensor.take_along_dim), _taken_along),
    torch.fft.fftshift: _shifted,
    torch.fft.ifftshift: partial(_shifted, back=True),
    torch.chunk: _chunk,
    torch.Tensor.chunk: _chunk,
}


@contextmanager
def traceable_idioms() -> Iterator[None]:
    """While it runs, calls are traced in their other form."""
    with InOtherForms(_IDIOMS), traceable_experts(), symbolic_length(), conversions(_to):
        yield


def user_lines() -> AbstractContextManager[None]:
    """Let the tracer keep the user's own lines in stack traces; by itself it keeps those of `forward` only."""

    def keep(kept: Frames, frames: traceback.StackSummary) -> Frames:
        forwards = {(frame.filename, frame.lineno) for frame in kept}
        return [
            frame
            for frame in inside_call(frames)
            if (frame.filename, frame.lineno) in forwards or is_user_file(frame.filename)
        ]

    return kept_frames(keep)
