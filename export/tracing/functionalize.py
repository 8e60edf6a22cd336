"""A trace without operators that write into their input, made node by node.

`ExportedProgram.run_decompositions({})` does the same by tracing the whole program again, which takes several times as
long as the first trace: of 128 experts in a `ModuleList` five sixths of the time. Here only what has to change is
looked at:

    index_put_(y, [rows], v)      →  y1 = index_put(y, [rows], v); what comes later reads y1
    copy_(select(y, 1, t), v)     →  y1 = select_scatter(y, v, 1, t), for each view that the tensor was seen through
    mm(a, b, out=y)               →  y1 = mm(a, b)
    reshape, to, contiguous, …    →  the operators that they are made of, for the shapes and types at hand

The last are run once on what the trace knows of their arguments; every other node stays as it is, with what is known
of its value. A view that was taken before a write, and is read after it, is taken anew. For writes to what the graph
was given, for operators with graphs of their own, and for whatever else is not known here, PyTorch's own way is taken.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.sizes import expression_of, fixed, same_shape, same_size
from moe_export.export.torch_compat.dispatch import OperatorMode
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.torch_compat.operators import (
    Effect,
    effect_of,
    is_batched,
    is_functional,
    without_writing,
)
from moe_export.export.tracing.programs import copied_module, with_module

_aten = torch.ops.aten

_OTHER_NAMES: dict[Any, Any] = {
    getattr(getattr(_aten, other), overload): getattr(getattr(_aten, name), overload)
    for other, name in {
        "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "greater": "gt", "less": "lt",
        "greater_equal": "ge", "less_equal": "le", "not_equal": "ne",
    }.items()
    for overload in getattr(_aten, other).overloads()
    if overload in getattr(_aten, name).overloads() and not overload.endswith("out")
}  # fmt: skip
"""By an operator with a second name: the one that all else knows, and whose types of numbers the exporter settles."""


class _UnknownError(Exception):
    """Something that PyTorch's own functionalization must see to."""


def functionalized(program: ExportedProgram, *, as_called: bool = False) -> ExportedProgram:
    """The program in functional form.

    Args:
        program: As `torch.export.export` returns it; it stays as it is.
        as_called: Only do away with writes; keep `reshape` and others as the model calls them.
    """
    if as_called and is_functional(program.graph) and not is_batched(program.graph):
        return program
    module = copied_module(program)
    try:
        if is_batched(module.graph):
            raise _UnknownError
        _Rewriting(module.graph, as_called).run()
    except _UnknownError:
        decomposed: ExportedProgram = program.run_decompositions({})
        return decomposed
    return with_module(program, module, keeps=fx.Node.is_impure)


@dataclass(frozen=True)
class _Seen:
    """How a view sees a value.

    Attributes:
        view: The node that takes it, whose operator and arguments say which part.
        source: The value, or a view of it.
    """

    view: fx.Node
    source: fx.Node


@dataclass
class _Rewriting:
    """One pass over a graph, in order. Nodes that nothing reads any more are left behind as dead code.

    Attributes:
        graph: Changed in place.
        as_called: See `functionalized`.
        now: Node → what whoever reads it reads from here on.
        parts: Node that returned several values → these.
        through: View → how it sees its value.
        storage: Node → the node whose value it shares, where that is another.
        before: Node → what is known of it in the model, where it is laid out otherwise now.
        sizes: Expression of a size → the first node that is it.
        writes: By the node that owns a value: how often it was written to.
        upto: Node → the count of writes that it has in it.
    """

    graph: fx.Graph
    as_called: bool
    now: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[fx.Node, Sequence[fx.Node]] = field(default_factory=dict)
    through: dict[fx.Node, _Seen] = field(default_factory=dict)
    storage: dict[fx.Node, fx.Node] = field(default_factory=dict)
    before: dict[fx.Node, Any] = field(default_factory=dict)
    sizes: dict[Any, fx.Node] = field(default_factory=dict)
    writes: dict[fx.Node, int] = field(default_factory=dict)
    upto: dict[fx.Node, int] = field(default_factory=dict)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op in ("get_attr", "call_module", "call_method"):
                raise _UnknownError
            if node.target is operator.getitem and node.args[0] in self.parts:
                self.now[node] = self.parts[node.args[0]][arguments(node)[1]]
                continue
            called = node.args, node.kwargs
            node.args = fx.map_arg(node.args, partial(self._read, node))
            node.kwargs = fx.map_arg(node.kwargs, partial(self._read, node))
            if node.op == "call_function":
                self._rewrite(node, called if self._is_laid_out_anew(called) else None)
            self._note_size(node)
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and (node in self.now or node in self.parts) and not node.users:
                self.graph.erase_node(node)

    def _note_size(self, node: fx.Node) -> None:
        """Remember which node a size is; one that there is already is read instead."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            first = self.sizes.setdefault(expression_of(value), node)
            if first is not node and node.target is _aten.sym_size.int:
                self.now[node] = first

    def _read(self, reader: fx.Node, node: fx.Node) -> fx.Node:
        """What a node reads in the place of another; a view that was taken before a write is taken anew."""
        node = self.now.get(node, node)
        if node in self.parts:
            raise _UnknownError  # several values at once
        if self.upto.get(node, 0) == self.writes.get(self.storage.get(node, node), 0):
            return node
        seen = self.through[node]
        if effect_of(seen.view.target) is Effect.COMPOSITE:
            raise _UnknownError  # a view or a copy
        source = self._read(reader, seen.source)
        with self.graph.inserting_before(reader):
            view = self._call(seen.view, seen.view.target, source, *seen.view.args[1:])  # type: ignore[arg-type]
        self._see(view, source)
        self._becomes(node, view)
        return view

    def _becomes(self, node: fx.Node, other: fx.Node) -> None:
        """From here on, whoever would read the one reads the other."""
        for each in [node, *(before for before, reads in self.now.items() if reads is node)]:
            self.now[each] = other

    def _is_laid_out_anew(self, called: tuple[Any, Any]) -> bool:
        """Whether anything that a node takes has other strides than it has in the model."""
        sources: list[fx.Node] = []
        fx.map_arg(called, sources.append)
        for source in sources:
            now, before = self.now.get(source, source), self.before.get(source, source.meta.get("val"))
            changed = now is not source or source in self.before
            if changed and isinstance(before, torch.Tensor):
                strides = now.meta["val"].stride()
                if not same_shape(before.stride(), strides):
                    return True
        return False

    def _lay_out(self, node: fx.Node) -> None:
        """Work out anew what is known of a value, the layouts of its inputs being others."""
        self.before[node] = node.meta["val"]
        node.meta = {**node.meta, "val": _result(node.target, node.args, node.kwargs)}

    def _rewrite(self, node: fx.Node, called: tuple[Any, Any] | None) -> None:
        """Rewrite one node.

        Args:
            node: With its inputs as they are by now.
            called: Its arguments in the model, where these are laid out otherwise; whether a reshape is a view or a
                copy there is decided by that.
        """
        node.target = _OTHER_NAMES.get(node.target, node.target)
        effect = effect_of(node.target)
        if node.target is _aten.detach_.default:
            self.now[node] = arguments(node)[0]  # without gradients it does nothing
        elif effect is Effect.UNKNOWN:
            raise _UnknownError
        elif effect in (Effect.WRITES, Effect.FILLS):
            self._write(node, node.args[0] if effect is Effect.WRITES else node.kwargs["out"])
        elif effect is Effect.COMPOSITE and not self.as_called:
            self._decompose(node, called)
        elif effect is Effect.COMPOSITE and called is not None:
            raise _UnknownError
        elif called is not None:
            self._lay_out(node)
        if node.target is _aten.lift_fresh_copy.default:
            node.target = _aten.clone.default
        if effect is Effect.VIEWS or (effect is Effect.COMPOSITE and self.as_called):
            self._see(node, node.all_input_nodes[0])
        elif node.target is operator.getitem and arguments(node)[0] in self.storage:
            self._see(node, arguments(node)[0])  # of `split` or `unbind`

    def _see(self, view: fx.Node, source: fx.Node) -> None:
        self.through[view] = _Seen(view, source)
        self.storage[view] = self.storage.get(source, source)
        self.upto[view] = self.upto.get(source, 0)

    def _write(self, node: fx.Node, written: Any) -> None:
        """Put the operator that returns a new value in the place of one that writes, and hand the value on."""
        target = without_writing(node.target)
        if target is None or not isinstance(written, fx.Node):
            raise _UnknownError
        with self.graph.inserting_before(node):
            source = node.args[1] if len(node.args) > 1 else None
            if target is _aten.copy.default and isinstance(source, fx.Node) and _alike(source, written):
                # Of what was there, nothing is left; a value that nobody else reads need not be copied.
                alone = len(source.users) == 1 and source not in self.storage and source.op == "call_function"
                value = source if alone else self._call(node, _aten.clone.default, source)
            else:
                kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
                value = self._call(node, target, *node.args, **kwargs)
            if not _alike(value, written):
                raise _UnknownError
            self._hand_on(node, written, value)
        self.now[node] = value

    def _hand_on(self, node: fx.Node, written: fx.Node, value: fx.Node) -> None:
        """Let what a value is a view of have it, up to the value that the graph made."""
        owner = self.storage.get(written, written)
        if owner.op == "placeholder":
            raise _UnknownError
        self.writes[owner] = self.writes.get(owner, 0) + 1
        while True:
            seen = self.through.get(written)
            self.storage[value], self.upto[value] = owner, self.writes[owner]
            self._becomes(written, value)
            if seen is None:
                return
            put_back = _PUT_BACK.get(seen.view.target)
            if put_back is None:
                raise _UnknownError
            source = self.now.get(seen.source, seen.source)
            whole = put_back(partial(self._call, node), source, value, *seen.view.args[1:])
            if not _alike(whole, source):
                raise _UnknownError
            if whole is not value:  # else the view is all of its source, and both are one value from here on
                self.through[value] = _Seen(seen.view, whole)
            written, value = source, whole

    def _call(self, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {**like.meta, "val": _result(target, made.args, made.kwargs)}
        return made

    def _decompose(self, node: fx.Node, called: tuple[Any, Any] | None) -> None:
        """Write down the operators that one runs on its arguments, in its place."""
        recorded, result = _recorded(node.target, _values((node.args, node.kwargs)))
        if called is not None:
            before = fx.map_arg(called, lambda each: self.before.get(each, each.meta["val"]))
            if [call[0] for call in _recorded(node.target, before)[0].calls] != [
                call[0] for call in recorded.calls
            ]:
                raise _UnknownError  # a view in the one place, a copy in the other
        known: list[tuple[Any, fx.Node]] = [(each.meta["val"], each) for each in node.all_input_nodes]
        with self.graph.inserting_before(node):
            for target, (first, *rest), kwargs, value in recorded.calls:
                args = [first, *([self._with_one_open(known, rest[0])] if target in _TO_SHAPES else rest)]
                given, named = pytree.tree_map(partial(self._as_node, known), (args, kwargs))
                made = self.graph.call_function(target, tuple(given), named)
                made.meta = {**node.meta, "val": value}
                if effect_of(target) is Effect.VIEWS:
                    self._see(made, made.all_input_nodes[0])
                elif effect_of(target) is not Effect.NONE:
                    raise _UnknownError
                known += self._results(made, value)
        made_of = {id(value): made for value, made in known}
        results = result if isinstance(result, (tuple, list)) else [result]
        if any(id(each) not in made_of for each in results):
            raise _UnknownError
        if isinstance(result, (tuple, list)):
            self.parts[node] = [made_of[id(each)] for each in result]
        else:
            self.now[node] = made_of[id(result)]

    def _with_one_open(self, known: Sequence[tuple[Any, fx.Node]], sizes: Sequence[Any]) -> list[Any]:
        """The sizes of a shape; -1 for one that is a product of others."""
        found: list[Any] = []
        for size in sizes:
            try:
                found.append(self._as_node(known, size))
            except _UnknownError:
                if -1 in found:
                    raise
                found.append(-1)
        return found

    def _as_node(self, known: Sequence[tuple[Any, fx.Node]], value: Any) -> Any:
        """A value in the arguments of an operator, as the node that has it, or as a number."""
        number = fixed(value)
        if number is not None or not isinstance(
            value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        ):
            return value if number is None else number
        for each, node in known:
            if each is value:
                return node
        if isinstance(value, torch.SymInt) and expression_of(value) in self.sizes:
            return self.sizes[expression_of(value)]
        for _, node in known:
            axes = shape_of(node) if isinstance(value, torch.SymInt) else ()
            for axis, size in enumerate(axes):
                if same_size(size, value):
                    made = self._call(node, _aten.sym_size.int, node, axis)
                    self._note_size(made)
                    return made
        raise _UnknownError

    def _results(self, made: fx.Node, value: Any) -> list[tuple[Any, fx.Node]]:
        """What a call returned, and the nodes of it."""
        if not isinstance(value, (tuple, list)):
            return [(value, made)]
        found = []
        for place, part in enumerate(value):
            node = self.graph.call_function(operator.getitem, (made, place))
            node.meta = {**made.meta, "val": part}
            if made in self.storage:
                self._see(node, made)
            found.append((part, node))
        return found


_TO_SHAPES = {_aten.view.default, _aten._unsafe_view.default}


class _Recorded(OperatorMode):
    """The operators that ran and returned tensors, with what they were given; others ask for sizes and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        if any(isinstance(each, torch.Tensor) for each in pytree.tree_leaves(result)):
            self.calls.append((func, args, dict(kwargs), result))
        return result


def _values(args: Any) -> Any:
    return fx.map_arg(args, lambda each: each.meta["val"])


def _result(target: Any, args: Any, kwargs: Any) -> Any:
    """What is known of the result of a call."""
    values, keywords = _values((args, kwargs))
    try:
        return target(*values, **keywords)
    except Exception as error:  # a view of what is laid out otherwise
        raise _UnknownError from error


def _recorded(target: Any, arguments: tuple[Any, Any]) -> tuple[_Recorded, Any]:
    """The operators that a call runs, and its result."""
    recorded = _Recorded()
    try:
        with recorded:
            return recorded, target(*arguments[0], **arguments[1])
    except Exception as error:
        raise _UnknownError from error


def _alike(value: fx.Node, other: fx.Node) -> bool:
    one, two = value.meta["val"], other.meta["val"]
    return one.dtype is two.dtype and same_shape(one.shape, two.shape)


Call = Callable[..., fx.Node]


def _squeezed(call: Call, source: fx.Node, value: fx.Node, axis: int) -> fx.Node:
    return call(_aten.squeeze.dim, value, axis)


def _unsqueezed(call: Call, source: fx.Node, value: fx.Node, axis: int) -> fx.Node:
    if rank_of(source) == rank_of(value):  # nothing of size 1 was there
        return value
    return call(_aten.unsqueeze.default, value, axis % rank_of(source))


def _transposed(call: Call, source: fx.Node, value: fx.Node, one: int, other: int) -> fx.Node:
    return call(_aten.transpose.int, value, one, other)


def _permuted(call: Call, source: fx.Node, value: fx.Node, axes: Sequence[int]) -> fx.Node:
    places = [axis % len(axes) for axis in axes]
    return call(_aten.permute.default, value, [places.index(axis) for axis in range(len(axes))])


def _reshaped(call: Call, source: fx.Node, value: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    shape = [
        size if isinstance(size, int) else call(_aten.sym_size.int, source, axis)
        for axis, size in enumerate(shape_of(source))
    ]
    return call(_aten.view.default, value, shape)


_PUT_BACK: Mapping[Any, Callable[..., fx.Node]] = {
    _aten.select.int: lambda call, source, value, *rest: call(
        _aten.select_scatter.default, source, value, *rest
    ),
    _aten.slice.Tensor: lambda call, source, value, *rest: call(
        _aten.slice_scatter.default, source, value, *rest
    ),
    _aten.unsqueeze.default: _squeezed,
    _aten.squeeze.dim: _unsqueezed,
    _aten.transpose.int: _transposed,
    _aten.permute.default: _permuted,
    _aten.view.default: _reshaped,
    **dict.fromkeys((_aten.alias.default, _aten.detach.default), lambda call, source, value: value),
}
"""By the operator of a view: the whole value with the part that the view sees put into it."""
