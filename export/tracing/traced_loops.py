"""A folded loop in a traced program: one iteration between opaque nodes, its boundary; and how to run it.

    State(h0) ─▶ h ─┐
    Element(xs) ─▶ x ┴▶ the body ─▶ h', y ─▶ End(h, x, h', y) ─▶ h after the last iteration, all y along an axis

`recurrence.loop_body` traces it so, and `scans` cuts it out. To PyTorch these nodes are opaque, and give nothing. Run
by `RunsLoops`, a program with loops computes what the model does, so that it can be held against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moe_export.export.torch_compat.opaque import opaque_attributes, opaque_operator
from moe_export.export.tracing.gathered_products import looked_up, only_multiplied, product

DOMAIN = "moe_export.loop"
STATE, ELEMENT, END = "State", "Element", "End"


def of_loops(graph: fx.Graph) -> frozenset[str]:
    """The names of the nodes in loops, and of those that loops read: loops decide on the order of their axes."""
    waiting = [node for node in graph.nodes if (opaque_operator(node) or ("", ""))[0] == DOMAIN]
    found = set(waiting)
    while waiting:
        before = [node for node in waiting.pop().all_input_nodes if node not in found]
        found.update(before)
        waiting += before
    return frozenset(node.name for node in found)


class RunsLoops(fx.Interpreter):
    """Runs a traced program, its loops iteration by iteration.

    The body is run with the first iteration's elements where it stands; at its end, once more for each further one.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        # An iteration reads what others have read; without loops, values of no further use are given back.
        loops = any(opaque_operator(node) == (DOMAIN, END) for node in module.graph.nodes)
        super().__init__(module, garbage_collect_values=not loops)
        self._gathered = {node for node in module.graph.nodes if only_multiplied(node)}

    def run_node(self, n: fx.Node) -> Any:
        operator = opaque_operator(n)
        if operator == (DOMAIN, STATE):
            return self.env[_source(n)]
        if operator == (DOMAIN, ELEMENT):
            return self._element(n, 0)
        if operator == (DOMAIN, END):
            return self._all_iterations(n)
        if n in self._gathered:
            stack, (ids,) = self.fetch_args_kwargs_from_env(n)[0]
            return looked_up(stack, ids)
        if n.target is torch.ops.aten.bmm.default:
            return product(*self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)

    def _element(self, marker: fx.Node, iteration: int) -> Tensor:
        sequence, said = self.env[_source(marker)], opaque_attributes(marker)
        axis, count = said["axis"], sequence.shape[said["axis"]]
        if count == 0:  # the body is run on zeros, for the shapes of what it gives
            return sequence.new_zeros([*sequence.shape[:axis], *sequence.shape[axis + 1 :]])  # type: ignore[no-any-return]
        return sequence.select(axis, count - 1 - iteration if said["backwards"] else iteration)  # type: ignore[no-any-return]

    def _all_iterations(self, end: fx.Node) -> list[Tensor]:
        said, given = opaque_attributes(end), iter(_nodes(end))
        states, elements, following = (
            [next(given) for _ in range(said[count])] for count in ("states", "elements", "states")
        )
        collected = list(given)
        first = elements[0]
        count = self.env[_source(first)].shape[opaque_attributes(first)["axis"]]
        body = _body(end, {*states, *elements})
        last = [self.env[state] for state in states]
        rows = []
        for iteration in range(count):
            if iteration:
                self.env |= zip(states, last, strict=True)
                self.env |= {element: self._element(element, iteration) for element in elements}
                for node in body:
                    self.env[node] = self.run_node(node)
            last = [self.env[node] for node in following]
            rows.append([self.env[node] for node in collected])
        if not rows:
            values = [self.env[node] for node in collected]
            columns = [
                value.unsqueeze(axis).narrow(axis, 0, 0)
                for value, axis in zip(values, said["axes"], strict=False)
            ]
            return [*last, *columns]
        alongs = zip(zip(*rows, strict=True), said["axes"], said["backwards"], strict=False)
        return [*last, *(torch.stack(c[::-1] if backwards else c, axis) for c, axis, backwards in alongs)]


def _nodes(marker: fx.Node) -> Sequence[fx.Node]:
    given: Any = marker.args[0]
    return list(given)


def _source(marker: fx.Node) -> fx.Node:
    return _nodes(marker)[0]


def _body(end: fx.Node, markers: set[fx.Node]) -> list[fx.Node]:
    """The nodes in front of the end that depend on the loop's states and elements, in order."""
    depends, found = set(markers), []
    for node in end.graph.nodes:
        if node is end:
            break
        if node not in depends and not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            found.append(node)
    return found
