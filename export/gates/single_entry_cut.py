"""`after_single_entry_cut`: a gate that begins later, after a computation that holds for the traced size only.

    x ─▶ step ─▶ step ─▶ … ─▶ stack ─▶ linear ─▶ softmax ─▶ topk
                                └ the cut: all that the choice depends on enters through this one value

A gate in a model's own `forward` begins at the model's inputs. If a loop over time lies between them, the trace has
one step for each position of the example, and would take that many steps at any length. A gate that begins at the
loop's result is right for every length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from moe_export.export.gates.region import is_size, needed, size_source
from moe_export.export.gates.routing import CONTRACTIONS, Routing


def after_single_entry_cut(routing: Routing, holds: Callable[[fx.Node], bool]) -> Routing:
    """The gate from the first cut on after which every node holds for other sizes.

    Unchanged if all of it holds, or if no cut comes before the last product with a weight: a gate has to keep one.

    Args:
        routing: The gate.
        holds: Whether a node holds for other sizes.
    """
    wanted = (*routing.outputs, *(choice.scores for choice in routing.choices))
    nodes = needed(wanted, set(routing.inputs))
    dependent = set(routing.inputs)
    for node in nodes:
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    order = [*routing.inputs, *(node for node in nodes if node in dependent)]
    place = {node: at for at, node in enumerate(order)}
    last = [max((place[user] for user in node.users if user in place), default=len(order)) for node in order]
    start = max((at for at, node in enumerate(order) if not holds(node)), default=-1)
    end = max((at for at, node in enumerate(order) if node.target in CONTRACTIONS), default=0)
    if start < 0:
        return routing
    for at, cut in enumerate(order[:end]):
        if at <= start or not isinstance(cut.meta.get("val"), torch.Tensor):
            continue
        open_still = [node for before, node in enumerate(order[:at]) if last[before] > at]
        if all(is_size(node) and size_source(node, [cut]) is not None for node in open_still):
            return dataclasses.replace(routing, inputs=(cut,), inner=True)
    return routing
