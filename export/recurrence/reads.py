"""`Reads`: what each node of a trace reads, as arrays, to see in one pass where a loop of some period may begin.

`match_iterations` asks this of one place at a time, and looks at every node after it. In a trace with loops inside of
loops nearly every place repeats with many periods, so what cannot be a loop has to be seen for all places at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from moe_export.export.recurrence.operand import Read, leaves_of
from moe_export.export.recurrence.period import LEAST_ITERATIONS, Run

_LEAVES = 8  # of each node; few have more operands, and what is left out rules nothing out


class Reads:
    """The operands of some nodes, in trace order."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        place = {node: at for at, node in enumerate(nodes)}
        numbers: dict[Any, int] = {}
        # How many nodes before a node its operand was made, 0 for one from outside of the nodes; and a number that is
        # equal for equal paths or, of those from outside, for equal bases; -1 where no value is read.
        self._back = np.zeros((len(nodes), _LEAVES), dtype=np.int64)
        self._same = np.full((len(nodes), _LEAVES), -1, dtype=np.int64)
        for at, node in enumerate(nodes):
            for column, leaf in enumerate(leaves_of(node)[:_LEAVES]):
                if isinstance(leaf, Read):
                    made = place.get(leaf.base)
                    key: Any = leaf.base if made is None else leaf.path
                    self._back[at, column] = 0 if made is None else at - made
                    self._same[at, column] = numbers.setdefault(key, len(numbers))

    def starts(self, run: Run) -> list[int]:
        """Where, within the first two periods of a run, a loop may begin. Elsewhere `match_iterations` refuses.

        What its third iteration reads of itself or of the one before, the second has to read of the same place; what
        it reads from outside of the nodes, from the same base. What is further back may be a start value.
        """
        period = run.period
        second, third = slice(run.start, run.stop - period), slice(run.start + period, run.stop)
        back, same = self._back[third], self._same[third]
        unlike = (back != self._back[second]) | (same != self._same[second])
        unlike &= (same >= 0) & (back <= period)
        before = np.concatenate(([0], np.cumsum(unlike.any(axis=1))))
        places = np.arange(min(2 * period, run.stop - run.start - LEAST_ITERATIONS * period + 1))
        alike = before[places + 2 * period] == before[places + period]
        return [run.start + int(place) for place in places[alike]]
