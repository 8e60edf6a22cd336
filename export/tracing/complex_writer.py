"""`Pair`, a complex value as two real ones, and `Writer`, which writes what these are computed by.

    z = x + iy      Pair(x, y)      each with the shape of z      None for a part that is 0 everywhere

That a part is 0 is known of what was real before (`u.to(torch.complex64)`, `1j * a`), and saves the products with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import fx

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import line_and_text
from moe_export.export.sizes import expression_of, same_shape

_aten = torch.ops.aten

Part = fx.Node | float | None
"""A real value: a tensor of the graph, one number for all entries, or None for 0."""


class Pair:
    """A complex value.

    Attributes:
        real: Its real part; None for 0, but not of both parts.
        imag: Its imaginary part.
    """

    def __init__(self, real: Part, imag: Part) -> None:
        self._parts = real, imag

    @property
    def real(self) -> Part:
        return self.parts[0]

    @property
    def imag(self) -> Part:
        return self.parts[1]

    @property
    def parts(self) -> tuple[Part, Part]:
        """Both; what is written only when it is asked for is written now."""
        return self._parts


def is_complex(value: object) -> bool:
    """Whether what a trace knows of a value is a complex tensor, or several values with one among them."""
    if isinstance(value, (list, tuple)):
        return any(map(is_complex, value))
    return isinstance(value, torch.Tensor) and value.is_complex()


def parts_of(value: Any) -> tuple[Part, Part]:
    """The parts of an operand: a pair, a real tensor, or a number."""
    if isinstance(value, Pair):
        return value.parts
    if isinstance(value, complex):
        return (value.real or None, value.imag) if value.imag else (value.real, None)
    return value, None


class Writer:
    """Writes the nodes that stand for one node of a graph, in front of it.

    Args:
        graph: Changed.
        mode: What values of the trace are computed in.
    """

    def __init__(self, graph: fx.Graph, mode: AbstractContextManager[Any]) -> None:
        self.graph = graph
        self._mode = mode
        self._sizes: dict[Any, fx.Node] = {}
        self.node = next(iter(graph.nodes))

    @property
    def shape(self) -> torch.Size:
        """Of the value of the node that is being replaced."""
        return self.node.meta["val"].shape  # type: ignore[no-any-return]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write a node; it has the line and the module of the node that it stands for."""
        value = self.value_of(target, args, kwargs)
        with self.graph.inserting_before(self.node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {**self.node.meta, "val": value}
        return made

    def value_of(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What is known of the result of a call."""
        given, named = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        with self._mode:
            return target(*given, **named)

    def view(self, target: Callable[..., Any], value: fx.Node, *rest: Any) -> fx.Node:
        """A view of a value, or of a copy of it."""
        return self.call(target, self.viewable(target, value, *rest), *rest)

    def viewable(self, target: Callable[..., Any], value: fx.Node, *rest: Any) -> fx.Node:
        """A value, or a copy of it that is laid out in memory so that there is such a view."""
        try:
            self.value_of(target, (value, *rest), {})
        except (RuntimeError, ValueError):
            return self.contiguous(value)
        return value

    def contiguous(self, value: fx.Node) -> fx.Node:
        """A copy in the usual layout."""
        return self.call(_aten.clone.default, value, memory_format=torch.contiguous_format)

    def refuse(self, what: str | None = None) -> NoReturn:
        """Refuse the node, by the name of its operator and its line."""
        name = str(self.node.target).removesuffix(".default")
        raise NotExportableError(
            what or f"operator {name} of complex numbers has no ONNX form",
            code=Code.COMPLEX,
            where=line_and_text(self.node.meta.get("stack_trace")),
            hint="write that line with the real and the imaginary part (x.real, x.imag), as tensors of their own",
        )

    # Real arithmetic that knows 0

    def add(self, one: Part, other: Part) -> Part:
        if one is None or other is None:
            return other if one is None else one
        if not isinstance(one, fx.Node):
            if not isinstance(other, fx.Node):
                return one + other
            one, other = other, one
        return self.call(_aten.add.Tensor, one, other)

    def sub(self, one: Part, other: Part) -> Part:
        if one is None or not isinstance(other, fx.Node):
            return self.add(one, self.neg(other))
        if not isinstance(one, fx.Node):
            return self.add(one, self.neg(other))
        return self.call(_aten.sub.Tensor, one, other)

    def neg(self, part: Part) -> Part:
        if part is None or not isinstance(part, fx.Node):
            return None if part is None else -part
        return self.call(_aten.neg.default, part)

    def mul(self, one: Part, other: Part) -> Part:
        if one is None or other is None:
            return None
        if not isinstance(one, fx.Node):
            one, other = other, one
        if not isinstance(one, fx.Node):
            return one * other  # type: ignore[operator]
        if not isinstance(other, fx.Node) and other in (1, -1):
            return one if other == 1 else self.neg(one)
        return self.call(_aten.mul.Tensor, one, other)

    def square(self, part: Part) -> Part:
        return self.mul(part, part)

    def zeros(self, like: fx.Node) -> fx.Node:
        """0 in the shape and type of a value."""
        return self.call(_aten.zeros_like.default, like)

    # Whole values

    def whole(self, value: Any) -> tuple[fx.Node, fx.Node]:
        """Both parts of a pair, as tensors."""
        real, imag = parts_of(value)
        like = next(part for part in (real, imag) if isinstance(part, fx.Node))
        return self._tensor(real, like), self._tensor(imag, like)

    def _tensor(self, part: Part, like: fx.Node) -> fx.Node:
        if isinstance(part, fx.Node):
            return part
        return self.zeros(like) if part is None else self.call(_aten.full_like.default, like, part)

    def fitted(self, value: Pair, wanted: torch.Tensor) -> Pair:
        """A pair whose parts have the type and the shape of a complex value."""
        real, imag = value.parts
        if not isinstance(real, fx.Node | None) or not isinstance(imag, fx.Node | None):
            real, imag = self.whole(value)
        parts = [self.cast(part, wanted.dtype.to_real()) for part in (real, imag)]
        there = [part for part in parts if part is not None]
        if not all(_has(part, wanted) for part in there):
            full = next((part for part in there if _has(part, wanted)), None)
            if full is None and len(there) == 2:
                full = self.call(_aten.add.Tensor, *there)
            if full is not None:
                zeros = self.zeros(full)
                parts = [
                    part if part is None or _has(part, wanted) else self.call(_aten.add.Tensor, part, zeros)
                    for part in parts
                ]
        return Pair(*parts)

    def cast(self, part: fx.Node | None, dtype: torch.dtype) -> fx.Node | None:
        """A value in another type."""
        if part is None or part.meta["val"].dtype is dtype:
            return part
        return self.call(_aten._to_copy.default, part, dtype=dtype)

    def typed(self, value: Any) -> Pair:
        """An operand in the type of the result, as integers have to be made floats."""
        dtype = self.node.meta["val"].dtype.to_real()
        return Pair(
            *(self.cast(part, dtype) if isinstance(part, fx.Node) else part for part in parts_of(value))
        )

    # Sizes

    def number(self, target: Callable[..., Any], *args: Any) -> Any:
        """A number that sizes come to: a plain one, or the node of it."""
        if not any(isinstance(each, fx.Node) for each in args):
            return target(*args)
        return _plain(self.call(target, *args))

    def size(self, value: fx.Node, axis: int) -> Any:
        """A size of a value: a plain number, or the node of it."""
        size = value.meta["val"].shape[axis]
        expression = expression_of(size)
        if isinstance(expression, int):
            return expression
        if expression not in self._sizes:
            self._sizes[expression] = self.call(_aten.sym_size.int, value, axis % value.meta["val"].dim())
        return self._sizes[expression]


def _plain(node: fx.Node) -> Any:
    expression = expression_of(node.meta["val"])
    return (
        int(expression) if getattr(expression, "is_Integer", False) or isinstance(expression, int) else node
    )


def _has(part: fx.Node, wanted: torch.Tensor) -> bool:
    return same_shape(part.meta["val"].shape, wanted.shape)


VIEWS = (_aten.view.default, _aten._unsafe_view.default)
"""What fails on values that are laid out otherwise in memory."""
