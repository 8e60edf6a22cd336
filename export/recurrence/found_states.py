"""`FoundStates`: what a folded model keeps of earlier steps, found in its graph, as inputs and outputs of another.

    folded   y[l] = loop(h0, conv(pad(x[l])))              the states of loops start from zeros
    found    y, h', w' = loop(h, conv(w, x)), last h, the last inputs of w and x

What steps need from earlier ones is what a loop carries, and what is padded at the start of a time axis: the window of
a causal convolution, or the token before. Both become `past_*` inputs and `present_*` outputs, and so does the number
of the step if steps compute with it. Everything else is taken to be computed step by step. How many steps the new graph
takes is for subclasses to say: one (`step`), or any number (`decoder/found`).

Letters: l length, w places of a window.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import line_of
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.induction_sequences import COUNT
from moe_export.export.recurrence.loop_body import LoopBody
from moe_export.export.recurrence.step_model import present_of

aten = torch.ops.aten

PROBES = (6, 9)
"""Lengths to run a folded model at: an axis whose size differs between them is time."""
_CONVOLUTIONS = (aten.conv1d.default, aten.convolution.default)
_MAKERS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


def values_of(module: FoldedModule, inputs: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
    """The value of every node in a run."""
    found: dict[fx.Node, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Watch(module, graph=module.graph).run(*inputs)
    return found


class FoundStates(ABC):
    """Copies a folded graph, with its states as inputs and outputs, and windows passed from call to call.

    Args:
        module: The folded model.
        seen: The values of its nodes at `PROBES`.

    Attributes:
        graph: The copy.
        names: The names of its states, `past_*`.
        firsts: What each state is before the first step.
    """

    def __init__(self, module: FoldedModule, seen: Sequence[Mapping[fx.Node, Any]]) -> None:
        self.graph = fx.Graph()
        self.names: list[str] = []
        self.firsts: list[Tensor] = []
        self._seen = seen
        self._presents: dict[str, fx.Node] = {}
        self._copies: dict[fx.Node, Any] = {}
        self._counted: fx.Node | None = None
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._copies[node] = self.graph.node_copy(node)
        self._last = next(reversed(self._copies.values())) if self._copies else None
        for node in module.graph.nodes:
            if node not in self._copies and node.op != "output":
                self._copies[node] = self._copy(node)
        (output,) = [node for node in module.graph.nodes if node.op == "output"]
        results = fx.map_arg(output.args[0], lambda source: self._copies[source])
        self.graph.output((*results, *(self._presents[name] for name in self.names)))
        self.graph.lint()

    @property
    def presents(self) -> list[str]:
        """The names of the states after the step."""
        return [present_of(name) for name in self.names]

    def time(self, node: fx.Node) -> int | None:
        """The axis of a node's value whose size follows the length; None if there is not exactly one."""
        short, long = (values[node] for values in self._seen)
        if not isinstance(short, Tensor):
            return None
        axes = [axis for axis in range(short.dim()) if short.shape[axis] != long.shape[axis]]
        return axes[0] if len(axes) == 1 else None

    def _copy(self, node: fx.Node) -> fx.Node:
        if isinstance(node.target, LoopBody):
            return self._loop(node, node.target)
        if COUNT in node.meta:
            return self._count(node)
        window = self._padding(node)
        if window is not None:
            return self._window(node, *window)
        return self.graph.node_copy(node, lambda source: self._copies[source])

    def _call(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta = dict(node.meta)
        return new

    def _past(self, kind: str, first: Tensor) -> fx.Node:
        name = f"past_{kind}_{sum(other.startswith(f'past_{kind}_') for other in self.names)}"
        self.names.append(name)
        self.firsts.append(first)
        assert self._last is not None
        with self.graph.inserting_after(self._last):
            self._last = self.graph.placeholder(name)
        return self._last

    def _loop(self, node: fx.Node, body: LoopBody) -> fx.Node:
        states: Any = node.args[0]
        assert isinstance(states, (list, tuple))
        if body.least != 1:
            raise NotExportableError(
                "a loop whose first step differs from the others has no model of a step",
                code=Code.NO_STEP,
                where=line_of(node.meta.get("stack_trace")),
            )
        if any(along.backwards for along in (*body.elements, *body.collected)):
            raise NotExportableError(
                "a loop that runs backwards has no model of a step: it needs the whole sequence",
                code=Code.NO_STEP,
                where=line_of(node.meta.get("stack_trace")),
            )
        pasts = []
        for state in states:
            assert isinstance(state, fx.Node)
            pasts.append(self._past("state", self._seen[0][state]))
        names = self.names[len(self.names) - len(pasts) :]
        call = self._iterated(node, body, pasts)
        for place, name in enumerate(names):
            self._presents[name] = self._call(node, operator.getitem, call, place)
        return call

    @abstractmethod
    def _iterated(self, node: fx.Node, body: LoopBody, pasts: list[fx.Node]) -> fx.Node:
        """The call of a loop that starts from states."""

    def _copied(self, arguments: Any) -> Any:
        """Arguments of the folded graph as those of the copy."""
        return fx.map_arg(arguments, lambda source: self._copies[source])

    def _count(self, node: fx.Node) -> fx.Node:
        """The numbers of the steps; how many there were before is a state, (1,) int64, shared by all loops."""
        if self._counted is None:
            self._counted = self._past("count", torch.zeros(1, dtype=torch.int64))
            name = self.names[-1]
            self._presents[name] = self._call(node, aten.add.Tensor, self._counted, self._steps(node))
        return self._numbers(node, self._counted)

    @abstractmethod
    def _steps(self, node: fx.Node) -> Any:
        """How many steps the copy takes, where the folded graph numbers all of them."""

    @abstractmethod
    def _numbers(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The numbers of these steps, after `before` others."""

    def _window(self, node: fx.Node, source: fx.Node, size: int, behind: bool) -> fx.Node:
        """A padding at the start of time, replaced by what came before the step."""
        axis = self.time(source)
        assert axis is not None
        example = self._seen[0][source]
        past = self._past(
            "window", torch.zeros_like(example.narrow(axis, 0, 1)).repeat_interleave(size, axis)
        )
        name = self.names[-1]
        whole = self._call(node, aten.cat.default, [past, self._copies[source]], axis)
        self._presents[name] = self._call(node, aten.slice.Tensor, whole, axis, -size, 2**63 - 1)
        if behind:  # as much is cut off at the end: each step reads the one before
            return self._call(node, aten.slice.Tensor, whole, axis, 0, -size)
        if node.target in _CONVOLUTIONS:
            return self._convolution(node, whole)
        return whole

    def _padding(self, node: fx.Node) -> tuple[fx.Node, int, bool] | None:
        """What a node pads at the start of time, by how much, and whether it cuts off as much at the end; else None."""
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        if node.target is aten.cat.default and len(source) == 2:
            first, source = source
            axis = node.args[1] if len(node.args) > 1 else 0
            if first.target not in _MAKERS or self.time(source) != axis or self.time(first) is not None:
                return None
            return source, self._seen[0][first].shape[axis], False
        if not isinstance(source, fx.Node) or self.time(source) is None:
            return None
        if node.target in (aten.constant_pad_nd.default, aten.pad.default):
            pads: Any = node.args[1]
            place = 2 * (self._seen[0][source].dim() - 1 - (self.time(source) or 0))
            ahead, behind = (*pads[place : place + 2], 0, 0)[:2]
            others = any(pad for at, pad in enumerate(pads) if at not in (place, place + 1))
            return (
                (source, ahead, behind == -ahead)
                if ahead > 0 and behind in (0, -ahead) and not others
                else None
            )
        if node.target in _CONVOLUTIONS and len(node.args) > 4:
            padding: Any = node.args[4]
            return (source, padding[0], False) if len(padding) == 1 and padding[0] else None
        return None

    def _convolution(self, node: fx.Node, whole: fx.Node) -> fx.Node:
        args = list(self._copied(node.args))
        args[0], args[4] = whole, [0]
        return self._call(node, node.target, *args)
