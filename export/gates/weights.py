"""Which values are the weights of a gate's choice: the chosen scores, after any normalisation.

`topk` returns the chosen scores itself; where those are not used (a bias took part in the choice only) or there
are none (`argmax`), they are what is read from the scores by the chosen indices.
"""

from __future__ import annotations

import torch
from torch import fx

from moe_export.export.axes.choice import Choice, is_part
from moe_export.export.axes.shapes import shape_of
from moe_export.export.gates.region import ancestors, is_float, is_within
from moe_export.export.sizes import same_shape

_aten = torch.ops.aten

# Ops that turn chosen scores into weights: the value stays in the same argument and keeps its shape.
_NORMALISERS = {
    _aten.div.Tensor, _aten.div.Scalar, _aten.mul.Tensor, _aten.mul.Scalar, _aten.softmax.int, _aten._softmax.default,
    _aten.sigmoid.default, _aten._to_copy.default, _aten.to.dtype, _aten.type_as.default, _aten.clone.default,
    _aten.clamp.default, _aten.clamp_min.default, _aten.relu.default, _aten.detach.default,
    _aten.contiguous.default, _aten.alias.default, _aten.masked_fill.Scalar, _aten.add.Scalar,
}  # fmt: skip
_WITH_ANOTHER = {_aten.div.Tensor, _aten.mul.Tensor}


def weights_of(choice: Choice, scope: tuple[str, ...], taken: list[fx.Node]) -> fx.Node | None:
    """The weights that go with chosen indices, of the same shape; None if there are none to be found.

    Args:
        choice: The choice.
        scope: The gate's module; weights are looked for inside it.
        taken: Weights of the gate's other choices.
    """
    current = _chosen_scores(choice, scope, taken)
    chain = [current]
    while current is not None:
        chain.append(current)
        following = [user for user in current.users if _normalises(user, chain, choice, scope)]
        if not following:
            break
        current = following[-1]
    return current


def _normalises(node: fx.Node, chain: list[fx.Node | None], choice: Choice, scope: tuple[str, ...]) -> bool:
    """Whether a node normalises weights, rather than using them.

    Divided by their own sum or times a scale they still are weights; times a mask of one expert's tokens they are not:
    such a mask depends on the indices, but not through the weights.
    """
    current = chain[-1]
    if (
        node.target not in _NORMALISERS
        or not (node.args[0] is current or node.target is _aten.mul.Tensor)
        or not same_shape(shape_of(node), shape_of(current))
        or not is_float(node)
        or not is_within(node, scope)
    ):
        return False
    others = [arg for arg in node.args if isinstance(arg, fx.Node) and arg is not current]
    return node.target not in _WITH_ANOTHER or all(_is_a_scale(other, chain, choice) for other in others)


def _is_a_scale(other: fx.Node, chain: list[fx.Node | None], choice: Choice) -> bool:
    known = [node for node in chain if node is not None]
    before = ancestors([other], since=min(choice.indices, *known))
    return choice.indices not in before or not before.isdisjoint(known)


def _chosen_scores(choice: Choice, scope: tuple[str, ...], taken: list[fx.Node]) -> fx.Node | None:
    if choice.values is not None and choice.values.users:
        return choice.values
    return _maximum_of(choice) or _read_by_indices(choice, scope, taken)


def _read_by_indices(choice: Choice, scope: tuple[str, ...], taken: list[fx.Node]) -> fx.Node | None:
    """The first float of the indices' shape that depends on them and, past the choice, on scores."""
    shape = shape_of(choice.indices)
    scores = {
        node
        for node in ancestors([choice.scores])
        if is_float(node) and same_shape(shape_of(node)[-1:], (choice.experts,))
    }
    of_indices, of_scores = {choice.indices}, set(scores)
    nodes: list[fx.Node] = list(choice.indices.graph.nodes)
    for node in nodes:
        if node.op != "call_function" or node is choice.operator or node in of_indices:
            continue
        if not of_scores.isdisjoint(node.all_input_nodes):
            of_scores.add(node)
        if of_indices.isdisjoint(node.all_input_nodes):
            continue
        of_indices.add(node)
        fits = same_shape(shape_of(node), shape) and is_float(node) and is_within(node, scope)
        if fits and node in of_scores and node not in taken:
            return node
    return None


def _maximum_of(choice: Choice) -> fx.Node | None:
    """`argmax` beside a `max` of the same scores, as in Switch Transformers."""
    for user in choice.scores.users:
        if user.target is _aten.amax.default and same_shape(shape_of(user), shape_of(choice.indices)):
            found: fx.Node = user
            return found
        if user.target is _aten.max.dim:
            parts: list[fx.Node] = [part for part in user.users if is_part(part) and part.args[1] == 0]
            return parts[0] if parts else None
    return None
