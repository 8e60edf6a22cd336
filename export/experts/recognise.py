"""Every MoE block of a traced program, however it was written. docs/experts.md lists the ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx
from torch.export import ExportedProgram

from moe_export.errors import RefusedError
from moe_export.export.axes.chosen import experts_of
from moe_export.export.experts.body import Experts, GraphIndex
from moe_export.export.experts.canonical import pass_by_copies
from moe_export.export.experts.capacity import find_capacity
from moe_export.export.experts.dense import find_dense
from moe_export.export.experts.find import find_chains
from moe_export.export.experts.left_as_written import reasons_left
from moe_export.export.experts.listed import find_listed
from moe_export.export.experts.notes import Notes, named
from moe_export.export.experts.pairs import Loop, find_roots, understand_pairs
from moe_export.export.experts.picked import find_picked
from moe_export.export.experts.slot_loops import understand_loops
from moe_export.export.tracing.programs import copied_module, with_module


class Recognised(NamedTuple):
    """The MoE blocks of a traced program.

    Attributes:
        program: A copy of the program, whose nodes the blocks name. Besides the program's own it has values that only
            blocks take (`experts/derived`), and nothing reads what a copy was made from through the copy.
        blocks: The blocks that were understood.
        refused: A line on why any other code that looks like experts stays unchanged.
    """

    program: ExportedProgram
    blocks: tuple[Experts, ...]
    refused: tuple[str, ...]


def find_experts(program: ExportedProgram) -> Recognised:
    """Find the MoE blocks of a traced program, which stays as it is."""
    program, notes = with_module(program, copied_module(program)), Notes()
    graph = program.graph
    pass_by_copies(graph)
    loops = _loops(graph, notes)
    blocks, within = _pairs(graph, loops, notes)
    before = set(notes.lines)
    blocks += find_capacity(graph, notes)
    blocks += find_dense(graph, blocks, within, notes.lines - before)
    for result, loop in loops.items():
        if result in within:
            continue
        if loop.through is None:
            blocks.append(loop.experts)
        else:
            why = f"its rows are sorted, and it is not known by what, after {named(loop.through)}"
            notes.stays("loop over", loop.experts.line, why)
    # A loop ignores experts that it does not run over (null experts do nothing); a lookup has no row for them.
    looped = [loop.experts for loop in loops.values()]
    for where, why in reasons_left(graph, blocks, loops, notes.lines):
        notes.stays("code of the", where, why)
    unknown = [block for block in blocks if block not in looped and _chosen_from(block) > block.count]
    for block in unknown:
        why = f"the gate chooses from {_chosen_from(block)} experts, and {block.count} have weights"
        notes.stays("code of the", block.line, why)
    return Recognised(program, tuple(block for block in blocks if block not in unknown), tuple(notes.texts))


def _loops(graph: fx.Graph, notes: Notes) -> dict[fx.Node, Loop]:
    """Every loop over experts that is understood by itself, by the node that it ends in."""
    loops: dict[fx.Node, Loop] = {}
    chains = find_chains(graph)
    graph_index = GraphIndex.of(graph, chains)
    for chain in chains:
        try:
            for part, experts in understand_loops(chain, graph_index):
                loops[part.iterations[-1].after] = Loop(experts, part.through)
        except RefusedError as error:
            notes.stays("loop over", chain.line, str(error))
    return loops


def _pairs(
    graph: fx.Graph, loops: Mapping[fx.Node, Loop], notes: Notes
) -> tuple[list[Experts], set[fx.Node]]:
    """Every block that computes all pairs at once, and the values that belong to these blocks."""
    blocks: list[Experts] = []
    within: set[fx.Node] = set()
    failed: set[fx.Node] = set()
    unlisted: list[tuple[str | None, str]] = []
    for listed in find_listed(graph, loops, unlisted):
        blocks.append(listed.block)
        within |= listed.values
    for where, why in unlisted:
        notes.stays("code of the", where, why)
    understood = {loop.experts.indices for loop in loops.values() if loop.through is None}
    picked = find_picked(graph)
    for root in find_roots(graph, loops, picked):
        if root.index in within or root.choices[0] in failed:
            continue
        try:
            found = understand_pairs(root, loops, picked)
        except RefusedError as error:
            if root.index not in understood:  # as a loop by itself
                notes.stays("code of the", root.line, str(error))
            failed.add(root.choices[0])
            continue
        if found is not None:
            blocks.append(found.block)
            within |= found.values
    return blocks, within


def _chosen_from(block: Experts) -> int:
    """How many experts the gate chooses from; as many as have weights, if its choice is not seen."""
    return experts_of(block.indices) or block.count
