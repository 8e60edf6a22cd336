"""`step_of`: from a folded model, the model of one step: one token and the states in, its results and the states out.

    folded   y[l] = loop(h0, conv(pad(x[l])))              the states of loops start from zeros
    step     y, h', w' = body(h, conv(w, x)), body's h', the last inputs of w and x

What a step needs from earlier steps is what a loop carries, and what is padded at the start of a time axis: the window
of a causal convolution, or the token before. Both become `past_*` inputs and `present_*` outputs, and so does the
number of the step if steps compute with it. Everything else is assumed to be computed step by step, which is then
proved by comparing N steps with one run on N. A model that keeps a cache of its own is handled by `step_cache`.

Letters: l length, w places of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import line_of
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.induction_sequences import COUNT
from moe_export.export.recurrence.loop_body import LoopBody
from moe_export.export.recurrence.recurrences import Recurrent
from moe_export.export.recurrence.step_cache import step_with_cache
from moe_export.export.recurrence.step_model import StepModel, present_of, prove_steps
from moe_export.export.recurrence.transformers_cache import find_cached_model
from moe_export.export.tracing.lengths import Length
from moe_export.export.tracing.trace import quiet

aten = torch.ops.aten

_PROBES = (6, 9)  # lengths to run at: an axis whose size differs between them is time
_CONVOLUTIONS = (aten.conv1d.default, aten.convolution.default)
_MAKERS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


def step_of(subject: Subject, recurrent: Recurrent) -> StepModel:
    """Make the model of a step.

    Args:
        subject: The model.
        recurrent: The same with its loops folded.

    Raises:
        NotExportableError: There is no folded loop, or a step reads others by more than a loop or a window before it.
    """
    cached = find_cached_model(subject.module)
    if cached is not None:
        return step_with_cache(subject, cached)
    folded = recurrent.subject
    module = folded.module
    if len(recurrent.lengths) > 1:
        raise NotExportableError(
            "the model loops over two lengths, so it has no single step",
            code=Code.NO_STEP,
            where=str(subject.source),
            hint="leave out --step, or export the part that is wanted step by step as a model of its own",
        )
    if not recurrent.lengths or not isinstance(module, FoldedModule):
        raise NotExportableError(
            "the model has no loop over a length that could be folded, so it has no step",
            code=Code.NO_STEP,
            where=str(subject.source),
            hint="leave out --step; the notes of the export say why a loop was not folded",
        )
    (length,) = recurrent.lengths
    with quiet(), torch.no_grad():
        examples = [length.resized(folded.inputs, size) for size in _PROBES]
        seen = [_values(module, tuple(example.values())) for example in examples]
        stepping = _Stepping(module, seen)
        one = length.resized(folded.inputs, 1)
        inputs = (*one.values(), *(past.clone() for past in stepping.firsts))
        outputs = [*subject.outputs, *stepping.presents]
        made = make_subject(
            StepModule(module, stepping.graph, outputs), inputs, {}, source=subject.source, how=subject.how
        )
        names = [*one, *stepping.names]
        made = replace(made, inputs=dict(zip(names, made.inputs.values(), strict=True)), root="folded")
        widened = replace(subject, inputs=folded.inputs)  # of the batch that the states were made for
        prove_steps(widened, made, dict(zip(stepping.names, stepping.firsts, strict=True)), length)
        batch = _batch(module, folded, stepping, length)
    return StepModel(made, tuple(stepping.names), batch)


def _batch(
    module: FoldedModule, folded: Subject, stepping: _Stepping, length: Length
) -> tuple[tuple[str, int], ...]:
    """The (input or state, axis) pairs that are the batch: inputs' first axis, or the second if the first is time."""
    axis = 1 if any(place[1] == 0 for place in length.axes) else 0
    places = tuple(
        (name, axis) for name, tensor in folded.inputs.items()
        if tensor.dim() > axis and (name, axis) not in length.axes
    )  # fmt: skip
    if not places:
        return ()
    more = Length(places)
    size = more.of(folded.inputs) + 1
    try:
        examples = [more.resized(length.resized(folded.inputs, probe), size) for probe in _PROBES]
        seen = [_values(module, tuple(example.values())) for example in examples]
    except Exception:  # the model takes no other batch
        return ()
    firsts = _Stepping(module, seen).firsts
    states = zip(stepping.names, stepping.firsts, firsts, strict=True)
    return places + tuple(
        (name, at) for name, one, two in states for at in range(one.dim()) if one.shape[at] != two.shape[at]
    )


class StepModule(nn.Module):
    """The graph of a step, with the weights of the folded model, and its outputs by name."""

    def __init__(self, folded: FoldedModule, graph: fx.Graph, outputs: Sequence[str]) -> None:
        super().__init__()
        self.folded = folded
        self.graph = graph
        self.outputs = tuple(outputs)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """One step."""
        with fx.traceback.preserve_node_meta():
            results = fx.Interpreter(self.folded, graph=self.graph).run(*inputs)
        return dict(zip(self.outputs, results, strict=True))


def _values(module: FoldedModule, inputs: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
    """The value of every node in a run."""
    found: dict[fx.Node, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Watch(module, graph=module.graph).run(*inputs)
    return found


class _Stepping:
    """Copies the folded graph, with loops run for one iteration and windows passed from step to step.

    Attributes:
        graph: The graph of a step.
        names: The names of its states, `past_*`.
        firsts: What each state is before the first step.
    """

    def __init__(self, module: FoldedModule, seen: Sequence[Mapping[fx.Node, Any]]) -> None:
        self.graph = fx.Graph()
        self.names: list[str] = []
        self.firsts: list[Tensor] = []
        self._seen = seen
        self._presents: list[fx.Node] = []
        self._copies: dict[fx.Node, Any] = {}
        self._taken: set[fx.Node] = set()
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
        self.graph.output((*results, *self._presents))
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
        states, sequences, captured, _ = node.args
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
        rest = fx.map_arg((sequences, captured), lambda source: self._copies[source])
        call = self._call(node, _OneIteration(body), pasts, *rest)
        self._presents += [self._call(node, _part, call, place) for place in range(len(states))]
        return call

    def _count(self, node: fx.Node) -> fx.Node:
        """The number of the step, (1,) int64: a state that starts from 0, shared by all loops."""
        if self._counted is None:
            self._counted = self._past("count", torch.zeros(1, dtype=torch.int64))
            self._presents.append(self._call(node, aten.add.Tensor, self._counted, 1))
        return self._counted

    def _window(self, node: fx.Node, source: fx.Node, size: int, behind: bool) -> fx.Node:
        """A padding at the start of time, replaced by what came before the step."""
        axis = self.time(source)
        assert axis is not None
        example = self._seen[0][source]
        past = self._past(
            "window", torch.zeros_like(example.narrow(axis, 0, 1)).repeat_interleave(size, axis)
        )
        whole = self._call(node, aten.cat.default, [past, self._copies[source]], axis)
        self._presents.append(self._call(node, aten.slice.Tensor, whole, axis, 1, 2**63 - 1))
        if behind:  # as much is cut off at the end: each step reads the one before
            return self._call(node, aten.slice.Tensor, whole, axis, 0, 1)
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
        args = list(fx.map_arg(node.args, lambda source: self._copies[source]))
        args[0], args[4] = whole, [0]
        return self._call(node, node.target, *args)


class _OneIteration:
    """A loop's body as a callable, run for the single step of sequences that are one step long."""

    def __init__(self, body: LoopBody) -> None:
        self.body = body
        self.__name__ = f"{body.__name__}_step"

    def __call__(self, states: list[Tensor], sequences: list[Tensor], captured: list[Any]) -> list[Tensor]:
        elements = [
            sequence.select(along.axis, 0)
            for sequence, along in zip(sequences, self.body.elements, strict=True)
        ]
        following, values = self.body.once([*states, *elements, *captured])
        columns = zip(values, self.body.collected, strict=True)
        return [*following, *(value.unsqueeze(along.axis) for value, along in columns)]


def _part(values: Sequence[Tensor], place: int) -> Tensor:
    return values[place]
