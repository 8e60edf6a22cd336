"""`find_loops`: the loops of a model over a length, found in its traces at several lengths.

A loop over layers or heads repeats as well; a loop over the length is one whose number of iterations differs from trace
to trace.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import fx

from moe_export.export.recurrence.loop import Loop, Made
from moe_export.export.recurrence.match_iterations import Refusal, match_iterations
from moe_export.export.recurrence.period import LEAST_ITERATIONS, Run, runs, sequence, signature, tokens


@dataclass
class Repeats:
    """A canonical trace and what was found in it.

    Attributes:
        nodes: The computations, in trace order.
        loops: The loops, in the order in which they were found.
        refusals: Why other nodes that repeat are not a loop.
    """

    graph: fx.Graph
    nodes: list[fx.Node] = field(init=False)
    loops: list[Loop] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = sequence(self.graph)
        self.tokens = tokens(self.nodes)
        self._made: dict[fx.Node, Made] = {}

    def locate(self, node: fx.Node) -> Made | None:
        """The loop, position and iteration of a node; None outside of the loops found so far."""
        return self._made.get(node)

    def take(self, loop: Loop) -> None:
        """Accept a loop; its nodes then count as a repetition of nothing else."""
        number = len(self.loops)
        self.loops.append(loop)
        taken = set()
        for iteration, row in enumerate(loop.nodes):
            for position, node in enumerate(row):
                if node is not None:
                    self._made[node] = Made(number, position, iteration)
                    taken.add(node)
        self.tokens = np.where([node in taken for node in self.nodes], -1, self.tokens)


def find_loops(traces: Sequence[Repeats]) -> None:
    """Find the loops that all traces have, with more iterations at greater lengths, and record them in the traces.

    Args:
        traces: One for each length, shortest first; the k-th loop of each is the same loop of the model.
    """
    # Repeat while something is found: a loop may read, iteration by iteration, what another one made.
    while _find_more(traces):
        pass


def _find_more(traces: Sequence[Repeats]) -> bool:
    # Short periods first: a whole loop over layers has a longer period than the loop inside a layer.
    any_found = False
    for period in range(1, len(traces[0].nodes) // LEAST_ITERATIONS + 1):
        places = [(trace, list(runs(trace.tokens, period))) for trace in traces]
        if not all(repeated for _, repeated in places):
            # A loop is in each trace, but where one is inside of another, nearly every period is in one of them.
            for trace, repeated in places:
                for run in repeated:
                    _note_refusal(trace, run)
            continue
        found = [_candidates(trace, repeated) for trace, repeated in places]
        chosen: list[tuple[Loop, ...]] = []
        for key, first in found[0].items():
            rows = [candidates.get(key, []) for candidates in found]
            if all(len(row) == len(first) for row in rows):
                chosen += [
                    loops for loops in zip(*rows, strict=True) if _grows([loop.iterations for loop in loops])
                ]
        any_found = any_found or bool(chosen)
        order = {node: place for place, node in enumerate(traces[0].nodes)}
        for loops in sorted(chosen, key=lambda loops: order[loops[0].first]):
            for trace, loop in zip(traces, loops, strict=True):
                trace.take(loop)
    return any_found


def _grows(iterations: Sequence[int]) -> bool:
    return all(fewer < more for fewer, more in itertools.pairwise(iterations))


def _note_refusal(trace: Repeats, run: Run) -> None:
    """Note why no loop begins where a run does, if none does."""
    matched = match_iterations(trace.nodes, run.start, run.period, run.stop, trace.locate)
    if isinstance(matched, Refusal):
        trace.refusals.append(replace(matched, nodes=run.stop - run.start))


def _candidates(trace: Repeats, places: Sequence[Run]) -> dict[Any, list[Loop]]:
    """The loops in some runs by the operators of their body, in trace order."""
    found: dict[Any, list[Loop]] = defaultdict(list)
    for run in places:
        start = run.start
        while (loop := _best(trace, replace(run, start=start))) is not None:
            found[signature([node for node in loop.nodes[0] if node is not None])].append(loop)
            last = next(node for row in reversed(loop.nodes) for node in reversed(row) if node is not None)
            start = trace.nodes.index(last, start) + 1
    return found


def _best(trace: Repeats, run: Run) -> Loop | None:
    """The best of the loops that begin within the first two periods of a run; None if there is none, and why is noted.

    The best has the most iterations, then the fewest carried values, then the fewest values that are used outside.
    """
    best: Loop | None = None
    for start in range(run.start, min(run.start + 2 * run.period, run.stop - 3 * run.period + 1)):
        matched = match_iterations(trace.nodes, start, run.period, run.stop, trace.locate)
        if isinstance(matched, Refusal):
            trace.refusals.append(replace(matched, nodes=run.stop - start))
        elif best is None or _rank(matched) > _rank(best):
            best = matched
    return best


def _rank(loop: Loop) -> tuple[int, int, int]:
    return loop.iterations, -len(loop.starts), -len(_used_outside(loop))


def _used_outside(loop: Loop) -> set[int]:
    inside = {node for row in loop.nodes for node in row if node is not None}
    return {
        position
        for row in loop.nodes
        for position, node in enumerate(row)
        if node is not None and any(user not in inside for user in node.users)
    }
