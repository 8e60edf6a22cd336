"""Tokens along several axes, (batch, time), become one axis: whoever looks for experts behind it knows one.

```
idx (b, t, k) ─▶ reshape (b*t, k) ─▶ what follows from it, on b*t tokens ─▶ reshape (b, t, ...) ─▶ the rest of the model
```
Code that keeps its axes, `out[mask] += expert(x[mask])` with a mask (b, t), computes what flattened code does:
flattening keeps the order of the rows. So each choice of experts is followed from operator to operator; a rule says
how the same is computed on flat tokens, and what no rule knows is handed values of the shape that it had. Values
beside them, `x` and the weights of the gate, are flattened where they are used.

Letters: b, t axes of tokens, k slots, R rows that were picked.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.export.experts.body import ZEROS
from moe_export.export.experts.mask import index_axes
from moe_export.export.experts.rows import arguments, rank_of, shape_of
from moe_export.export.gates.choice import as_choice
from moe_export.export.tracing import quiet

_aten = torch.ops.aten
_SIDE_EFFECTS = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}


def with_flat_tokens(program: ExportedProgram) -> fx.GraphModule | None:
    """A copy of the program's module in which what follows from each choice of experts has one axis of tokens.

    Returns:
        None if no choice has more than one.
    """
    if not any(_choices(program.graph)):
        return None
    with quiet():
        module: fx.GraphModule = copy.deepcopy(program.graph_module)
    for indices in _choices(module.graph):
        _Flattening(module.graph, indices).run()
    return module


def _choices(graph: fx.Graph) -> list[fx.Node]:
    """The indices of every choice of experts whose tokens have several axes."""
    found = [choice.indices for choice in map(as_choice, graph.nodes) if choice is not None]
    return [indices for indices in found if index_axes(indices).count("token") > 1]


class _Flattening:
    """The values that follow from one choice.

    Attributes:
        flat: Node → the same with one axis of tokens; their axes come first.
        places: A row's place along an axis of tokens, from a mask → its place on the flat axis.
    """

    def __init__(self, graph: fx.Graph, indices: fx.Node) -> None:
        self.graph, self.indices = graph, indices
        self.axes = index_axes(indices).count("token")
        self.lead = _sizes(indices)[: self.axes]
        self.flat: dict[fx.Node, fx.Node] = {}
        self.places: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._beside: dict[fx.Node, fx.Node] = {}
        self._masks: dict[fx.Node, fx.Node] = {}
        self._before, self._done = set(graph.nodes), set[fx.Node]()

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        self.flat[self.indices] = self._reshaped(self.indices, self.indices.next)
        for node in nodes:
            if node.op != "call_function" or not self._follows(node):
                continue
            if node.target in _SIDE_EFFECTS:
                self.graph.erase_node(node)
                continue
            rule = _RULES.get(node.target)
            if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                rule = _pointwise
            if rule is not None and rule(self, node):
                self._done.add(node)
        for node, flat in self.flat.items():
            self._hand_back(node, flat)

    def _follows(self, node: fx.Node) -> bool:
        return any(
            source in self.flat or source in self.places or source in self._masks
            for source in node.all_input_nodes
        )

    def _hand_back(self, node: fx.Node, flat: fx.Node) -> None:
        """Give those that no rule knows the value with its own axes."""
        others = [user for user in node.users if user in self._before and user not in self._done]
        if not others:
            return
        with self.graph.inserting_before(flat.next):
            shape = [self._size(self.indices, axis) for axis in range(self.axes)]
            shape += [self._size(flat, axis) for axis in range(1, rank_of(flat))]
            back = self.graph.call_function(_aten.reshape.default, (flat, shape))
        back.meta = dict(node.meta)
        for user in others:
            user.replace_input_with(node, back)

    def known(self, node: fx.Node, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> bool:
        """Write a value with flat tokens."""
        made = self._call(node, target, args, kwargs)
        made.meta = {**like.meta, "val": self._flat_value(like)}
        self.flat[node] = made
        return True

    def same(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> bool:
        """Write a value that has no axes of tokens in another way."""
        made = self._call(node, target, args, kwargs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        return True

    def rows(self, node: fx.Node, before: fx.Node) -> fx.Node | None:
        """A value that begins with the axes of tokens, flat; None if it does not."""
        if node in self.flat:
            return self.flat[node]
        if _sizes(node)[: self.axes] != self.lead:
            return None
        if node not in self._beside:
            made = self._reshaped(node, before)
            if node.target in ZEROS:  # it is still seen to be nothing
                with self.graph.inserting_before(before):
                    zeros = self.graph.call_function(_aten.zeros_like.default, (made,))
                zeros.meta, made = dict(made.meta), zeros
            self._beside[node] = made
        return self._beside[node]

    def expanded(self, node: fx.Node, before: fx.Node, rank: int) -> fx.Node | None:
        """An operand of an operator that lines operands up from the right, for flat tokens."""
        lined = self.axes - (rank - rank_of(node))  # how many of its axes are those of tokens
        if node in self.flat:
            return self.flat[node] if lined == self.axes else None
        if lined <= 0:
            return node
        sizes = _sizes(node)
        if set(sizes[:lined]) == {"1"}:
            return self._reshaped(node, before, first=1, axes=lined)
        if lined == self.axes and sizes[:lined] == self.lead:
            return self.rows(node, before)
        with self.graph.inserting_before(before):
            lead = [self._size(self.indices, axis) for axis in range(self.axes)]
            wide = self.graph.call_function(_aten.expand.default, (node, [*lead, *[-1] * (rank - self.axes)]))
        shape = [*self.indices.meta["val"].shape[: self.axes], *node.meta["val"].shape[lined:]]
        wide.meta = {**node.meta, "val": node.meta["val"].new_empty(shape)}
        return self._reshaped(wide, before)

    def picks(self, indices: Sequence[Any]) -> tuple[Sequence[Any], int] | None:
        """Indices that pick rows by a mask, or by its places, for flat tokens; and how many axes they stood for."""
        first = indices[0]
        if len(indices) == 1 and first in self.flat and first.meta["val"].dtype is torch.bool:
            return [self.flat[first]], rank_of(first)
        found = [self.places.get(index) for index in indices[: self.axes] if isinstance(index, fx.Node)]
        if len(found) < self.axes or None in found or len({each[0] for each in found if each}) > 1:
            return None
        if [each[1] for each in found if each] != list(range(self.axes)) or found[0] is None:
            return None
        return [found[0][0], *indices[self.axes :]], len(indices)

    def mask(self, node: fx.Node, flat: fx.Node) -> None:
        """Remember the places of a mask's rows, and those of the same mask over flat tokens."""
        self._masks[node] = flat

    def places_of(self, node: fx.Node) -> fx.Node | None:
        return self._masks.get(node)

    def _call(self, node: fx.Node, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node:
        with self.graph.inserting_before(node):
            return self.graph.call_function(target, tuple(args), dict(kwargs))

    def _reshaped(self, node: fx.Node, before: fx.Node, first: int = -1, axes: int | None = None) -> fx.Node:
        """A value whose first axes are one."""
        axes = self.axes if axes is None else axes
        with self.graph.inserting_before(before):
            rest = [self._size(node, axis) for axis in range(axes, rank_of(node))]
            made = self.graph.call_function(_aten.reshape.default, (node, [first, *rest]))
        value = node.meta["val"]
        made.meta = {
            **node.meta,
            "val": value.new_empty([math.prod(value.shape[:axes]), *value.shape[axes:]]),
        }
        return made

    def _flat_value(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        return value.new_empty([math.prod(value.shape[: self.axes]), *value.shape[self.axes :]])

    def _size(self, node: fx.Node, axis: int) -> Any:
        """A size as a number, or as a node put where the graph is written to."""
        size = node.meta["val"].shape[axis]
        if str(size).isdigit():
            return int(size)
        made = self.graph.call_function(_aten.sym_size.int, (node, axis))
        made.meta["val"] = size
        return made


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in shape_of(node)]


Rule = Callable[[_Flattening, fx.Node], bool]
"""Write what a node computes for flat tokens; whether that is known."""


def _like(flattening: _Flattening, node: fx.Node) -> bool:
    """Copies, casts, and what else takes its first operand element by element."""
    source = arguments(node)[0]
    if source not in flattening.flat:
        return False
    return flattening.known(
        node, node, node.target, flattening.flat[source], *arguments(node)[1:], **node.kwargs
    )


def _pointwise(flattening: _Flattening, node: fx.Node) -> bool:
    rank = rank_of(node)
    sources = {
        source: flattening.expanded(source, node, rank) for source in node.all_input_nodes if rank_of(source)
    }
    if _sizes(node)[: flattening.axes] != flattening.lead or None in sources.values():
        return False

    def new(argument: fx.Node) -> Any:
        return sources.get(argument, argument)

    args, kwargs = fx.map_arg(arguments(node), new), fx.map_arg(node.kwargs, new)
    return flattening.known(node, node, node.target, *args, **kwargs)


def _along(position: int, extra: int = 0) -> Rule:
    """An operator along axes that are none of the tokens."""

    def rule(flattening: _Flattening, node: fx.Node) -> bool:
        source = arguments(node)[0]
        if source not in flattening.flat or len(arguments(node)) <= position:
            return False
        given = arguments(node)[position]
        axes = given if isinstance(given, (list, tuple)) else [given]
        if not axes or not all(isinstance(axis, int) for axis in axes):
            return False
        own = [axis % (rank_of(source) + extra) for axis in axes]
        if min(own) < flattening.axes:
            return False
        moved = [axis - flattening.axes + 1 for axis in own]
        args = list(arguments(node))
        args[0], args[position] = flattening.flat[source], moved if given is axes else moved[0]
        kwargs = dict(node.kwargs)
        if any(isinstance(arg, fx.Node) and rank_of(arg) for arg in args[1:]):
            return False
        return flattening.known(node, node, node.target, *args, **kwargs)

    return rule


def _gathered(flattening: _Flattening, node: fx.Node) -> bool:
    """`gather` and `scatter` along an axis behind those of the tokens."""
    operands: Any = (arguments(node)[0], *arguments(node)[2:])
    axis = arguments(node)[1]
    if not isinstance(axis, int) or axis % rank_of(node) < flattening.axes:
        return False
    made = [flattening.rows(each, node) if isinstance(each, fx.Node) else each for each in operands]
    if None in made:
        return False
    axis = axis % rank_of(node) - flattening.axes + 1
    return flattening.known(node, node, node.target, made[0], axis, *made[1:], **node.kwargs)


def _index(flattening: _Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    indices = arguments(node)[1]
    picked = flattening.picks(indices)
    if picked is not None:
        rows = flattening.rows(source, node)
        if rows is None or picked[1] > rank_of(source):
            return False
        return flattening.same(node, node.target, rows, picked[0])
    chosen = indices[0]
    if len(indices) != 1 or chosen not in flattening.flat or chosen.meta["val"].dtype is torch.bool:
        return False
    if source in flattening.flat:
        return False
    return flattening.known(node, node, node.target, source, [flattening.flat[chosen]])


def _put(flattening: _Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    indices = arguments(node)[1]
    picked, rows = flattening.picks(indices), flattening.rows(source, node)
    if picked is None or rows is None or arguments(node)[2] in flattening.flat:
        return False
    return flattening.known(node, node, node.target, rows, picked[0], *arguments(node)[2:])


def _where_set(flattening: _Flattening, node: fx.Node) -> bool:
    """The places of a mask's rows, a list with a value an axis."""
    source = arguments(node)[0]
    if source not in flattening.flat:
        return False
    target: Any = node.target
    with flattening.graph.inserting_before(node):
        found = flattening.graph.call_function(target, (flattening.flat[source],))
    found.meta = {**node.meta, "val": list(node.meta["val"][flattening.axes - 1 :])}
    flattening.mask(node, found)
    return True


def _part(flattening: _Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    found = flattening.places_of(source)
    if found is None:
        return False
    axis = arguments(node)[1]
    if axis >= flattening.axes:
        return flattening.same(node, operator.getitem, found, axis - flattening.axes + 1)
    places = next((each for each in found.users if each.args == (found, 0)), None)
    if places is None:
        with flattening.graph.inserting_after(found):
            places = flattening.graph.call_function(operator.getitem, (found, 0))
        places.meta = dict(node.meta)
    flattening.places[node] = (places, axis)
    return True


def _reshaped(flattening: _Flattening, node: fx.Node) -> bool:
    """Of the same elements in the same order."""
    source = arguments(node)[0]
    shape = arguments(node)[1]
    if source not in flattening.flat:
        return False
    rest = list(shape[flattening.axes :])
    if _sizes(node)[: flattening.axes] != flattening.lead or -1 in rest:
        return flattening.same(node, _aten.reshape.default, flattening.flat[source], shape)
    return flattening.known(node, node, _aten.reshape.default, flattening.flat[source], [-1, *rest])


def _own_size(flattening: _Flattening, node: fx.Node) -> bool:
    """How many rows were picked, or a size behind those of the tokens."""
    source = arguments(node)[0]
    axis = arguments(node)[1]
    if source in flattening.places:
        return flattening.same(node, node.target, flattening.places[source][0], 0)
    if source not in flattening.flat or axis < flattening.axes:
        return False
    return flattening.same(node, node.target, flattening.flat[source], axis - flattening.axes + 1)


def _expand(flattening: _Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    shape = arguments(node)[1]
    if source not in flattening.flat or rank_of(source) != rank_of(node):
        return False
    flat = flattening.flat[source]
    return flattening.known(node, node, node.target, flat, [-1, *shape[flattening.axes :]])


def _permute(flattening: _Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    order = [axis % rank_of(node) for axis in arguments(node)[1]]
    lead = flattening.axes
    if source not in flattening.flat or order[:lead] != list(range(lead)):
        return False
    moved = [0, *(axis - lead + 1 for axis in order[lead:])]
    return flattening.known(node, node, node.target, flattening.flat[source], moved)


def _transpose(flattening: _Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    axes = [int(axis) % rank_of(node) for axis in arguments(node)[1:3]]
    if source not in flattening.flat or min(axes) < flattening.axes:
        return False
    moved = [axis - flattening.axes + 1 for axis in axes]
    return flattening.known(node, node, node.target, flattening.flat[source], *moved)


def _linear(flattening: _Flattening, node: fx.Node) -> bool:
    return _like(flattening, node) if not set(node.all_input_nodes[1:]) & flattening.flat.keys() else False


def _matmul(flattening: _Flattening, node: fx.Node) -> bool:
    """Operands that begin with the axes of tokens, or are one matrix for all."""
    if _sizes(node)[: flattening.axes] != flattening.lead:
        return False
    made = []
    for source in arguments(node):
        assert isinstance(source, fx.Node)
        one = rank_of(source) <= 2 and source not in flattening.flat
        rows = source if one else flattening.rows(source, node)
        if rows is None or (not one and rank_of(source) != rank_of(node)):
            return False
        made.append(rows)
    return flattening.known(node, node, node.target, *made)


def _einsum(flattening: _Flattening, node: fx.Node) -> bool:
    """An equation whose operands begin with the letters of the tokens, or have none of them."""
    equation, operands = str(arguments(node)[0]).replace(" ", ""), arguments(node)[1]
    assert isinstance(operands, (list, tuple))
    terms, arrow, out = equation.partition("->")
    parts = terms.split(",")
    known = [part for part, each in zip(parts, operands, strict=True) if each in flattening.flat]
    lead = known[0][: flattening.axes]
    if not arrow or "." in equation or not out.startswith(lead) or len(set(lead)) < flattening.axes:
        return False
    made, short = [], []
    for part, each in zip(parts, operands, strict=True):
        assert isinstance(each, fx.Node)
        rows = each if not set(part) & set(lead) else None
        if part.startswith(lead) and not set(part[len(lead) :]) & set(lead):
            rows, part = flattening.rows(each, node), lead[0] + part[len(lead) :]  # noqa: PLW2901
        if rows is None:
            return False
        made.append(rows)
        short.append(part)
    equation = f"{','.join(short)}->{lead[0]}{out[len(lead) :]}"
    return flattening.known(node, node, node.target, equation, made)


_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(
        (
            _aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.clone.default,
            _aten.alias.default, _aten.detach.default, _aten.contiguous.default, _aten.dropout.default,
            _aten.zeros_like.default, _aten.ones_like.default, _aten.one_hot.default,
        ),
        _like,
    ),
    **dict.fromkeys(
        (
            _aten.any.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.amin.default, _aten.mean.dim,
            _aten.softmax.int, _aten._softmax.default, _aten.select.int, _aten.slice.Tensor, _aten.squeeze.dim,
            _aten.argmax.default, _aten.cumsum.default,
        ),
        _along(1),
    ),
    **dict.fromkeys((_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default), _reshaped),
    **dict.fromkeys((_aten.gather.default, _aten.scatter.value, _aten.scatter.src), _gathered),
    **dict.fromkeys((_aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar), _pointwise),
    **dict.fromkeys((_aten.where.default, _aten.nonzero_numpy.default), _where_set),
    **dict.fromkeys((_aten.matmul.default, _aten.bmm.default), _matmul),
    _aten.unsqueeze.default: _along(1, extra=1),
    _aten.index.Tensor: _index,
    _aten.index_put.default: _put,
    _aten.sym_size.int: _own_size,
    _aten.expand.default: _expand,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.linear.default: _linear,
    _aten.einsum.default: _einsum,
    operator.getitem: _part,
}  # fmt: skip
