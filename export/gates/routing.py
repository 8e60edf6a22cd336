"""Find the gates in a traced model: which experts each token goes to, and with which weights.

A gate is recognised by what it does, never by its name: scores over a fixed number of experts, a choice among
them along the last dimension (`topk`, `argmax`, `max`), and indices that are then used to send tokens somewhere
(or returned, for a model that is only a gate). Choosing the next word, or a class, does not count: a word vector
is looked up in a table, and a class is returned at the end of a whole network.

The weights are the chosen scores after any normalisation. A gate begins where values enter its module; if that
module only chooses (its logits are computed outside), the module around it is taken, up to the model itself.

Letters: e experts, k choices a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.choice import CARRIERS, Choice, as_choice, is_part
from moe_export.export.axes.shapes import shape_of
from moe_export.export.frontend.source import line_of
from moe_export.export.gates.region import ancestors, frontier, inside, scope_of
from moe_export.export.gates.tokens import as_token_choice
from moe_export.export.gates.weights import weights_of
from moe_export.export.sizes import expression_of, same_shape, same_size
from moe_export.export.tracing.trace import Traced

_aten = torch.ops.aten

# Ops that use indices to send tokens to experts, or to mark who goes where.
_DISPATCHERS = {
    _aten.one_hot.default, _aten.eq.Scalar, _aten.eq.Tensor, _aten.ne.Scalar, _aten.scatter.value,
    _aten.scatter.src, _aten.scatter_add.default, _aten.bincount.default, _aten.histc.default,
    _aten.argsort.default, _aten.argsort.stable, _aten.sort.default, _aten.sort.stable, _aten.index.Tensor,
    _aten.index_select.default, _aten.index_put.default,
    _aten.searchsorted.Tensor, _aten.where.default, _aten.nonzero.default,
}  # fmt: skip
# Operators that split the choices of tokens into first choices, second choices, …
_TAKES_APART = {_aten.chunk.default, _aten.split.Tensor, _aten.unbind.int}
_COMPARISONS = {_aten.eq.Scalar, _aten.ne.Scalar}
_LOOKUPS = {_aten.index.Tensor, _aten.index_select.default}
# A model with one of these before its choice is more than a gate: a classifier, a language model.
_NO_GATE = {_aten.embedding.default, _aten.convolution.default, _aten.scaled_dot_product_attention.default}
_GATE_CONTRACTIONS = 2  # a linear layer, or two of them: the logits and their noise, or a small network
CONTRACTIONS = {
    _aten.linear.default, _aten.matmul.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default,
    _aten.einsum.default,
}  # fmt: skip


@dataclass(frozen=True)
class Routing:
    """One gate.

    Attributes:
        path: Path of the gate's module in the user's model; `model` for the model itself.
        line: `file:line` of the choice.
        experts: e.
        choices: One `topk`, or one `argmax` for each of the k choices, first choice first.
        weights: One value for each choice, of the shape of its indices; empty where no weights were found.
        inputs: The values that enter the gate.
        inner: `inputs` are computed inside the gate's module, rather than passed to it.
    """

    path: str
    line: str | None
    experts: int
    choices: tuple[Choice, ...]
    weights: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    inner: bool = False

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return (*(choice.indices for choice in self.choices), *self.weights)


def find_routings(traced: Traced) -> tuple[Routing, ...]:
    """Every gate of the model, in the order in which the model runs them."""
    graph = traced.program.graph
    choices = [choice for node in graph.nodes if (choice := as_choice(node)) is not None]
    choices = [choice for choice in choices if _dispatches(choice)] or [
        choice for choice in choices if _is_returned_by_a_gate(choice)
    ]
    choices = _without_group_choices(choices)
    choices += [choice for node in graph.nodes if (choice := as_token_choice(node)) is not None]
    return tuple(_as_routing(group, traced) for group in _by_gate(choices))


def _carried(start: fx.Node) -> list[fx.Node]:
    """A value and everything that only rearranges it."""
    stack, seen = [start], {start: None}
    while stack:
        value = stack.pop()
        apart = value.target in _TAKES_APART
        for user in value.users:
            if (user.target in CARRIERS | _TAKES_APART or (apart and is_part(user))) and user not in seen:
                seen[user] = None
                stack.append(user)
    return list(seen)


def _dispatches(choice: Choice) -> bool:
    """Whether the indices, possibly rearranged, send tokens to experts."""
    uses = [(user, node) for node in _carried(choice.indices) for user in node.users]
    if any(user.target in _DISPATCHERS - _COMPARISONS and _sends(user, node) for user, node in uses):
        return True
    if any(_picks_results(user, node, choice) for user, node in uses):
        return True
    # A loop over experts compares with each of them; a single comparison only asks for one particular index.
    compared = {user.args[1] for user, _ in uses if user.target in _COMPARISONS}
    return len(compared) > 1 or choice.experts == 1 == len(compared)


def _sends(user: fx.Node, indices: fx.Node) -> bool:
    """Experts are looked up in stacked weights, (e, d, f); a table of vectors, (e, d), is a vocabulary."""
    source = user.args[0]
    return user.target not in _LOOKUPS or source is indices or len(shape_of(source)) > 2


def _picks_results(user: fx.Node, indices: fx.Node, choice: Choice) -> bool:
    """`results.gather(1, indices)`: every expert computed every token, and rows are picked, (..., e, d)."""
    if user.target is not _aten.gather.default or user.args[2] is not indices:
        return False
    sizes, axis = shape_of(user.args[0]), user.args[1]
    assert isinstance(axis, int)
    behind = axis % len(sizes) < len(sizes) - 1
    return behind and len(sizes) > len(shape_of(choice.scores)) and same_size(sizes[axis], choice.experts)


def _is_returned_by_a_gate(choice: Choice) -> bool:
    """Whether the model is nothing but a gate: a small computation of scores, and a choice that is returned."""
    if choice.operator.target is not _aten.topk.default:
        return False
    before = [node.target for node in ancestors([choice.scores])]
    if _NO_GATE.intersection(before) or sum(target in CONTRACTIONS for target in before) > _GATE_CONTRACTIONS:
        return False
    return any(user.op == "output" for node in _carried(choice.indices) for user in node.users)


def _without_group_choices(choices: list[Choice]) -> list[Choice]:
    """Drop a choice among groups of experts that only prepares a later choice among more experts."""
    return [
        choice
        for choice in choices
        if not any(
            later is not choice
            and later.experts > choice.experts
            and scope_of(later.operator)[-1:] == scope_of(choice.operator)[-1:]
            and choice.operator in ancestors([later.scores])
            for later in choices
        )
    ]


def _by_gate(choices: list[Choice]) -> Iterator[tuple[Choice, ...]]:
    """One `topk` is a gate; so are the `argmax`es of one module over the same experts (first choice, second...)."""
    singles: dict[tuple[Any, ...], list[Choice]] = {}
    for choice in choices:
        if choice.operator.target is _aten.topk.default:
            yield (choice,)
        else:
            sizes = tuple(map(expression_of, shape_of(choice.indices)))
            key = (scope_of(choice.operator), sizes, choice.experts)
            singles.setdefault(key, []).append(choice)
    yield from (tuple(group) for group in singles.values())


def _as_routing(choices: tuple[Choice, ...], traced: Traced) -> Routing:
    scope = _gate_scope(choices)
    weights: list[fx.Node] = []
    for choice in choices:
        found = weights_of(choice, scope, taken=weights)
        if found is not None:
            weights.append(found)
    if len(weights) != len(choices):
        weights = []
    outputs = [*(choice.indices for choice in choices), *weights]
    path = scope[-1].removeprefix(f"{traced.scope}.") if scope else traced.scope
    return Routing(
        path=path,
        line=line_of(choices[0].operator.meta.get("stack_trace")),
        experts=choices[0].experts,
        choices=choices,
        weights=tuple(weights),
        inputs=tuple(frontier(outputs, scope)),
    )


def _gate_scope(choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """The innermost module around the choice in which the scores are computed from a weight."""
    scope = scope_of(choices[0].operator)
    while len(scope) > 1:
        found = inside([choice.scores for choice in choices], scope)
        if any(node.target in CONTRACTIONS for node in found):
            return scope
        scope = scope[:-1]
    return scope


def _ends_in_choices(choice: Choice) -> bool:
    return choice.tokens is None or choice.tokens == len(shape_of(choice.indices)) - 1


def routing_outputs(routing: Routing, traced: Traced) -> list[tuple[str, str | None, None]]:
    """Outputs of the model that are this gate's indices, at most rearranged, with those that are its weights.

    An index output counts only while its last dimension still is the k choices of one token.
    """
    choice = routing.choices[0]
    if choice.operator.target is not _aten.topk.default or not _ends_in_choices(choice):
        return []
    k = shape_of(choice.indices)[-1:]
    nodes = {node.name: node for node in traced.program.graph.nodes}
    # The program also returns the buffers that it changes; they are not the user's outputs.
    results = [nodes[str(name)] for name in traced.program.graph_signature.user_outputs]
    named = list(zip(traced.outputs, results, strict=True))

    def carried(start: fx.Node) -> list[str]:
        carriers, stack = {start}, [start]
        while stack:
            for user in stack.pop().users:
                if user.target in CARRIERS and user not in carriers and same_shape(shape_of(user)[-1:], k):
                    carriers.add(user)
                    stack.append(user)
        return [name for name, node in named if node in carriers]

    weights = carried(routing.weights[0]) if routing.weights else []
    return [(name, weights[0] if weights else None, None) for name in carried(choice.indices)]
