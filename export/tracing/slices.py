"""Slices with bounds beyond the example, traced so that the recorded shape is right for every size.

    x[:, -13:]      at 7 tokens the tracer notes "sequence < 13" and records a result of `sequence` tokens;
                    with its bound as a size, x[:, max(0, sequence - 13):], it records sequence - max(0, sequence - 13)

Python and ONNX cut a bound off at the ends by themselves, so the graph needs no such computation: it is written with
the constants of the model's code and the shape that was recorded. The exporter traces a program once more, so both go
through it in an operator of our own.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from onnxscript.onnx_opset import opset18 as op
from torch import fx

from moe_export.export.tracing.other_forms import InOtherForms

_aten = torch.ops.aten
_PLAIN = (int, slice, torch.SymInt)
_CONSTANTS = "moe_export.bounds"  # in the metadata of a slice
_BOUNDS: dict[Any, tuple[int, int, int]] = {  # where the axis and the bounds stand among the arguments
    _aten.slice.Tensor: (1, 2, 3),
    _aten.slice_scatter.default: (2, 3, 4),
}


@dataclass(frozen=True)
class Bounds:
    """The bounds that were traced as sizes.

    Attributes:
        made: The size of an axis, a bound along it, and the constant that it was made of.
    """

    made: list[tuple[Any, Any, int]] = field(default_factory=list)

    def mark(self, graph: fx.Graph) -> None:
        """Mark the slices of a traced graph whose bounds are constants in the model's code."""
        known = {(_expression(size), _expression(bound)): constant for size, bound, constant in self.made}
        for node in graph.nodes:
            if node.target is _aten.slice.Tensor:
                size = _expression(_size_of(node, 1))
                given = [*node.args[2:4], *(0, sys.maxsize)[len(node.args[2:4]) :]]
                bounds = [
                    known.get((size, _expression(bound.meta["val"]))) if isinstance(bound, fx.Node) else bound
                    for bound in given
                ]
                if bounds != given and None not in bounds:
                    node.meta[_CONSTANTS] = tuple(bounds)

    def item(self, tensor: torch.Tensor, index: Any) -> Any:
        """`tensor[index]`."""
        sized = self._sized(tensor, index)
        return NotImplemented if sized is None else tensor[sized]

    def set_item(self, tensor: torch.Tensor, index: Any, value: Any) -> Any:
        """`tensor[index] = value`."""
        sized = self._sized(tensor, index)
        if sized is None:
            return NotImplemented
        tensor[sized] = value
        return None

    def cut(
        self, tensor: torch.Tensor, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
    ) -> Any:
        """ATen's own: a model whose loops were folded is a graph of operators."""
        part = slice(start, stop, step)
        sized = self._within(part, tensor.shape[axis])
        return (
            NotImplemented
            if sized is part
            else _aten.slice.Tensor(tensor, axis, sized.start, sized.stop, step)
        )

    def _sized(self, tensor: torch.Tensor, index: Any) -> tuple[Any, ...] | None:
        """An index with the bounds of its slices as sizes; None where nothing changes."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is Ellipsis or type(part) in _PLAIN for part in parts):
            return None  # what tensors select has an axis of its own
        named = sum(part is not None and part is not Ellipsis for part in parts)
        axis, result = 0, []
        for part in parts:
            result.append(self._within(part, tensor.shape[axis]) if isinstance(part, slice) else part)
            axis += tensor.dim() - named if part is Ellipsis else part is not None
        return None if all(new is old for new, old in zip(result, parts, strict=True)) else tuple(result)

    def _within(self, part: slice, size: Any) -> slice:
        constant = all(each is None or type(each) is int for each in (part.start, part.stop))
        if not (constant and isinstance(size, torch.SymInt) and any(map(_is_bound, (part.start, part.stop)))):
            return part
        start, stop = self._bound(part.start, size), self._bound(part.stop, size)
        if start is not None and stop is not None:  # a slice that ends before it begins is empty
            stop = self._note(size, torch.sym_max(stop, start), part.stop)  # type: ignore[no-untyped-call]
        return slice(start, stop, part.step)

    def _bound(self, bound: int | None, size: Any) -> Any:
        """-13 → max(0, size - 13); 13 → size - max(0, size - 13), so that the sizes of all slices are alike."""
        if not bound:  # of 0 and None, one is the beginning and the other the end
            return bound
        if bound >= sys.maxsize:
            return None
        beyond = torch.sym_max(size - abs(bound), 0)  # type: ignore[no-untyped-call]
        return self._note(size, beyond if bound < 0 else size - beyond, bound)

    def _note(self, size: Any, bound: Any, constant: int) -> Any:
        self.made.append((size, bound, constant))
        return bound


@contextmanager
def sized_bounds() -> Iterator[Bounds]:
    """While it runs, constant bounds of slices along an axis of free size are traced as sizes that lie within it."""
    bounds = Bounds()
    forms: dict[Any, Any] = {
        torch.Tensor.__getitem__: bounds.item,
        torch.Tensor.__setitem__: bounds.set_item,
        _aten.slice.Tensor: bounds.cut,
    }
    with InOtherForms(forms):
        yield bounds


def has_constant_bounds(graph: fx.Graph, fixed: Collection[int]) -> bool:
    """Whether a slice has a bound that `sized_bounds` would make a size of.

    Args:
        graph: A traced graph.
        fixed: Sizes that the trace fixed, and the model does not: the axes of others are free, or no matter.
    """
    for node in graph.nodes:
        if node.target in _BOUNDS:
            axis, start, end = _BOUNDS[node.target]
            size = _size_of(node, axis)
            free = isinstance(size, torch.SymInt) or size in fixed
            if free and any(map(_is_bound, node.args[start : end + 1])):
                return True
    return False


def _is_bound(bound: Any) -> bool:
    """Whether a bound may lie beyond a tensor: 0 and ±1 are right for any size but 0, and one is "to the end"."""
    return type(bound) is int and 2 <= abs(bound) < sys.maxsize


@torch.library.custom_op(
    "moe_export::slice",
    mutates_args=(),
    schema="(Tensor x, int axis, SymInt start, SymInt stop, int step, int first, int last) -> Tensor",
)
def _slice(
    x: torch.Tensor, axis: int, start: int, stop: int, step: int, first: int, last: int
) -> torch.Tensor:
    """`x[start:stop:step]` along an axis, where first and last are the bounds in the model's code."""
    return _aten.slice.Tensor(x, axis, start, stop, step).clone()  # type: ignore[no-any-return]


_slice.register_fake(
    lambda x, axis, start, stop, step, first, last: _aten.slice.Tensor(x, axis, start, stop, step).clone()
)


def carry_constants(node: fx.Node) -> None:
    """A marked slice of a traced graph → our own, which carries the constants to the translation; in place."""
    constants = node.meta.get(_CONSTANTS)
    if constants is not None:
        missing = (0, 0, sys.maxsize, 1)[len(node.args) - 1 :]
        node.target = torch.ops.moe_export.slice.default
        node.args = (*node.args, *missing, *constants)


def _translated(x: Any, axis: int, start: Any, stop: Any, step: int, first: int, last: int) -> Any:
    numbers: Any = [op.Constant(value_ints=[number]) for number in (first, last, axis, step)]
    return op.Slice(x, *numbers)


TRANSLATIONS: dict[Any, Any] = {torch.ops.moe_export.slice.default: _translated}


def _size_of(node: fx.Node, place: int) -> Any:
    """The size that a slice is taken of: of the tensor that is read or written, along the axis in an argument."""
    axis = node.args[place] if len(node.args) > place else 0
    return node.args[0].meta["val"].shape[axis]  # type: ignore[union-attr]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else size
