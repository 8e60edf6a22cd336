"""`found_decoder`: from a model that keeps nothing, the model of new tokens after earlier ones.

    model     y[b, l] = loop(zeros, x), softmax(q kᵀ[l, l] + mask[l, l]) v
    decoder   y[b, n] = loop(past, x), softmax(q[n] cat(past, k)ᵀ[p + n] + mask[p:p + n, :p + n]) cat(past, v)

Its loops are folded, and what goes from step to step becomes inputs and outputs (`steps`). That this is what the model
computes is not known here; it is proved by comparing it, in parts, with the model.

Letters: b batch, l length, n new tokens, p earlier tokens, q queries, k keys, v values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from moe_export.export.decoder.in_parts import Made
from moe_export.export.decoder.steps import StepsAfterOthers
from moe_export.export.decoder.whole import DecoderModule, TokenOutputs, Whole
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.found_states import PROBES, values_of
from moe_export.export.recurrence.step_model import present_of
from moe_export.export.recurrence.transformers_cache import CACHE
from moe_export.export.tracing.dims import BATCH, PAST, SEQUENCE
from moe_export.export.tracing.lengths import Length

_EXAMPLE = (2, 7, 5)  # batch, earlier and new tokens, no two sums of which are alike


class PlainCall(Whole):
    """A model that takes tokens and nothing else."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @property
    def words(self) -> int:
        """How many ids its first table has; 2 if it has none."""
        tables = (part for part in self.subject.module.modules() if isinstance(part, nn.Embedding))
        return next((table.num_embeddings for table in tables), 2)

    def of(self, subject: Subject) -> PlainCall:
        """The same of a copy of the model."""
        return PlainCall(subject)

    def run(self, tokens: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> list[Tensor]:
        """Call it once."""
        return list(self.subject.call([tokens[name] for name in self.subject.inputs]))


class FoundDecoder(DecoderModule):
    """The graph of new tokens, with the weights of the folded model, and its outputs by name."""

    def __init__(
        self,
        whole: Whole,
        results: TokenOutputs,
        folded: FoldedModule,
        graph: fx.Graph,
        outputs: Sequence[str],
    ) -> None:
        super().__init__(whole, (), results)
        self.folded, self.graph, self._outputs = folded, graph, tuple(outputs)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call."""
        with fx.traceback.preserve_node_meta():
            found = fx.Interpreter(self.folded, graph=self.graph).run(*tensors)
        return dict(zip(self._outputs, found, strict=True))


def found_decoder(subject: Subject, folded: Subject, length: Length) -> Made:
    """Make the decoder, without a look at what it computes.

    Args:
        subject: The model.
        folded: The same with its loops folded.
        length: What was folded over.

    Raises:
        NotExportableError: A loop runs backwards, or its first step differs from the others.
    """
    module = folded.module
    assert isinstance(module, FoldedModule)
    batch, past, new = _EXAMPLE
    rows = Length(tuple((name, 0) for name in folded.inputs))
    seen, more = (
        [
            values_of(module, tuple(length.resized(rows.resized(folded.inputs, size), probe).values()))
            for probe in PROBES
        ]
        for size in (batch, batch + 1)
    )
    found = StepsAfterOthers(module, seen)
    names = {name: f"{CACHE}.{place}" for name, place in zip(found.names, found.places, strict=True)}
    firsts = dict(zip(names.values(), found.firsts, strict=True))
    larger = StepsAfterOthers(module, more).firsts
    call = PlainCall(subject)
    tokens = rows.resized(subject.inputs, batch)
    results = call.token_outputs({size: length.resized(tokens, size) for size in (past, past + 1)})
    outputs = [*subject.outputs, *(present_of(name) for name in names.values())]
    decoder = FoundDecoder(call, results, module, found.graph, outputs)
    earlier = length.resized(tokens, past)
    with torch.no_grad():
        before = decoder(*earlier.values(), *(first.clone() for first in firsts.values()))
    inputs = {**length.resized(tokens, new), **{name: before[present_of(name)].clone() for name in firsts}}
    made = make_subject(decoder, tuple(inputs.values()), {}, source=subject.source, how=subject.how)
    made = replace(made, inputs=dict(zip(inputs, made.inputs.values(), strict=True)), root="folded")
    free: dict[tuple[str, int], str] = {(name, 0): BATCH for name in earlier}
    free |= dict.fromkeys(length.axes, SEQUENCE)
    for (name, first), other in zip(firsts.items(), larger, strict=True):
        free |= {(name, axis): BATCH for axis in range(first.dim()) if first.shape[axis] != other.shape[axis]}
    free |= {(names[name], axis): PAST for name, axis in found.grows.items()}
    return Made(made, free, firsts, length)
