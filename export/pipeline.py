"""`export_subject`: from a `Subject` to graphs, by `stages.PIPELINE`; first the model, then its gates and its step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch

from moe_export.einsum_rewrite import Site
from moe_export.errors import MoeExportError, UsageError
from moe_export.export.axes.choice import may_choose
from moe_export.export.decoder.decoder import Decoder, decoder_of
from moe_export.export.frontend.ended import no_exit
from moe_export.export.frontend.subject import Subject
from moe_export.export.gates.gate import (
    INDICES,
    SCORES,
    WEIGHTS,
    entering,
    gate_subject,
    numbers_in,
    numbers_of,
)
from moe_export.export.gates.routing import Routing, find_routings, routing_outputs
from moe_export.export.gates.single_entry_cut import after_single_entry_cut
from moe_export.export.onnx.functions import described
from moe_export.export.onnx.opset import check_opset
from moe_export.export.options import Options
from moe_export.export.precision.mixed import check_kept
from moe_export.export.quantize.quantize import Quantized
from moe_export.export.recurrence.recurrences import Recurrent
from moe_export.export.recurrence.step import step_of
from moe_export.export.sizes import fixed
from moe_export.export.stages import PIPELINE, Draft, Model, Program, Step, between, run, without
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.trace import Traced, functional


@dataclass(frozen=True)
class Graph:
    """A finished graph, with what is needed to verify it.

    Attributes:
        kind: The whole model, its decoder, a gate cut out of it, or one step of its recurrences.
        path: Module path of what it computes; `model` for the model itself.
        reference: Computes the same in PyTorch. May return scores (`SCORES`) that the graph does not.
        routing: Names of outputs that are expert indices, with their weights and scores (or None).
        sites: The einsums that were rewritten.
        notes: What a reader of the report should know.
        dtype: The narrowest type that it computes in.
        wide: The same graph in float32, where `dtype` is another.
        quantized: What weights were packed, and the graphs to hold it against; None if none was.
        program: The traced model with its experts as opaque nodes: what the graphs of several ranks are made from.
    """

    kind: Literal["model", "decoder", "gate", "step"]
    path: str
    model: ir.Model
    reference: Subject
    traced: Traced
    routing: tuple[tuple[str, str | None, str | None], ...]
    sites: tuple[Site, ...]
    notes: tuple[str, ...]
    dtype: str = "float32"
    wide: ir.Model | None = None
    program: Program | None = None
    quantized: Quantized | None = None

    @classmethod
    def of(
        cls, draft: Draft, kind: Literal["model", "decoder", "gate", "step"], path: str, options: Options
    ) -> Graph:
        """The graph at the end of its way."""
        program, wide = draft.program, draft.wide
        dtype = "float32" if wide is None else options.dtype
        reference, traced = program.model.subject, program.traced
        return cls(
            kind,
            path,
            draft.model,
            reference,
            traced,
            (),
            program.sites,
            draft.notes,
            dtype,
            wide,
            program,
            draft.quantized,
        )


@no_exit()
def export_subject(subject: Subject, options: Options, step: Step = nullcontext) -> tuple[Graph, ...]:
    """Export a model: its graph, then the graph of each of its gates.

    Args:
        subject: The model.
        options: The user's choices.
        step: Called with the name of each long step; shows progress.

    Raises:
        UsageError: The opset is out of range or too low, or there is no gate at the path that was asked for.
        NotExportableError: The model, or an operator in it, has no ONNX form.
    """
    check_opset(options.opset)
    check_packing(options)
    check_attention(options)
    asked = options
    begun, first = Model.of(subject, options.dims), "fold"
    decoder: Decoder | None = None
    if options.decoder:
        with step("making a decoder of it"):
            decoder = decoder_of(subject)
        subject, options = decoder.subject, dataclasses.replace(options, dims=decoder.dims(options.dims))
        begun, first = _begun(decoder, options)
    program = run(between(first, "trace"), begun, options, step)
    traced = program.model.unrolled or program.traced  # gates are cut out of what has no marks of loops
    if program.model.unrolled is not None and may_choose(traced.program.graph):
        traced = functional(traced)
    routings = find_routings(traced)
    chosen = choose(routings, options.gates, folded=program.model.unrolled is not None)
    rest = between("outline", PIPELINE[-1].name)
    whole = Graph.of(
        run(rest, program, options, step), "decoder" if options.decoder else "model", "model", options
    )
    check_kept(whole.model, options.float32)
    outputs = tuple(pair for routing in routings for pair in routing_outputs(routing, traced))
    graphs = [dataclasses.replace(whole, routing=outputs)]
    if decoder is not None:
        graphs[0] = dataclasses.replace(graphs[0], traced=decoder.from_nothing(graphs[0].traced))
    held = [_where_it_holds(routing, traced) for routing in chosen]
    examples = entering(traced, held)
    for routing in held:
        try:
            graphs.append(_gate_graph(routing, subject, traced, asked, step, examples))
        except MoeExportError as error:
            if isinstance(options.gates, str):
                raise
            note = f"the gate of {routing.path} could not be cut out: {error.what.splitlines()[0]}"
            graphs[0] = dataclasses.replace(graphs[0], notes=(*graphs[0].notes, note))
    if options.decode:
        with step("finding the states of a step"):
            stepped = step_of(subject, program.model.recurrent)
        dims = stepped.dims(program.model.dims)
        draft = run(without("fold"), Model.of(stepped.subject, dims), options, step)
        graphs.append(Graph.of(draft, "step", "model", options))
    return tuple(graphs)


def check_packing(options: Options) -> None:
    """Refuse packed weights that the opset has no operator for.

    Raises:
        UsageError: Says which opset has one.
    """
    scheme = options.scheme
    if scheme is None:
        return
    if options.opset < scheme.opset:
        raise UsageError(
            f"opset {options.opset} has no operator for {scheme}", hint=f"opset={scheme.opset} or newer"
        )


def check_attention(options: Options) -> None:
    """Refuse ONNX Runtime's operator of attention where it is not run.

    Raises:
        UsageError: The graph is no decoder, or for another engine.
    """
    if options.attention == "standard":
        return
    if not options.decoder:
        raise UsageError("--attention contrib is about a decoder's keys and values", hint="add --decoder")
    if options.target != "onnxruntime-cpu":
        raise UsageError(
            f"--attention contrib is for onnxruntime-cpu, not for {options.target}",
            hint="leave --attention away: standard operators run everywhere",
        )


def _begun(decoder: Decoder, options: Options) -> tuple[Model, str]:
    """What is traced of a decoder, and the stage that it begins with: one that was folded to make it is not again."""
    recurrent, dims = decoder.recurrent, options.dims
    if recurrent is None:
        apart = None if options.target.startswith("tensorrt") else decoder.apart
        return Model(decoder.subject, Recurrent(apart or decoder.subject), dims), "fold"
    return Model(decoder.subject, recurrent, recurrent.dims(dims), recurrent.notes), "trace"


def choose(routings: tuple[Routing, ...], gates: bool | str, *, folded: bool) -> tuple[Routing, ...]:
    """The gates to cut out: all, none, or one; of a gate in a loop that was folded, not every iteration's."""
    if isinstance(gates, bool):
        if folded:  # the trace has it once per iteration: `cell`, `cell@1`, ...
            first = {routing.path.partition("@")[0]: routing for routing in reversed(routings)}
            routings = tuple(first.values())[::-1]
        return routings if gates else ()
    found = tuple(routing for routing in routings if routing.path == gates)
    if not found:
        paths = ", ".join(routing.path for routing in routings)
        raise UsageError(
            f"no gate in module {gates!r}",
            hint=f"the gates of this model: {paths}" if paths else "no gate was recognised in this model",
        )
    return found


def _gate_graph(
    routing: Routing,
    subject: Subject,
    traced: Traced,
    options: Options,
    step: Step,
    examples: Mapping[torch.fx.Node, torch.Tensor],
) -> Graph:
    """The graph of one gate. Its reference also returns the scores, by which ties are judged."""
    with step(f"cutting out the gate of {routing.path}"):
        cut = gate_subject(traced, routing, subject, examples=examples)
    dims = gate_dims(cut, options.dims, traced, routing.inputs)
    draft = run(without("fold", "outline", "quantize"), Model.of(cut, dims), options, step)
    return dataclasses.replace(
        Graph.of(draft, "gate", routing.path, options),
        reference=gate_subject(traced, routing, subject, with_scores=True, examples=examples),
        routing=((INDICES, WEIGHTS if WEIGHTS in cut.outputs else None, SCORES),),
    )


def _where_it_holds(routing: Routing, traced: Traced) -> Routing:
    """The gate, begun behind what holds for a size only that the model's trace fixed, as a loop's steps."""
    sizes = _of_the_trace(traced)
    return after_single_entry_cut(routing, lambda node: not numbers_of(node) & sizes)


def _of_the_trace(traced: Traced) -> set[int]:
    """The sizes that the trace fixed, and the model does not."""
    return {each.size for each in traced.fixed if each.model_takes_others}


def gate_dims(
    cut: Subject, dims: DimRequest, traced: Traced, inputs: Sequence[torch.fx.Node] = ()
) -> DimRequest:
    """What the user asked of the model's dimensions, as far as it can be asked of the gate's inputs.

    A size that the model's trace fixed, and that stands in the gate as a number, stays fixed there: the gate is
    cut out of that trace, and would only look as if it were right at other sizes. So does a size that the model
    has for itself: the widths of two inputs that a gate joins are no dimensions because their sum is what counts.

    Args:
        cut: The gate.
        dims: What the user asked.
        traced: The whole model.
        inputs: What enters the gate, in the model's trace.
    """
    others = _of_the_trace(traced)
    baked = others & numbers_in(cut)
    held = {
        (name, axis)
        for name, tensor in cut.inputs.items()
        for axis, size in enumerate(tensor.shape)
        if size in baked
    }
    held |= {
        (name, axis)
        for name, node in zip(cut.inputs, inputs, strict=False)
        for axis, size in enumerate(node.meta["val"].shape)
        if fixed(size) is not None and fixed(size) not in others
    }
    asked = {key: name for key, name in dims.picked.items() if key[0] in cut.inputs and key not in held}
    return DimRequest(dims.static, asked, frozenset(held))


def describe(model: ir.Model, facts: Mapping[str, str]) -> None:
    """Put facts into the model's metadata and doc string, where Netron shows them; the tool's name is the producer."""
    model.producer_name = "moe-export"
    model.producer_version = facts["version"]
    model.metadata_props.clear()
    model.metadata_props.update({f"moe_export.{key}": value for key, value in facts.items()})
    stem = Path(facts["source"]).stem  # a folder's model has no file of its own, and no suffix
    model.graph.name = stem if facts["kind"] == "model" else f"{stem}.{facts['kind']}"
    what = "the model" if facts["kind"] == "model" else f"{facts['kind']} of {facts['module']}"
    made = f"{facts['source']}: {what}, exported at opset {facts['opset']}, {facts['dtype']}"
    bounds = {key.removeprefix("dim."): value for key, value in facts.items() if key.startswith("dim.")}
    limits = [f"{name} {bound.replace(':', '..')}" for name, bound in bounds.items() if bound != "1:"]
    limits += [facts["domain"]] if "domain" in facts else []
    right = [f"right for {' and '.join(limits)}"] if limits else []
    model.graph.doc_string = "\n".join([made, *right, *described(model.graph.inputs, model.graph.outputs)])


def is_only_a_gate(graphs: tuple[Graph, ...]) -> bool:
    """Whether the model computes no more than its one gate does: the same operators, in the same number."""
    if len(graphs) != 2 or graphs[1].kind != "gate":
        return False
    whole, gate = (sorted(node.op_type for node in graph.model.graph.all_nodes()) for graph in graphs)
    return whole == gate
