"""The primitive steps of a plan, and the layout that each leaves behind.

Seven kinds, of which four compute nothing (they are in `layout`):

    diagonal, sum, multiply, matmul, permute, unsqueeze / squeeze, reshape

Every back-end (torch operators, ONNX nodes, Python source) is one function a kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

from moe_export.einsum_rewrite.layout import (
    UNIT,
    Axis,
    Layout,
    Permute,
    Reshape,
    Squeeze,
    Unsqueeze,
    show_layout,
)


@dataclass(frozen=True)
class Diagonal:
    """Keep the diagonal of two axes of one label; the diagonal becomes the last axis."""

    first: int
    second: int


@dataclass(frozen=True)
class Sum:
    """Sum axes away.

    `alone` says that nothing was multiplied before: then torch widens integers to int64, as `torch.sum` does.
    """

    axes: tuple[int, ...]
    alone: bool


@dataclass(frozen=True)
class Multiply:
    """Multiply two tensors elementwise; axes are aligned from the right and broadcast."""


@dataclass(frozen=True)
class MatMul:
    """`numpy.matmul`: the last two axes are matrices, the others are broadcast; a vector is allowed."""


Action = Diagonal | Sum | Multiply | MatMul | Permute | Unsqueeze | Squeeze | Reshape


@dataclass(frozen=True)
class Step:
    """One line of a plan.

    Attributes:
        action: What is done.
        inputs: The values it is done to: operands come first, then the result of each step.
        layout: Which labels lie on which axis of the result.
    """

    action: Action
    inputs: tuple[int, ...]
    layout: Layout

    @property
    def name(self) -> str:
        """The kind of step in one small word."""
        return type(self.action).__name__.lower()

    @property
    def computes(self) -> bool:
        """Whether the step does arithmetic, rather than only moving data."""
        return isinstance(self.action, Sum | Multiply | MatMul)


def sum_layout(layout: Layout, axes: tuple[int, ...]) -> Layout:
    """The layout after `Sum`."""
    return tuple(axis for i, axis in enumerate(layout) if i not in axes)


def diagonal_layout(layout: Layout, first: int, second: int) -> Layout:
    """The layout after `Diagonal`."""
    return (*sum_layout(layout, (first, second)), layout[first])


def multiply_layout(a: Layout, b: Layout) -> Layout:
    """The layout after `Multiply`."""
    pairs = zip_longest(reversed(a), reversed(b), fillvalue=UNIT)
    return tuple(reversed([_meet(x, y) for x, y in pairs]))


def matmul_layout(a: Layout, b: Layout) -> Layout:
    """The layout after `MatMul`."""
    rows = a[-2:-1]
    columns = b[-1:] if len(b) > 1 else ()
    shared = b[-2] if len(b) > 1 else b[-1]
    if a[-1] != shared:
        raise ValueError(f"matmul of {show_layout(a)} with {show_layout(b)}: the summed axes differ")
    return multiply_layout(a[:-2], b[:-2]) + rows + columns


def _meet(x: Axis, y: Axis) -> Axis:
    if x and y and x != y:
        raise ValueError(f"axes {x} and {y} cannot be aligned")
    return x or y
