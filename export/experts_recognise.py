"""Every MoE block of a traced program, in whatever shape it was written. See docs/experts.md for the shapes."""

from __future__ import annotations

from torch import fx

from moe_export.export.experts_body import Experts, NotExpertsError, understand
from moe_export.export.experts_find import find_chains
from moe_export.export.experts_pairs import find_roots, understand_pairs


def find_experts(graph: fx.Graph) -> tuple[tuple[Experts, ...], tuple[str, ...]]:
    """Find the MoE blocks of a traced program.

    Returns:
        What was understood, in graph order, and why other code that looks like experts stays as it was written, a
        line each.
    """
    loops: dict[fx.Node, Experts] = {}
    refused: list[str] = []
    for chain in find_chains(graph):
        try:
            loops[chain.turns[-1].after] = understand(chain)
        except NotExpertsError as error:
            refused.append(f"the loop over experts at {chain.line} stays as it was written: {error}")
    blocks: dict[fx.Node, Experts] = {}
    within: set[fx.Node] = set()
    for root in find_roots(graph, loops):
        try:
            found = understand_pairs(root, loops)
        except NotExpertsError as error:
            refused.append(f"the experts at {root.line} stay as they were written: {error}")
            continue
        if found is not None:
            blocks[found.block.result] = found.block
            within |= found.loops
    alone = {result: loop for result, loop in loops.items() if result not in within}
    return tuple((alone | blocks).values()), tuple(refused)
