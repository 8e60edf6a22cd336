"""What engines exchange: NumPy arrays by name, and the types that describe them.

bfloat16 and the 8-bit floats have no NumPy type of their own; `ml_dtypes` provides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moe_export.errors import UsageError

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Args:
        name: The name under which arrays are exchanged.
        dtype: A NumPy or ml_dtypes name: "float32", "int64", "bfloat16", ...
        shape: A size an axis; a string is a dynamic dimension ("batch") or an integer expression of
            some ("2*sequence + 1").
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class DimRange:
    """A dynamic dimension: the size it was traced with, and the sizes that it may take (both inclusive)."""

    name: str
    traced: int
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.maximum is not None and self.maximum < self.minimum:
            raise UsageError(
                f"dimension '{self.name}': maximum {self.maximum} is below minimum {self.minimum}"
            )

    def clamp(self, size: int) -> int:
        """The nearest size that the range allows."""
        highest = size if self.maximum is None else self.maximum
        return max(self.minimum, min(size, highest))


@dataclass(frozen=True)
class RoutingPair:
    """Outputs that belong together: expert ids, their weights, and the scores they were picked by.

    Args:
        indices: Output of expert ids, integer (..., k), in any order along the last axis.
        weights: Output of the experts' weights, (..., k), ordered as `indices`; None if there is none.
        scores: Output of the reference alone (or of both), (..., experts); without it no tie is excused.
    """

    indices: str
    weights: str | None = None
    scores: str | None = None


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype called `name`, from NumPy or from ml_dtypes.

    Raises:
        UsageError: Neither knows the name.
    """
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise UsageError(f"unknown dtype '{name}'", hint="use a NumPy name, as float32 or int64") from None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is a float, those of ml_dtypes included (NumPy's own test calls bfloat16 "void")."""
    return dtype.name.startswith(("float", "bfloat"))


def describe(array: Array) -> str:
    """`float32[2, 10]`."""
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"
