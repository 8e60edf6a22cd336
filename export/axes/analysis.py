"""What the axes of every value of a program mean: worked out once, operator by operator, in the order of the graph.

`axes/rules` has the table of operators. A value of an operator without a rule begins anew: nothing is known of its axes
until they are lined up with others, and the order of the entries of what it read matters from there on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from moe_export.export.axes.choice import as_choice
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.rules import COMPUTES, rule_of
from moe_export.export.axes.shapes import shape_of
from moe_export.export.sizes import expression_of

_NO_VALUES = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default}


def meanings_of(graph: fx.Graph, names: Mapping[str, str] | None = None) -> Meanings:
    """The meaning of each value of a program.

    Args:
        graph: The program's graph.
        names: The names of free sizes, by their symbols in the trace: `{"s77": "batch"}`.
    """
    meanings = Meanings()
    for node in graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        if node.target in _NO_VALUES or not all(isinstance(each, torch.Tensor) for each in values):
            continue
        if node.op in ("placeholder", "get_attr"):
            meanings.found[node] = (_given(meanings, node, names or {}),)
        elif node.op == "call_function":
            meanings.found[node] = _made(meanings, node)
            _note_choice(meanings, node)
    return meanings


def _given(meanings: Meanings, node: fx.Node, names: Mapping[str, str]) -> Meaning:
    found = meanings.anew(shape_of(node))
    for axis in found.axes:
        for extent in axis:
            extent.name = names.get(str(expression_of(extent.size)), "")
    return found


def _made(meanings: Meanings, node: fx.Node) -> tuple[Meaning, ...]:
    rule = rule_of(node)
    found = rule(meanings, node) if rule is not None else None
    if found is None:
        meanings.lost.append(node)
        for source in node.all_input_nodes:
            meanings.used(source, node)
        value = node.meta["val"]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(meanings.unknown(each.shape, node) for each in values)
    if rule in COMPUTES:
        for source in node.all_input_nodes:
            meanings.computed_with(source, node)
    return found if isinstance(found, tuple) else (found,)


def _note_choice(meanings: Meanings, node: fx.Node) -> None:
    choice = as_choice(node)
    if choice is None:
        return
    *tokens, experts = meanings.axes(choice.scores)
    meanings.tokens.append(tuple(tokens))
    meanings.extents.call(experts, "expert")
    for axis in tokens:
        meanings.extents.call(axis, "token")
