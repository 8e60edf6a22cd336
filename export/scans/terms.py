"""The values of a loop's body in terms of its states: factors, views of a state, and what is read from one.

Factor    B[n]                     a value, and which axis of a state each of its axes is
Seen      a * h[h, p, n] + B u     a value that is a state, scaled, with products added, in some order of axes
Reading   sum over n of C * h      a value that is read from a state
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.sizes import same_dim

Axes = tuple[tuple[int, ...], ...]
"""For each axis of a value, the axes of the state that it stands for; () for an axis of size 1."""


@dataclass(frozen=True)
class Factor:
    """A value of the step, and which axis of the state each of its axes is; None for one of size 1."""

    value: ir.Value
    labels: tuple[int | None, ...]

    @property
    def axes(self) -> set[int]:
        """The axes of the state that it has."""
        return {label for label in self.labels if label is not None}


@dataclass(frozen=True)
class Seen:
    """A value of the body as a view of a state: `(product of scale) * h + (sum of the products in terms)`.

    Attributes:
        state: The state's number.
        new: Whether h is the state after the step, rather than before it.
        axes: The view: the state's axes that each axis of the value stands for.
    """

    state: int
    new: bool
    axes: Axes
    scale: tuple[Factor, ...] = ()
    terms: tuple[tuple[Factor, ...], ...] = ()


@dataclass(frozen=True)
class Reading:
    """What is read from a state: `value[axes] = sum over `over` of (factors * h + terms)`.

    Attributes:
        state: The state's number.
        new: Whether h is the state after the step, rather than before it.
    """

    value: ir.Value
    state: int
    new: bool
    factors: tuple[Factor, ...]
    over: frozenset[int]
    axes: Axes
    terms: tuple[tuple[Factor, ...], ...] = ()


def axes_of(factors: Iterable[Factor]) -> set[int]:
    """The axes of a state that a product has."""
    return {axis for factor in factors for axis in factor.axes}


def plain(axes: Axes) -> Axes:
    """As many axes as these, each of them the state's axis of the same number."""
    return tuple((place,) for place in range(len(axes)))


def broadcast(value: ir.Value | None, labels: Sequence[int | None]) -> Factor:
    """A value that is broadcast against axes with these labels, as a factor."""
    if value is None or value.shape is None:
        raise RefusedError("a factor of unknown shape")
    kept = labels[len(labels) - len(value.shape) :]
    return Factor(
        value, tuple(None if size == 1 else label for size, label in zip(value.shape, kept, strict=True))
    )


def outer(node: ir.Node, labels: tuple[int | None, ...]) -> tuple[Factor, Factor] | None:
    """The factors of a matrix product over an axis of size 1, which is a product that is broadcast; None for others."""
    left, right = node.inputs
    if left is None or right is None or left.shape is None or right.shape is None:
        return None
    if min(len(left.shape), len(right.shape)) < 2 or left.shape[-1] != 1:
        return None
    return broadcast(left, (*labels[:-1], None)), broadcast(right, (*labels[:-2], None, labels[-1]))


def constant(value: ir.Value | None, rank: int) -> list[int]:
    """The axes in a constant operand, counted from the front.

    Raises:
        RefusedError: The operand is missing, or not a constant.
    """
    tensor = value.const_value if value is not None else None
    if tensor is None:
        raise RefusedError("axes that are not a constant")
    return [int(axis) % rank for axis in tensor.numpy().reshape(-1)]


def regrouped(axes: Sequence[tuple[int, ...]], node: ir.Node) -> list[tuple[int, ...]]:
    """The axes after a reshape that only joins axes, or adds some of size 1.

    Raises:
        RefusedError: It does anything else, or nothing is known of the sizes.
    """
    old, new = node.inputs[0].shape if node.inputs[0] else None, node.outputs[0].shape
    if old is None or new is None:
        raise RefusedError("a Reshape of an unknown shape")
    result: list[tuple[int, ...]] = []
    place = 0
    for size in new:
        if size == 1:
            result.append(())
            continue
        joined: list[int] = []
        product: int | ir.SymbolicDim | None = None
        while place < len(old) and not (product is not None and same_dim(product, size)):
            step = old[place]
            joined += axes[place]
            if product is None:
                product = step
            elif isinstance(product, int) and isinstance(step, int):
                product *= step
            else:
                raise RefusedError("a Reshape of unknown sizes")
            place += 1
        if product is None or not same_dim(product, size):
            raise RefusedError("a Reshape that takes a state's axis apart")
        result.append(tuple(joined))
    return result
