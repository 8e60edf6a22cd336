"""Tokens along several axes, (batch, time), become one axis, so that recognising experts only has to know one.

```
idx (b, t, k) ─▶ reshape (b*t, k) ─▶ what follows from it, on b*t tokens ─▶ reshape (b, t, ...) ─▶ the rest of the model
```
Code that keeps its axes, `out[mask] += expert(x[mask])` with a mask (b, t), computes what flattened code does, as
flattening keeps the order of the rows. So each choice of experts is followed from operator to operator; a rule says
how the same is computed on flat tokens, and an operator without a rule gets values of their original shape. Other
operands, such as `x` and the weights of the gate, are flattened where they are used.

Letters: b, t axes of tokens, k slots, R rows that were picked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.export.axes.choice import as_choice
from moe_export.export.axes.letters import letters_of
from moe_export.export.axes.one_hot import index_axes
from moe_export.export.axes.operators import CASTS, REDUCES, RUNS, SOFTMAXES, VIEWS
from moe_export.export.axes.shapes import arguments, rank_of, with_one_lead
from moe_export.export.experts.flat_values import Flattening
from moe_export.export.torch_compat.operators import arguments_of
from moe_export.export.tracing.programs import copied_module, with_module

_aten = torch.ops.aten
_SIDE_EFFECTS = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}

Rule = Callable[[Flattening, fx.Node], bool]
"""Writes what a node computes for flat tokens; False, with nothing written, if the rule does not apply."""


def with_flat_tokens(program: ExportedProgram) -> ExportedProgram | None:
    """The program with one axis of tokens in what follows from each choice of experts.

    Returns:
        None if no choice has more than one.
    """
    if not any(_choices(program.graph)):
        return None
    module = copied_module(program)
    for indices in _choices(module.graph):
        _flatten(module.graph, indices)
    return with_module(program, module)


def _choices(graph: fx.Graph) -> list[fx.Node]:
    """The indices of every choice of experts whose tokens have several axes."""
    found = [choice.indices for choice in map(as_choice, graph.nodes) if choice is not None]
    return [indices for indices in found if index_axes(indices).count("token") > 1]


def _flatten(graph: fx.Graph, indices: fx.Node) -> None:
    """Follow one choice through the graph, and rewrite what depends on it, in place."""
    nodes = list(graph.nodes)
    flattening = Flattening(graph, indices)
    for node in nodes:
        if node.op != "call_function" or not flattening.follows(node):
            continue
        if node.target in _SIDE_EFFECTS:
            graph.erase_node(node)
            continue
        rule = _rule_of(node)
        if rule is not None and rule(flattening, node):
            flattening.done.add(node)
    for node, flat in flattening.flat.items():
        flattening.hand_back(node, flat)


def _pointwise(flattening: Flattening, node: fx.Node) -> bool:
    rank = rank_of(node)
    sources = {
        source: flattening.expanded(source, node, rank) for source in node.all_input_nodes if rank_of(source)
    }
    if not flattening.leads(node) or None in sources.values():
        return False

    def new(argument: fx.Node) -> Any:
        return sources.get(argument, argument)

    args, kwargs = fx.map_arg(arguments(node), new), fx.map_arg(node.kwargs, new)
    return flattening.known(node, node.target, *args, **kwargs)


def _row_wise(flattening: Flattening, node: fx.Node) -> bool:
    """An operator that computes for each token by itself: axes and sizes are those behind the tokens."""
    if not flattening.leads(node):
        return False
    lead, rank = flattening.axes, max(rank_of(arguments(node)[0]), rank_of(node))
    behind = with_one_lead(node.target, arguments(node), node.kwargs, rank, lead)
    if behind is None:
        return False
    args, kwargs = behind
    for place, (spec, given) in enumerate(zip(arguments_of(node.target), args, strict=False)):
        if isinstance(given, fx.Node) and rank_of(given):
            shared = node.target in _PRODUCTS and rank_of(given) <= 2 and given not in flattening.flat
            made = given if shared else flattening.rows(given, node)
            if made is None or (node.target in _MATRICES and not shared and rank_of(given) != rank_of(node)):
                return False
            args[place] = made
        elif spec.name == "size":
            args[place] = [-1, *given[lead:]]
    return flattening.known(node, node.target, *args, **kwargs)


def _index(flattening: Flattening, node: fx.Node) -> bool:
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
    return flattening.known(node, node.target, source, [flattening.flat[chosen]])


def _put(flattening: Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    indices = arguments(node)[1]
    picked, rows = flattening.picks(indices), flattening.rows(source, node)
    if picked is None or rows is None or arguments(node)[2] in flattening.flat:
        return False
    return flattening.known(node, node.target, rows, picked[0], *arguments(node)[2:])


def _where_set(flattening: Flattening, node: fx.Node) -> bool:
    """The indices of a mask's true entries: a list with one tensor an axis."""
    source = arguments(node)[0]
    if source not in flattening.flat:
        return False
    target: Any = node.target
    with flattening.graph.inserting_before(node):
        found = flattening.graph.call_function(target, (flattening.flat[source],))
    found.meta = {**node.meta, "val": list(node.meta["val"][flattening.axes - 1 :])}
    flattening.masks[node] = found
    return True


def _part(flattening: Flattening, node: fx.Node) -> bool:
    source = arguments(node)[0]
    found = flattening.masks.get(source)
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


def _reshaped(flattening: Flattening, node: fx.Node) -> bool:
    """A reshape: flattening keeps elements and order, so it may start from the flat value."""
    source = arguments(node)[0]
    shape = arguments(node)[1]
    if source not in flattening.flat:
        return False
    rest = list(shape[flattening.axes :])
    if not flattening.leads(node) or -1 in rest:
        return flattening.same(node, _aten.reshape.default, flattening.flat[source], shape)
    return flattening.known(node, _aten.reshape.default, flattening.flat[source], [-1, *rest])


def _own_size(flattening: Flattening, node: fx.Node) -> bool:
    """The number of rows that a mask picked, or the size of an axis after those of the tokens."""
    source = arguments(node)[0]
    axis = arguments(node)[1]
    if source in flattening.places:
        return flattening.same(node, node.target, flattening.places[source][0], 0)
    if source not in flattening.flat or axis < flattening.axes:
        return False
    return flattening.same(node, node.target, flattening.flat[source], axis - flattening.axes + 1)


def _einsum(flattening: Flattening, node: fx.Node) -> bool:
    """An equation whose operands begin with the letters of the tokens, or have none of them."""
    read = letters_of(node)
    known = [part for part, each in zip(read.terms, read.operands, strict=True) if each in flattening.flat]
    lead = known[0][: flattening.axes]
    if not read.out.startswith(lead) or len(set(lead)) < flattening.axes:
        return False
    made, short = [], []
    for part, each in zip(read.terms, read.operands, strict=True):
        rows = each if not set(part) & set(lead) else None
        if part.startswith(lead) and not set(part[len(lead) :]) & set(lead):
            rows, part = flattening.rows(each, node), lead[0] + part[len(lead) :]  # noqa: PLW2901
        if rows is None:
            return False
        made.append(rows)
        short.append(part)
    equation = f"{','.join(short)}->{lead[0]}{read.out[len(lead) :]}"
    return flattening.known(node, node.target, equation, made)


_MATRICES = {_aten.matmul.default, _aten.bmm.default}
_PRODUCTS = {*_MATRICES, _aten.linear.default}
_RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(
        (
            *(CASTS - {_aten.type_as.default}), *SOFTMAXES, *REDUCES, *RUNS, _aten.permute.default,
            _aten.transpose.int, _aten.dropout.default,
            _aten.zeros_like.default, _aten.ones_like.default, _aten.one_hot.default, _aten.select.int,
            _aten.slice.Tensor, _aten.squeeze.dim, _aten.unsqueeze.default, _aten.argmax.default,
            _aten.gather.default, _aten.scatter.value, _aten.scatter.src, _aten.expand.default, *_PRODUCTS,
        ),
        _row_wise,
    ),
    **dict.fromkeys(VIEWS - {_aten.flatten.using_ints}, _reshaped),
    **dict.fromkeys((_aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar), _pointwise),
    **dict.fromkeys((_aten.where.default, _aten.nonzero_numpy.default), _where_set),
    _aten.index.Tensor: _index,
    _aten.index_put.default: _put,
    _aten.sym_size.int: _own_size,
    _aten.einsum.default: _einsum,
    operator.getitem: _part,
}  # fmt: skip


def _rule_of(node: fx.Node) -> Rule | None:
    """The rule for a node's operator; None if there is none."""
    if node.target in _RULES:
        return _RULES[node.target]
    return _pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None
