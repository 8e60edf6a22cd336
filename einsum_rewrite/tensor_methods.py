"""`IntTensor`: an array of integers with the methods of PyTorch's tensors that written lines use, and no others.

Lines are proved on it, so that `rewrite --check` needs no PyTorch. Each method gives what PyTorch's gives, and fails
where that fails; a number has no axes here, while PyTorch says that it has one. `test_tensor_methods.py` holds them
against each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Axes = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class IntTensor:
    """A tensor of int64.

    Attributes:
        array: Its values.
    """

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.array.shape

    def __mul__(self, other: IntTensor) -> IntTensor:
        return IntTensor(self.array * other.array)

    def __matmul__(self, other: IntTensor) -> IntTensor:
        return IntTensor(np.asarray(self.array @ other.array))

    def __getitem__(self, index: Any) -> IntTensor:
        return IntTensor(self.array[index])

    def sum(self, dim: Axes | None = None) -> IntTensor:
        """Over some axes, or all."""
        axes = dim if dim is None or isinstance(dim, int) else tuple(dim)
        return IntTensor(np.asarray(self.array.sum(axis=axes)))

    def diagonal(self, *, dim1: int, dim2: int) -> IntTensor:
        """Of two axes, as the last one."""
        return IntTensor(self.array.diagonal(axis1=dim1, axis2=dim2))

    def squeeze(self, dim: Axes) -> IntTensor:
        """Without those of some axes that have size 1."""
        axes = [range(self.array.ndim)[axis] for axis in ((dim,) if isinstance(dim, int) else dim)]
        if len(set(axes)) < len(axes):
            raise ValueError(f"squeeze {dim} of {self.shape}")
        return IntTensor(np.squeeze(self.array, tuple(axis for axis in axes if self.shape[axis] == 1)))

    def unsqueeze(self, dim: int) -> IntTensor:
        """With an axis of size 1."""
        return IntTensor(np.expand_dims(self.array, dim))

    def transpose(self, dim0: int, dim1: int) -> IntTensor:
        """With two axes swapped."""
        return IntTensor(self.array.swapaxes(dim0, dim1))

    def permute(self, *dims: int) -> IntTensor:
        """With all axes in another order."""
        return IntTensor(self.array.transpose(dims))

    def movedim(self, source: Axes, destination: Axes) -> IntTensor:
        """With some axes moved elsewhere."""
        return IntTensor(np.moveaxis(self.array, source, destination))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> IntTensor:
        """With a run of axes as one."""
        first, last = (range(max(self.array.ndim, 1))[axis] for axis in (start_dim, end_dim))
        if first > last:
            raise ValueError(f"flatten from {start_dim} to {end_dim}")
        sizes = self.shape
        return self.reshape(*sizes[:first], math.prod(sizes[first : last + 1]), *sizes[last + 1 :])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> IntTensor:
        """With one axis as several."""
        axis, own = range(self.array.ndim)[dim], self.shape
        if math.prod(sizes) != own[axis]:
            raise ValueError(f"unflatten {own[axis]} into {tuple(sizes)}")
        return self.reshape(*own[:axis], *sizes, *own[axis + 1 :])

    def reshape(self, *shape: int) -> IntTensor:
        """With the same values in another shape, of one axis or more."""
        if not shape:
            raise TypeError("reshape to nothing")
        return IntTensor(self.array.reshape(shape))
