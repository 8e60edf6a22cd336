"""The few ONNX operators that a plan needs, computed with NumPy, as strictly as ONNX Runtime does.

`proof` runs the writer of ONNX nodes on this engine: what it computes is what the nodes will compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class NumpyEngine:
    """An engine for `onnx_ops.run` that takes and returns arrays.

    Args:
        opset: The opset whose operators may be used.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset

    def call(self, op_type: str, *inputs: Array, **attributes: Any) -> Array:
        """Apply an operator."""
        return OPERATORS[op_type](*inputs, **attributes)

    def ints(self, values: Sequence[int]) -> Array:
        """A constant vector."""
        return np.array(values, dtype=np.int64)


def _axes(x: Array, axes: Any) -> tuple[int, ...]:
    return tuple(int(axis) for axis in axes)


def _reshape(x: Array, target: Array, allowzero: int = 0) -> Array:
    shape = [int(size) for size in target]
    if not allowzero:
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and (known == 0 or x.size % known):
        raise ValueError(f"Reshape cannot tell what -1 is: {x.shape} to {shape}")
    return x.reshape(shape)


def _flatten(x: Array, axis: int = 1) -> Array:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _slice(x: Array, starts: Array, ends: Array, axes: Array, steps: Array | None = None) -> Array:
    index: list[Any] = [slice(None)] * x.ndim
    for k, axis in enumerate(axes):
        step = 1 if steps is None else int(steps[k])
        index[int(axis)] = slice(int(starts[k]), int(ends[k]), step)
    part: Array = x[tuple(index)]
    return part


def _shape(x: Array, start: int = 0, end: int | None = None) -> Array:
    return np.array(x.shape[start:end], dtype=np.int64)


def _reduce_sum(x: Array, axes: Any, keepdims: int = 1) -> Array:
    return np.asarray(x.sum(axis=_axes(x, axes), keepdims=bool(keepdims), dtype=x.dtype))


OPERATORS: dict[str, Callable[..., Array]] = {
    "Add": lambda x, y: x + y,
    "Cast": lambda x, to: x,  # proofs compute with integers, whatever the model's dtype is
    "Concat": lambda *parts, axis: np.concatenate(parts, axis=axis),
    "Flatten": _flatten,
    "Identity": lambda x: x,
    "MatMul": lambda x, y: np.asarray(np.matmul(x, y)),
    "Mul": lambda x, y: np.asarray(x * y),
    "ReduceProd": lambda x, keepdims: x.prod(keepdims=bool(keepdims)),
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": lambda x, axes: np.squeeze(x, _axes(x, axes)),
    "Transpose": lambda x, perm: x.transpose(perm),
    "Unsqueeze": lambda x, axes: np.expand_dims(x, _axes(x, axes)),
}
"""By name; MatMul and Mul broadcast as NumPy does, which is how ONNX defines them."""
