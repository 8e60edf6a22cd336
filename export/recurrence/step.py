"""`step_of`: from a folded model, the model of one step: one token and the states in, its results and the states out.

    folded   y[l] = loop(h0, conv(pad(x[l])))              the states of loops start from zeros
    step     y, h', w' = body(h, conv(w, x)), body's h', the last inputs of w and x

What a step needs from earlier steps is found in the folded graph (`found_states`) and becomes `past_*` inputs and
`present_*` outputs. Everything else is assumed to be computed step by step, which is then proved by comparing N steps
with one run on N. A model that keeps a cache of its own is handled by `step_cache`.

Letters: l length, w places of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.found_states import PROBES, FoundStates, values_of
from moe_export.export.recurrence.loop_body import LoopBody
from moe_export.export.recurrence.recurrences import Recurrent
from moe_export.export.recurrence.step_cache import step_with_cache
from moe_export.export.recurrence.step_model import StepModel, prove_steps
from moe_export.export.recurrence.transformers_cache import find_cached_model
from moe_export.export.tracing.lengths import Length
from moe_export.export.tracing.trace import quiet

aten = torch.ops.aten


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
        examples = [length.resized(folded.inputs, size) for size in PROBES]
        seen = [values_of(module, tuple(example.values())) for example in examples]
        stepping = _OneStep(module, seen)
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
    module: FoldedModule, folded: Subject, stepping: _OneStep, length: Length
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
        examples = [more.resized(length.resized(folded.inputs, probe), size) for probe in PROBES]
        seen = [values_of(module, tuple(example.values())) for example in examples]
    except Exception:  # the model takes no other batch
        return ()
    firsts = _OneStep(module, seen).firsts
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


class _OneStep(FoundStates):
    """The graph of a single step: loops run for one iteration."""

    def _iterated(self, node: fx.Node, body: LoopBody, pasts: list[fx.Node]) -> fx.Node:
        _, sequences, captured, _ = node.args
        return self._call(node, _OneIteration(body), pasts, *self._copied((sequences, captured)))

    def _steps(self, node: fx.Node) -> int:
        return 1

    def _numbers(self, node: fx.Node, before: fx.Node) -> fx.Node:
        return before


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
