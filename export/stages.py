"""`PIPELINE`: the way from a model to an ONNX graph, as a tuple of stages.

    Model ─ fold ─▶ Model ─ trace ─▶ Program ─ outline ─▶ Program ─ einsums ─▶ Program ─ translate ─▶ Draft
      Draft ─ expand ─▶ Draft ─ name ─▶ Draft ─ simplify ─▶ Draft ─ share ─▶ Draft ─ order ─▶ Draft ─ precision ─▶ Draft
      Draft ─ quantize ─▶ Draft ─ sides ─▶ Draft ─ attention ─▶ Draft

Three types of data, one for each language that the model is written in on its way: a module (`Model`), an FX graph
(`Program`), an ONNX graph (`Draft`). All are frozen; a stage makes a new one and leaves what it was given as it was. A
stage that takes and gives the same type may be left out (`without`), or another may stand in its place (`with_stage`):
the gates of a model, the baseline without rewriting, and the graphs of ranks take the same way with other stages.

`ensures` is checked after each run: a claim about the result which, if it fails, is a defect of that stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from moe_export.einsum_rewrite import Site, rewrite_program
from moe_export.einsum_rewrite.onnx_permutes import permutes_apart
from moe_export.einsum_rewrite.targets import read_target, target_for
from moe_export.errors import UsageError
from moe_export.export.decoder.shared_buffers import share_buffers
from moe_export.export.experts.expand import expand_experts
from moe_export.export.experts.outline import DOMAIN as EXPERTS
from moe_export.export.experts.outline import NUMBER, OPERATOR, Block, outline_experts
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.fourier import DOMAIN as FOURIER
from moe_export.export.onnx.fourier import expand_fourier
from moe_export.export.onnx.reductions import reductions_by_sum
from moe_export.export.onnx.shared_weights import store_once
from moe_export.export.onnx.sides import sides_in_branches
from moe_export.export.onnx.simplify import as_numpy, simplify
from moe_export.export.onnx.translate import check, name_at_opset, translate
from moe_export.export.onnx.transposed import mend_products, product_notes
from moe_export.export.onnx.types_lacking import in_float32
from moe_export.export.options import Options
from moe_export.export.precision.mixed import lower_precision
from moe_export.export.quantize.quantize import Quantized, quantize
from moe_export.export.recurrence.recurrences import Recurrent, fold_recurrences, left_if_fixed
from moe_export.export.scans.captures import captures_as_states
from moe_export.export.scans.expand import Expansion, expand_loops
from moe_export.export.scans.order import loops_first
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.notes import lookup_note, notes_on
from moe_export.export.tracing.trace import Traced, quiet
from moe_export.export.tracing.traced_loops import DOMAIN as LOOPS
from moe_export.export.tracing.traced_loops import of_loops
from moe_export.export.tracing.ways_seen import ways_seen
from moe_export.export.tracing.widest import widest_trace, within

OPENVINO_STEPS = 8
"""Steps of an iteration of a Scan for OpenVINO, which takes long to start one (docs/openvino.md has figures)."""


@dataclass(frozen=True)
class Model:
    """What is to be traced.

    Attributes:
        subject: The model as the user gave it: what the graph is held against.
        recurrent: The same with its loops over a length folded, or as it was given.
        dims: Which dimensions are to be free.
        notes: For the report, here and below.
    """

    subject: Subject
    recurrent: Recurrent
    dims: DimRequest
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, subject: Subject, dims: DimRequest) -> Model:
        """Where the way of a model begins."""
        return cls(subject, Recurrent(subject), dims)

    @property
    def unrolled(self) -> Traced | None:
        """The trace of the model at a short length, if loops in it were folded."""
        return self.recurrent.unrolled


@dataclass(frozen=True)
class Program:
    """A traced model: an FX graph.

    Attributes:
        model: What was traced.
        traced: The program, and the sizes that it holds for.
        blocks: What the opaque nodes in it mean, by their number.
        refused: Why other loops over experts stay as they were written, with their lines.
        sites: The einsums that were rewritten.
    """

    model: Model
    traced: Traced
    blocks: tuple[Block, ...] = ()
    refused: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """An ONNX graph on its way to a file.

    Attributes:
        program: What it was translated from.
        model: The graph.
        wide: The same graph in float32, where it computes in another type.
        quantized: What was packed, and the graphs to hold it against; None if nothing was.
    """

    program: Program
    model: ir.Model
    wide: ir.Model | None = None
    quantized: Quantized | None = None
    notes: tuple[str, ...] = ()


Step = Callable[[str], AbstractContextManager[Any]]
"""Shows the name of a long step while it is under way."""


@dataclass(frozen=True)
class Stage:
    """One stage of the way.

    Attributes:
        name: What `--stop-after` calls it.
        requires: The type of what it is given.
        gives: The type of what it makes.
        run: Makes it; what it was given stays as it was.
        ensures: Refuses a result that is not what the stage claims.
        doing: What a user reads while it runs; empty for a short one.
    """

    name: str
    requires: type
    gives: type
    run: Callable[[Any, Options], Any]
    ensures: Callable[[Any, Options], None]
    doing: str = ""


Stages = tuple[Stage, ...]


def _fold(model: Model, options: Options) -> Model:
    recurrent = fold_recurrences(model.recurrent.subject, model.dims, options.recurrence)
    dims = recurrent.dims(model.dims)
    return replace(model, recurrent=recurrent, dims=dims, notes=(*model.notes, *recurrent.notes))


def _trace(model: Model, options: Options) -> Program:
    recurrent = model.recurrent
    traced = widest_trace(recurrent.subject, model.dims)
    kept = left_if_fixed(recurrent, traced, model.subject, options.recurrence)
    if kept is not recurrent:
        earlier = model.notes[: len(model.notes) - len(recurrent.notes)]
        model = replace(model, recurrent=kept, dims=options.dims, notes=(*earlier, *kept.notes))
        traced = widest_trace(model.subject, model.dims)
    traced = within(traced, kept.conditions(traced))
    with quiet():
        seen = ways_seen(model.subject, traced, (model.unrolled or traced).decisions)
    notes = notes_on(model.subject, traced, model.unrolled, seen)
    return Program(model, traced, notes=(*model.notes, *notes))


def _outline(program: Program, options: Options) -> Program:
    if options.experts == "keep":
        return program
    outlined = outline_experts(program.traced)
    chosen_only = {lookup_note(block.experts.line) for block in outlined.blocks if block.experts.line}
    notes = (*(note for note in program.notes if note not in chosen_only), *outlined.refused)
    return replace(
        program, traced=outlined.traced, blocks=outlined.blocks, refused=outlined.refused, notes=notes
    )


def _einsums(program: Program, options: Options) -> Program:
    with quiet():
        traced = program.traced.program
        rewritten, sites = rewrite_program(traced, target_for(options.target), of_loops(traced.graph))
    return replace(program, traced=replace(program.traced, program=rewritten), sites=tuple(sites))


def _translate(program: Program, options: Options) -> Draft:
    return Draft(program, translate(program.traced, options.opset), notes=program.notes)


def _expand(draft: Draft, options: Options) -> Draft:
    model = draft.model.clone()
    packed = options.scheme is not None
    experts = expand_experts(model, draft.program.blocks, options.experts, options.target, packed=packed)
    steps = OPENVINO_STEPS if options.target == "openvino" else 1
    loops = expand_loops(model, Expansion(options.recurrence, options.unroll, steps, options.decoder))
    expand_fourier(model)
    return replace(draft, model=model, notes=(*draft.notes, *experts, *loops))


def _name(draft: Draft, options: Options) -> Draft:
    model = draft.model.clone()
    subject = draft.program.model.subject
    in_float32(model, options.opset)
    name_at_opset(model, draft.program.traced, options.opset, subject.source.parent, subject.root)
    return replace(draft, model=model, notes=(*draft.notes, *product_notes(model)))


def _simplify(draft: Draft, options: Options) -> Draft:
    if not options.simplify:
        return draft
    example = {name: as_numpy(value) for name, value in draft.program.traced.example.items()}
    found = simplify(draft.model, example)
    return replace(draft, model=found.model, notes=(*draft.notes, found.note))


def _share(draft: Draft, options: Options) -> Draft:
    model = draft.model.clone()
    store_once(model.graph)
    return replace(draft, model=model)


def _order(draft: Draft, options: Options) -> Draft:
    model = draft.model.clone()
    loops_first(model.graph)
    return replace(draft, model=model)


def _precision(draft: Draft, options: Options) -> Draft:
    """The graph in mixed precision; unchanged if no operator supports it."""
    if options.dtype == "float32":
        return draft
    lowered = lower_precision(draft.model.clone(), options.dtype, options.float32)
    mend_products(lowered.model)
    notes = (*draft.notes, lowered.note(options.dtype), *product_notes(lowered.model))
    if not lowered.narrow:
        return replace(draft, notes=notes)
    return replace(draft, model=lowered.model, wide=draft.model, notes=notes)


def _quantize(draft: Draft, options: Options) -> Draft:
    """The graph with packed weights; unchanged if none was asked for."""
    if options.scheme is None:
        return draft
    weights = draft.program.model.subject.weights
    if options.calibrate and weights is not None and weights.absent:
        raise UsageError(
            "--calibrate runs the float graph, and its weights are larger than --memory",
            hint="a larger --memory, if there is as much; without --calibrate, weights are rounded to the nearest",
        )
    files = [Path(file) for file in options.calibrate]
    apart = replace(options, experts="slices", target="onnxruntime-cpu", simplify=False)
    found = quantize(
        draft.model,
        options.scheme,
        options.quantize,
        files=files,
        apart=(lambda: run(between("translate", "precision"), draft.program, apart).model)
        if draft.program.blocks
        else None,
    )
    notes = (*draft.notes, *found.notes())
    if not found.weights:
        return replace(draft, notes=notes)
    return replace(draft, model=found.model, quantized=found, notes=notes)


def _sides(draft: Draft, options: Options) -> Draft:
    """The graph with branches for costly sides of decisions; an engine's builder takes both sides at once."""
    if options.target.startswith("tensorrt"):
        return draft
    model = draft.model.clone()
    count = sides_in_branches(model)
    if not count:
        return draft
    note = f"of {count} decision{'s' * (count > 1)} only the side that is taken is computed (If)"
    return replace(draft, model=model, notes=(*draft.notes, note))


def _attention(draft: Draft, options: Options) -> Draft:
    """The decoder with keys and values in buffers that may stay where they are; unchanged if not asked for."""
    if options.attention == "standard":
        return draft
    model = draft.model.clone()
    note = share_buffers(model)
    return replace(draft, model=model, notes=(*draft.notes, note))


def _engine(draft: Draft, options: Options) -> Draft:
    """The graph without what its engine refuses, computes wrongly (docs/openvino.md), or is slow at."""
    model = draft.model.clone()
    if options.target == "openvino":
        captures_as_states(model)
        reductions_by_sum(model)
    elif options.target == "onnxruntime-cpu":
        permutes_apart(model, read_target(options.target))
    else:
        return draft
    return replace(draft, model=model)


def _nothing(result: Any, options: Options) -> None:
    """No claim beyond the type."""


def _loops_are_proved(model: Model, options: Options) -> None:
    """A folded model says for each length up to where it was compared, and keeps the trace that gates are cut from."""
    folded = model.recurrent
    assert len(folded.lengths) == len(folded.reached)
    assert bool(folded.lengths) == (folded.unrolled is not None)


def _sizes_have_bounds(program: Program, options: Options) -> None:
    """Every size that has a name is a dimension, with its bounds."""
    names = {size for shape in program.traced.inputs.values() for size in shape if isinstance(size, str)}
    unknown = {name for name in names if name.isidentifier()} - {dim.name for dim in program.traced.dims}
    assert not unknown, f"sizes without bounds: {', '.join(sorted(unknown))}"


def _no_einsum(program: Program, options: Options) -> None:
    left = program.traced.program.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    assert not left, f"{len(left)} einsums are left"


def _carried_over(draft: Draft, options: Options) -> None:
    """Each opaque node is a block of experts; of blocks of which one computes what another does, one may be gone."""
    nodes = [node for node in draft.model.graph if (node.domain, node.op_type) == (EXPERTS, OPERATOR)]
    numbers = [node.attributes[NUMBER].as_int() for node in nodes]
    count = len(draft.program.blocks)
    assert bool(numbers) == bool(count), f"{count} blocks of experts, and {len(nodes)} opaque nodes"
    assert set(numbers) <= set(range(count)), f"opaque nodes {numbers}, and {count} blocks of experts"


def _only_standard(draft: Draft, options: Options) -> None:
    """No node of ours is left: every domain is one that a runtime has."""
    ours = {
        node.op_type for node in draft.model.graph.all_nodes() if node.domain in (EXPERTS, LOOPS, FOURIER)
    }
    assert not ours, f"opaque nodes are left: {', '.join(sorted(ours))}"


def _valid(draft: Draft, options: Options) -> None:
    """The checker takes the graph; it has the opset that was asked for, and its inputs have the sizes of the trace."""
    assert draft.model.opset_imports[""] == options.opset
    traced = draft.program.traced
    for value in draft.model.graph.inputs:
        wanted = traced.inputs.get(str(value.name))
        if wanted is not None and value.shape is not None:
            found = tuple(size if isinstance(size, int) else size.value for size in value.shape)
            assert found == tuple(wanted), (
                f"{value.name} is {found} in the graph, {tuple(wanted)} in the trace"
            )
    check(draft.model)


def _valid_if_packed(draft: Draft, options: Options) -> None:
    if draft.quantized is not None:
        _valid(draft, options)


def _valid_if_narrow(draft: Draft, options: Options) -> None:
    if draft.wide is not None:
        _valid(draft, options)


PIPELINE: Stages = (
    Stage("fold", Model, Model, _fold, _loops_are_proved, "looking for loops over a length"),
    Stage("trace", Model, Program, _trace, _sizes_have_bounds, "tracing"),
    Stage("outline", Program, Program, _outline, _nothing, "looking for experts"),
    Stage("einsums", Program, Program, _einsums, _no_einsum, "rewriting einsums"),
    Stage("translate", Program, Draft, _translate, _carried_over, "translating to ONNX"),
    Stage("expand", Draft, Draft, _expand, _only_standard, "writing experts and loops"),
    Stage("name", Draft, Draft, _name, _valid, "naming and checking"),
    Stage("simplify", Draft, Draft, _simplify, _nothing, "simplifying"),
    Stage("share", Draft, Draft, _share, _nothing),
    Stage("order", Draft, Draft, _order, _nothing),
    Stage("precision", Draft, Draft, _precision, _valid_if_narrow),
    Stage("quantize", Draft, Draft, _quantize, _valid_if_packed, "quantizing weights"),
    Stage("sides", Draft, Draft, _sides, _valid),
    Stage("attention", Draft, Draft, _attention, _valid),
    Stage("engine", Draft, Draft, _engine, _valid),
)
"""All stages, in their order."""


def without(*names: str) -> Stages:
    """The way with some stages left out.

    Raises:
        ValueError: There is no such stage, or what is left does not fit together.
    """
    _known(names, PIPELINE)
    return _fitting(tuple(stage for stage in PIPELINE if stage.name not in names))


def between(first: str, last: str) -> Stages:
    """The part of the way from one stage to another, both included; errors as of `without`."""
    _known((first, last), PIPELINE)
    names = [stage.name for stage in PIPELINE]
    return PIPELINE[names.index(first) : names.index(last) + 1]


def with_stage(stages: Stages, name: str, **others: Any) -> Stages:
    """The way with another `run` or `ensures` of one stage, of the same types; errors as of `without`."""
    _known((name,), stages)
    return tuple(replace(stage, **others) if stage.name == name else stage for stage in stages)


def _known(names: Sequence[str], stages: Stages) -> None:
    unknown = set(names) - {stage.name for stage in stages}
    if unknown:
        raise ValueError(f"no stage is called {', '.join(sorted(unknown))}")


def _fitting(stages: Stages) -> Stages:
    for stage, later in itertools.pairwise(stages):
        if stage.gives is not later.requires:
            raise ValueError(f"{stage.name} gives a {stage.gives.__name__}, and {later.name} takes none")
    return stages


def run(stages: Stages, value: Any, options: Options, step: Step = nullcontext) -> Any:
    """Send a value through stages.

    Args:
        stages: Some of the way.
        value: What the first of them takes.
        options: The user's choices.
        step: Called with what each long stage does; shows progress.

    Raises:
        MoeExportError: As the stages do.
        AssertionError: A stage did not do what it claims: a defect of ours.
    """
    for stage in stages:
        assert isinstance(value, stage.requires)
        with step(stage.doing) if stage.doing else nullcontext():
            value = stage.run(value, options)
            stage.ensures(value, options)
    return value
