"""The graphs of all ranks, from one trace: the model is translated once, and its experts are written once a rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.experts.choose import Lowering, choose
from moe_export.export.experts.expand import Bodies, expand_experts, module_of
from moe_export.export.experts.one_at_a_time import Opaque
from moe_export.export.experts.outline import DOMAIN, NUMBER, OPERATOR
from moe_export.export.onnx.fourier import expand_fourier
from moe_export.export.onnx.provenance import strip_scope
from moe_export.export.onnx.translate import check
from moe_export.export.options import Options
from moe_export.export.parallel.collectives import Collectives, write_collectives
from moe_export.export.parallel.dispatch import ThereAndBack, there_and_back
from moe_export.export.parallel.partial_sum import partial_sum
from moe_export.export.parallel.placement import Layer, Placement, place
from moe_export.export.parallel.stages import ALL_REDUCE, LAYER, Staged, cut, exchanges_of
from moe_export.export.pipeline import Graph
from moe_export.export.quantize.quantize import quantize
from moe_export.export.scans.expand import Expansion, expand_loops
from moe_export.export.stages import Draft, Program, between, run, with_stage
from moe_export.graph_builder import GraphBuilder

Exchanging = Literal["all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Parallel:
    """What the user may choose of the ranks.

    Attributes:
        ranks: How many.
        exchange: What the ranks tell each other (see docs/parallel.md).
        capacity: Of an `all_to_all`: rows that a rank sends to another at most; None for as many as there are.
        placement: A file that says which expert is where; None for evenly.
        collectives: Who exchanges: whoever runs the graphs, or nodes in the graphs.
    """

    ranks: int
    exchange: Exchanging = "all_reduce"
    capacity: int | None = None
    placement: str | None = None
    collectives: Collectives = "runner"


@dataclass(frozen=True)
class Ranks:
    """The graphs of all ranks.

    Attributes:
        parallel: What was asked for.
        layers: The blocks of experts, in the order of the graph.
        slots: k, choices of a token, of each layer.
        placement: Where each expert is.
        staged: For each rank its graph in stages.
        notes: What a reader should know.
    """

    parallel: Parallel
    layers: tuple[Layer, ...]
    slots: tuple[int, ...]
    placement: Placement
    staged: tuple[Staged, ...]
    notes: tuple[str, ...]


def rank_graphs(graph: Graph, options: Options, parallel: Parallel) -> Ranks:
    """Make the graphs of all ranks of a model.

    Args:
        graph: The whole model's.
        options: What it was made with.
        parallel: How to split it.

    Raises:
        NotExportableError: There are no experts that could be spread, or not in the form that was asked for.
        UsageError: The placement does not fit.
    """
    check_experts(graph, options, parallel)
    program = graph.program
    assert program is not None
    draft = run(between("translate", "translate"), program, options)
    order = _order(draft.model)
    layers = tuple(
        Layer(
            strip_scope(module_of(program.blocks[number]), program.traced.scope),
            program.blocks[number].experts.count,
            program.blocks[number].experts.line,
        )
        for number in order
    )
    placement = place(layers, parallel.ranks, parallel.placement)
    maker = _Maker(draft, parallel, placement, order)
    staged = tuple(maker.make(rank, options) for rank in range(parallel.ranks))
    slots = tuple(program.blocks[number].experts.slots for number in order)
    left_out = ("the ranks' graphs are not offered to onnxsim",) if options.simplify else ()
    return Ranks(parallel, layers, slots, placement, staged, (*left_out, *program.refused))


def check_experts(graph: Graph, options: Options, parallel: Parallel) -> None:
    """Refuse what cannot be split over so many ranks, before a graph of a rank is made.

    With `all_to_all` a rank without experts still has tokens of its own, and a placement says where experts are; a rank
    that gets no expert of any layer by itself, and sees the tokens that all see, would compute what all others do.

    Raises:
        NotExportableError: There are no experts that could be spread.
        UsageError: There are more ranks than experts.
    """
    program = graph.program
    assert program is not None
    if not program.blocks:
        raise _no_experts(program, options)
    most = max((block.experts for block in program.blocks), key=lambda experts: experts.count)
    if parallel.ranks > most.count and parallel.exchange == "all_reduce" and parallel.placement is None:
        raise UsageError(
            f"--expert-parallel {parallel.ranks}: no layer has more than {most.count} experts, so that"
            f" {parallel.ranks - most.count} ranks would have none",
            where=most.line,
            hint=f"--expert-parallel {most.count} or fewer; --exchange all_to_all if these ranks have tokens of their"
            " own; --placement to leave ranks without experts on purpose",
        )


def check_parallel(parallel: Parallel) -> None:
    """Refuse what does not go together, whatever the model is.

    Raises:
        UsageError: Says which option, and what it goes with.
    """
    if parallel.capacity is not None and parallel.exchange != "all_to_all":
        raise UsageError("--exchange-rows is of --exchange all_to_all: an all_reduce sends no rows")
    if parallel.collectives != "runner" and parallel.exchange == "all_to_all" and parallel.capacity is None:
        raise UsageError(
            "--collectives graph needs --exchange-rows with --exchange all_to_all",
            hint="collectives of engines send parts of equal size: --exchange-rows says how many rows",
        )


def _no_experts(program: Program, options: Options) -> NotExportableError:
    if options.experts == "keep":
        return NotExportableError(
            "--experts keep leaves the experts as they were written, and these cannot be spread over ranks",
            code=Code.NO_RANKS,
            hint="leave --experts keep away",
        )
    why = f": {program.refused[0]}" if program.refused else ""
    return NotExportableError(
        f"no block of experts was recognised that could be spread over ranks{why}",
        code=Code.NO_RANKS,
        hint="docs/experts.md says what is recognised",
    )


def _order(model: ir.Model) -> tuple[int, ...]:
    """The numbers of the blocks in the order of the graph."""
    found = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    return tuple(node.attributes[NUMBER].as_int() for node in found)


@dataclass(frozen=True)
class _Maker:
    """Makes the graph of one rank: the way of any graph, with another stage in the place of `expand`."""

    draft: Draft
    parallel: Parallel
    placement: Placement
    order: Sequence[int]
    bodies: Bodies = dataclasses.field(default_factory=Bodies)

    def make(self, rank: int, options: Options) -> Staged:
        """The graph of a rank in stages."""

        def expand(draft: Draft, options: Options) -> Draft:
            return self._expanded(draft, rank, options)

        def exchanges_are_left(draft: Draft, options: Options) -> None:
            """The checker sees the graph when it is cut."""

        stages = with_stage(between("expand", "name"), "expand", run=expand, ensures=exchanges_are_left)
        stages = with_stage(stages, "name", ensures=exchanges_are_left)
        model = run(stages, self.draft, options).model
        if options.scheme is not None:
            model = quantize(model, options.scheme, options.quantize, whole=False).model
        if self.parallel.collectives == "graph":
            described = exchanges_of(model)
            write_collectives(model, self.parallel.ranks, options.target)
            return dataclasses.replace(described, stages=(model,))
        staged = cut(model)
        for stage in staged.stages:
            check(stage)
        return staged

    def _expanded(self, draft: Draft, rank: int, options: Options) -> Draft:
        def write(w: GraphBuilder, form: Lowering, block: Opaque) -> ir.Value:
            layer = self._layer_of(block)
            own = self.placement.experts_of(layer, rank)
            if options.experts == "auto":
                form = choose("auto", len(own), options.target, packed=options.scheme is not None)
            if self.parallel.exchange == "all_to_all":
                way = ThereAndBack(self.placement, layer, rank, self.parallel.capacity)
                return there_and_back(w, form, block, way)
            given = partial_sum(w, form, block, own)
            return w.op(ALL_REDUCE, given, domain=DOMAIN, name="all_reduced", **{LAYER: layer})

        model = draft.model.clone()
        expand_experts(model, draft.program.blocks, options.experts, options.target, write, self.bodies)
        model.opset_imports[DOMAIN] = 1
        expand_loops(model, Expansion(options.recurrence, options.unroll))
        expand_fourier(model)
        return dataclasses.replace(draft, model=model)

    def _layer_of(self, block: Opaque) -> int:
        """Which layer a block is. What it means is told by its body: a rank's own block is another object."""
        for layer, number in enumerate(self.order):
            if self.draft.program.blocks[number].experts is block.meaning:
                return layer
        raise AssertionError("a block that was not placed")
