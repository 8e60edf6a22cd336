"""What the leading axes of a value run over, in code that computes all token-expert pairs at once.

Such code has no turn an expert. It lines the pairs up, S = N*k rows of them, and reads each row's expert from
stacked weights. Every value that depends on the chosen indices is followed through the graph:

    grid    (N, k, ...)   a token, a slot
    flat    (S, ...)      pair p is token p // k, slot p % k
    sorted  (S, ...)      row r is pair order[r]; `order` sorts the pairs by expert

A rule for an operator says what its result's axes are, and how the same is computed for any R pairs: flat and
sorted as (R, ...), a grid as (R, 1, ...), which is the grid of R tokens with one slot each. So almost every operator
is its own rule. What is the same for all rows of an expert, its weights, has 1 in the place of R.

Letters: N tokens, k slots, S = N*k pairs, E experts, R rows of a body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from moe_export.export.experts.pair_body import PairBody

Make = Callable[["PairBody"], fx.Node]


@dataclass(frozen=True)
class Rows:
    """What is known of a value that depends on the chosen indices.

    Attributes:
        lead: How many leading axes run over pairs: 1, or 2 for a grid. 0 for a value (E,) about all experts.
        order: The node that sorts the pairs; None for pairs in their own order.
        make: Writes the value for the R pairs of a body.
        number: What an integer means: "expert", "token", "slot", "pair" (its flat number), "place" (the row of a
            pair in the order `unsorts`); "sort" for a sort's pair of results; "marks" for a one-hot of the experts;
            "counts" or "ends" of the experts' rows for lead 0. "" for anything else.
        constant: It is the same for all rows of one expert.
        weighs: It depends on weights of experts.
        unsorts: The order that places belong to.
    """

    lead: int
    order: fx.Node | None
    make: Make
    number: str = ""
    constant: bool = False
    weighs: bool = False
    unsorts: fx.Node | None = None

    @property
    def where(self) -> tuple[int, fx.Node | None]:
        return self.lead, self.order


@dataclass(frozen=True)
class Region:
    """The values that follow from one choice of experts.

    Attributes:
        indices: (N, k) or (N,).
        count: E.
        rows: Node → what its axes run over.
    """

    indices: fx.Node
    count: int
    rows: dict[fx.Node, Rows]

    @property
    def slots(self) -> int:
        """How many experts a token chooses, k."""
        value = self.indices.meta["val"]
        return int(value.shape[1]) if value.dim() == 2 else 1

    @property
    def tokens(self) -> str:
        """N, as the tracer writes it."""
        return str(self.indices.meta["val"].shape[0])

    @property
    def pairs(self) -> str:
        """S, as the tracer writes it."""
        return str(self.indices.meta["val"].numel())

    def leads(self, shape: Sequence[object], lead: int) -> bool:
        """Whether a shape begins as values with so many leading axes do."""
        begin = [str(size) for size in shape[:lead]]
        return begin == ([self.pairs] if lead == 1 else [self.tokens, str(self.slots)])

    def common(self, nodes: Sequence[fx.Node], rank: int | None = None) -> Rows | None:
        """What the axes of a result run over, if all operands that depend on the indices agree.

        Args:
            nodes: The operands.
            rank: How many axes an operand has that begins with those of the pairs; the others are lined up with
                it from the right. None where only operands that depend on the indices count.
        """
        found = [self.rows[node] for node in nodes if node in self.rows]
        if not found or len({rows.where for rows in found}) > 1 or found[0].lead == 0:
            return None
        rows = found[0]
        others = [node for node in nodes if node not in self.rows] if rank is not None else []
        return Rows(
            *rows.where,
            make=rows.make,
            constant=all(each.constant for each in found)
            and not any(runs_over_pairs(node, rows, rank or 0) for node in others),
            weighs=any(each.weighs for each in found),
        )


def runs_over_pairs(node: fx.Node, rows: Rows, rank: int) -> bool:
    """Whether a value that does not depend on the indices has axes that are lined up with those of the pairs."""
    sizes = shape_of(node)[: max(0, rows.lead - (rank - rank_of(node)))]
    return any(str(size) != "1" for size in sizes)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments. An operator has those of its schema, which type checkers do not know."""
    return node.args


def shape_of(node: fx.Node) -> tuple[object, ...]:
    """The shape of a node's value; empty where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def rank_of(node: fx.Node) -> int:
    return len(shape_of(node))


def rest_of(node: fx.Node, lead: int) -> list[int] | None:
    """The sizes behind the leading axes; None where one is not a plain number."""
    sizes = shape_of(node)[lead:]
    return [int(str(size)) for size in sizes] if all(str(size).isdigit() for size in sizes) else None
