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

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.export.axes.choice import as_choice
from moe_export.export.axes.one_hot import index_axes
from moe_export.export.experts.flat_rules import rule_of
from moe_export.export.experts.flat_values import Flattening
from moe_export.export.tracing.programs import copied_module

_aten = torch.ops.aten
_SIDE_EFFECTS = {_aten._assert_tensor_metadata.default, _aten._assert_scalar.default}


def with_flat_tokens(program: ExportedProgram) -> fx.GraphModule | None:
    """A copy of the program's module in which what follows from each choice of experts has one axis of tokens.

    Returns:
        None if no choice has more than one.
    """
    if not any(_choices(program.graph)):
        return None
    module = copied_module(program)
    for indices in _choices(module.graph):
        _flatten(module.graph, indices)
    return module


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
        rule = rule_of(node)
        if rule is not None and rule(flattening, node):
            flattening.done.add(node)
    for node, flat in flattening.flat.items():
        flattening.hand_back(node, flat)
