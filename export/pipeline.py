"""The whole way from a `Subject` to graphs: trace, rewrite, emit, simplify; first the model, then its gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
import torch

from moe_export.einsum_rewrite import Site, rewrite_program
from moe_export.errors import MoeExportError, UsageError
from moe_export.export.dims import DimRequest
from moe_export.export.emit import check, emit
from moe_export.export.ended import no_exit
from moe_export.export.experts.emit import write_experts
from moe_export.export.experts.place import Placed, place_experts
from moe_export.export.functions import described
from moe_export.export.gates.gate import INDICES, SCORES, WEIGHTS, gate_subject, numbers_in, numbers_of
from moe_export.export.gates.neck import behind
from moe_export.export.gates.routing import Routing, find_routings, routing_outputs
from moe_export.export.notes import notes_on
from moe_export.export.opset import check_opset
from moe_export.export.precision.mixed import lower_precision
from moe_export.export.recurrence.recurrences import Mode, fold_recurrences, left_if_fixed
from moe_export.export.recurrence.step import step_of
from moe_export.export.scans.order import loops_first
from moe_export.export.scans.write import Lowering, write_scans
from moe_export.export.simplify import simplify
from moe_export.export.subject import Subject
from moe_export.export.tracing import Traced, quiet
from moe_export.export.transposed import mend_products, product_notes
from moe_export.export.widest import widest_trace, within

Step = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    Attributes:
        opset: 17 or newer.
        dims: Which dimensions to leave free, and their names.
        gates: True for every gate, False for none, or the module path of one.
        simplify: Whether to try onnxsim.
        experts: How loops over experts are lowered: a name of `experts.choose.LOWERINGS`, `auto`, or `keep` for as
            they were written.
        recurrence: `auto` folds loops over a length and notes those that it cannot, `scan` and `chunked` insist,
            `unrolled` leaves them as traced, with their length fixed.
        unroll: Steps that a turn of a `Scan` takes.
        decode: Whether to write the graph of one step, too, its states as inputs and outputs.
        dtype: `float32`, or what the parts of the graph that can bear it compute in: `float16` or `bfloat16`.
        float32: Paths of modules that stay float32 then.
        target: The engine that the graph is for: a name of `experts.choose.TARGETS`.
    """

    opset: int = 17
    dims: DimRequest = dataclasses.field(default_factory=DimRequest)
    gates: bool | str = True
    simplify: bool = True
    experts: str = "auto"
    recurrence: Mode = "auto"
    unroll: int = 1
    decode: bool = False
    target: str = "onnxruntime-cpu"
    dtype: str = "float32"
    float32: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A finished graph, with what is needed to verify it.

    Attributes:
        kind: The whole model, a gate cut out of it, or one step of its recurrences.
        path: Module path of what it computes; `model` for the model itself.
        reference: Computes the same in PyTorch. May return scores (`SCORES`) that the graph does not.
        routing: Names of outputs that are expert indices, with their weights and scores (or None).
        sites: The einsums that were rewritten.
        notes: What a reader of the report should know.
        dtype: The narrowest type that it computes in.
        wide: The same graph in float32, where `dtype` is another.
        placed: The traced model with its experts as opaque nodes: what the graphs of several ranks are made from.
    """

    kind: Literal["model", "gate", "step"]
    path: str
    model: ir.Model
    reference: Subject
    traced: Traced
    routing: tuple[tuple[str, str | None, str | None], ...]
    sites: tuple[Site, ...]
    notes: tuple[str, ...]
    dtype: str = "float32"
    wide: ir.Model | None = None
    placed: Placed | None = None


@no_exit()
def export_subject(subject: Subject, options: Options, step: Step = nullcontext) -> tuple[Graph, ...]:
    """Export a model: its graph, then the graph of each of its gates.

    Args:
        subject: The model.
        options: The user's choices.
        step: Called with the name of each long step; shows progress.

    Raises:
        UsageError: The opset is out of range, or there is no gate at the path that was asked for.
        NotExportableError: The model, or an operator in it, has no ONNX form.
    """
    check_opset(options.opset)
    with step("tracing"):
        recurrent = fold_recurrences(subject, options.dims, options.recurrence)
        folded = widest_trace(recurrent.subject, recurrent.dims(options.dims))
        kept = left_if_fixed(recurrent, folded, subject, options.recurrence)
        if kept is not recurrent:
            recurrent, folded = kept, widest_trace(subject, options.dims)
        folded = within(folded, recurrent.conditions(folded))
        traced = recurrent.unrolled or folded  # gates are cut out of what has no marks of loops
        routings = find_routings(traced)
    chosen = choose(routings, options.gates, folded=recurrent.unrolled is not None)
    placed = place_experts(folded) if options.experts != "keep" else Placed(folded, (), ())
    whole = _graph("model", "model", subject, placed, options, step)
    whole = dataclasses.replace(whole, notes=(*recurrent.notes, *whole.notes))
    outputs = tuple(pair for routing in routings for pair in routing_outputs(routing, traced))
    graphs = [dataclasses.replace(whole, routing=outputs)]
    for routing in chosen:
        try:
            graphs.append(_gate_graph(routing, subject, traced, options, step))
        except MoeExportError as error:
            if isinstance(options.gates, str):
                raise
            note = f"the gate of {routing.path} could not be cut out: {error.what.splitlines()[0]}"
            graphs[0] = dataclasses.replace(graphs[0], notes=(*graphs[0].notes, note))
    if options.decode:
        with step("finding the states of a step"):
            stepped = step_of(subject, recurrent)
            traced = widest_trace(stepped.subject, stepped.dims(recurrent.dims(options.dims)))
            placed = place_experts(traced) if options.experts != "keep" else Placed(traced, (), ())
        graphs.append(_graph("step", "model", stepped.subject, placed, options, step))
    return tuple(graphs)


def choose(routings: tuple[Routing, ...], gates: bool | str, *, folded: bool) -> tuple[Routing, ...]:
    """The gates to cut out: all, none, or one; of a gate in a loop that was folded, not every turn's."""
    if isinstance(gates, bool):
        if folded:  # the trace has it once a turn: `cell`, `cell@1`, ...
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


def _gate_graph(routing: Routing, subject: Subject, traced: Traced, options: Options, step: Step) -> Graph:
    """The graph of one gate. Its reference also returns the scores, by which ties are judged."""
    with step(f"cutting out the gate of {routing.path}"):
        routing = _where_it_holds(routing, traced)
        cut = gate_subject(traced, routing, subject)
        gate_traced = widest_trace(cut, gate_dims(cut, options.dims, traced, routing.inputs))
    graph = _graph("gate", routing.path, cut, Placed(gate_traced, (), ()), options, step)
    return dataclasses.replace(
        graph,
        reference=gate_subject(traced, routing, subject, with_scores=True),
        routing=((INDICES, WEIGHTS if WEIGHTS in cut.outputs else None, SCORES),),
    )


def _where_it_holds(routing: Routing, traced: Traced) -> Routing:
    """The gate, begun behind what holds for a size only that the model's trace fixed, as a loop's steps."""
    fixed = _of_the_trace(traced)
    return behind(routing, lambda node: not numbers_of(node) & fixed)


def _of_the_trace(traced: Traced) -> set[int]:
    """The sizes that the trace fixed, and the model does not."""
    return {fixed.size for fixed in traced.fixed if fixed.model_takes_others}


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
        if isinstance(size, int) and size not in others
    }
    asked = {key: name for key, name in dims.picked.items() if key[0] in cut.inputs and key not in held}
    return DimRequest(dims.static, asked, frozenset(held))


def _graph(
    kind: Literal["model", "gate", "step"],
    path: str,
    subject: Subject,
    placed: Placed,
    options: Options,
    step: Step,
) -> Graph:
    traced = placed.traced
    lowered: list[str] = []

    def write_opaque(model: ir.Model) -> None:
        lowered.extend(write_experts(model, placed.blocks, options.experts, options.target))
        lowered.extend(write_scans(model, Lowering(options.recurrence, options.unroll)))

    with step("rewriting einsums"), quiet():
        program, sites = rewrite_program(traced.program)
        rewritten = dataclasses.replace(traced, program=program)
    with step(f"writing opset {options.opset}"):
        model = emit(rewritten, options.opset, folder=subject.source.parent, write_opaque=write_opaque)
        check(model)
    notes = [*lowered, *placed.refused, *notes_on(subject, traced), *product_notes(model)]
    if options.simplify:
        with step("simplifying"):
            simplified = simplify(model, {name: as_numpy(value) for name, value in traced.example.items()})
        model, notes = simplified.model, [*notes, simplified.note]
    loops_first(model.graph)
    graph = Graph(kind, path, model, subject, traced, (), tuple(sites), tuple(notes), placed=placed)
    return graph if options.dtype == "float32" else _narrowed(graph, options)


def _narrowed(graph: Graph, options: Options) -> Graph:
    """The graph in mixed precision; as it is if nothing in it can bear that."""
    lowered = lower_precision(graph.model.clone(), options.dtype, options.float32)
    mend_products(lowered.model)
    check(lowered.model)
    notes = (*graph.notes, lowered.note(options.dtype), *product_notes(lowered.model))
    if not lowered.narrow:
        return dataclasses.replace(graph, notes=notes)
    return dataclasses.replace(graph, model=lowered.model, notes=notes, dtype=options.dtype, wide=graph.model)


def as_numpy(tensor: torch.Tensor) -> Any:
    """A tensor as an array; bfloat16, which NumPy lacks, through ml_dtypes."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def describe(model: ir.Model, facts: Mapping[str, str]) -> None:
    """Put facts into the model's metadata and doc string, where Netron shows them; the tool's name is the producer."""
    model.producer_name = "moe-export"
    model.producer_version = facts["version"]
    model.metadata_props.clear()
    model.metadata_props.update({f"moe_export.{key}": value for key, value in facts.items()})
    stem = facts["source"].rpartition(".")[0]
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
