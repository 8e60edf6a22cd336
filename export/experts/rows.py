"""What the leading axes of a value run over, in code that computes all token-expert pairs at once.

Such code has no iteration per expert. It lays out the pairs as S = N*k rows, and looks up the weights of each row's
expert in a stack. Every value that depends on the chosen indices is followed through the graph:

    grid    (N, k, ...)   a token, a slot
    flat    (S, ...)      pair p is token p // k, slot p % k
    a slot  (N, ...)      the pairs of one slot, token by token
    sorted  (S, ...)      row r is pair order[r]; `order` sorts the pairs by expert

A rule for an operator says what its result's axes run over, and how the same is computed for any R pairs: flat and
sorted as (R, ...), a grid as (R, 1, ...), which is the grid of R tokens with one slot each. So almost every operator
is written as it is. A value that is the same for all rows of an expert, such as its weights, has 1 in the place of R.

Letters: N tokens, k slots, S = N*k pairs, E experts, R rows of a body.

The result, a `PairBody`, is `(token (R,), slot (R,), expert (1,), *shared, *weights) → (R, H)`, like the body of a loop
over experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from moe_export.errors import RefusedError
from moe_export.export.axes.operators import CASTS, TURNS, VIEWS
from moe_export.export.axes.shapes import argument, arguments, order_of, rank_of, rest_of, shape_of
from moe_export.export.experts.body import Weight
from moe_export.export.experts.notes import named
from moe_export.export.sizes import Size, same_shape, same_size

_aten = torch.ops.aten

_ON_STACKS = {*TURNS, *CASTS, _aten.unsqueeze.default, _aten.slice.Tensor} - {_aten.type_as.default}
"""Operators that may leave the first axis of a stack of weights where it is."""

Make = Callable[["PairBody"], fx.Node]


Number = Literal[
    "expert", "token", "slot", "pair", "place", "sort", "one-hot", "token one-hot", "counts", "ends", "behind",
    "columns", "turned columns", "parts", "sorts", "",
]  # fmt: skip
"""What an integer or a bool means.

expert, token, slot, pair: the expert, token, slot or flat number of a pair
place: the row of a pair in the order that `Rows.unsorts` names
sort: the two results of a sort
one-hot: which expert a pair chose; "token one-hot": which experts a token chose (lead 0)
counts, ends: how many rows each expert has, and where they end (lead 0)
behind: whether a row comes after those of an expert (lead 0)
columns: several numbers of each pair, side by side, as `nonzero` lists them; "turned columns": (c, S); "parts": as a
    tuple of (S, 1); "sorts": the two results of sorting each by itself

Empty: anything else.
"""


@dataclass(frozen=True)
class Rows:
    """What is known of a value that depends on the chosen indices.

    Attributes:
        lead: How many leading axes run over pairs: 1, or 2 for a grid. 0 for a value (E,) about all experts.
        order: The node that sorts the pairs; None for pairs in their own order; a number for those of one slot.
        make: Writes the value for the R pairs of a body.
        number: What an integer means (see `Number`).
        constant: Whether the value is the same for all rows of one expert.
        weighs: Whether the value depends on weights of experts.
        unsorts: For a `place`, the order in which it is the place.
        columns: For `columns` and the like, what is known of each; None for one that means nothing.
    """

    lead: int
    order: fx.Node | int | None
    make: Make
    number: Number = ""
    constant: bool = False
    weighs: bool = False
    unsorts: fx.Node | None = None
    columns: tuple[Rows | None, ...] = ()

    @property
    def where(self) -> tuple[int, fx.Node | int | None]:
        """What the leading axes run over: `lead` and `order`."""
        return self.lead, self.order


@dataclass(frozen=True)
class Region:
    """The values that follow from one choice of experts.

    Attributes:
        indices: (N, k) or (N,), the chosen experts.
        count: E.
        rows: Node → what its axes run over; grows while the choice is followed.
        rules: Nodes of which more is known than of others with their operator, and their rules.
    """

    indices: fx.Node
    count: int
    rows: dict[fx.Node, Rows]
    rules: Mapping[fx.Node, Callable[[Region], Rows | None]] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """How many experts a token chooses, k."""
        value = self.indices.meta["val"]
        return int(value.shape[1]) if value.dim() == 2 else 1

    @property
    def tokens(self) -> Size:
        """N."""
        return shape_of(self.indices)[0]

    @property
    def pairs(self) -> Size:
        """S."""
        count: Size = self.indices.meta["val"].numel()
        return count

    def leads(self, shape: Sequence[object], lead: int, order: fx.Node | int | None = None) -> bool:
        """Whether a shape begins like those of values with this many leading axes over pairs: (S,) or (N, k).

        Those of one slot, whose number is the order, begin with (N,).
        """
        all_pairs = [self.tokens] if isinstance(order, int) else [self.pairs]
        begin = all_pairs if lead == 1 else [self.tokens, self.slots]
        return same_shape(shape[:lead], begin)

    def common(self, nodes: Sequence[fx.Node], rank: int | None = None) -> Rows | None:
        """What the axes of a result run over, if all operands that depend on the indices agree; else None.

        Args:
            nodes: The operands.
            rank: The rank of an operand that begins with the axes of the pairs; the others are aligned with it from
                the right. None to ignore operands that do not depend on the indices.
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
    """Whether a value that does not depend on the indices has axes, not of size 1, aligned with those of the pairs."""
    sizes = shape_of(node)[: max(0, rows.lead - (rank - rank_of(node)))]
    return not all(same_size(size, 1) for size in sizes)


@dataclass
class PairBody:
    """A body that is being written.

    Attributes:
        region: What is known of the values.
        graph: The body's graph.
        token, slot, expert: The body's first inputs: (R,), (R,), (1,).
        shared, weights: Outside nodes and weights that it reads → its inputs for them, in their order.
    """

    region: Region

    def __post_init__(self) -> None:
        self.graph = fx.Graph()
        self.token, self.slot, self.expert = (
            self.graph.placeholder(name) for name in ("token", "slot", "expert")
        )
        self.shared: dict[fx.Node, fx.Node] = {}
        self.weights: dict[Weight, fx.Node] = {}
        self._made: dict[fx.Node, fx.Node] = {}
        self._leaves: dict[tuple[fx.Node, tuple[int, fx.Node | int | None], int], fx.Node] = {}
        self._bare: dict[fx.Node, fx.Node] = {}
        self._pair: fx.Node | None = None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write one operator."""
        return self.graph.call_function(target, args, kwargs)

    def value(self, node: fx.Node) -> fx.Node:
        """The R rows of a value that depends on the indices."""
        if node not in self._made:
            self._made[node] = self.region.rows[node].make(self)
        return self._made[node]

    def pair(self) -> fx.Node:
        """(R,): the flat numbers of the pairs."""
        if self._pair is None:
            scaled = self.call(_aten.mul.Tensor, self.token, self.region.slots)
            self._pair = self.call(_aten.add.Tensor, scaled, self.slot)
        return self._pair

    def is_pair(self, node: fx.Node | None) -> bool:
        """Whether a node of the body is the flat numbers of the pairs."""
        return node is not None and node is self._pair

    def entry(self, table: fx.Node) -> fx.Node:
        """(R,): what an outside value (N, E) holds for each pair's token and expert."""
        return self.call(_aten.index.Tensor, self.share(table), [self.token, self.expert])

    def share(self, node: fx.Node) -> fx.Node:
        """The body's input for an outside value that all experts read whole."""
        if node not in self.shared:
            self.shared[node] = self._input(f"shared_{len(self.shared)}", node, [*self.shared.values()])
        return self.shared[node]

    def weight(self, weight: Weight) -> fx.Node:
        """The body's input for the expert's own part of a weight, without the axis over experts."""
        if weight not in self.weights:
            node = weight.stack if weight.stack is not None else weight.separate[0]
            assert node is not None
            before = [*self.shared.values(), *self.weights.values()]
            self.weights[weight] = self._input(f"weight_{len(self.weights)}", node, before)
        return self.weights[weight]

    def _input(self, name: str, node: fx.Node, before: list[fx.Node]) -> fx.Node:
        with self.graph.inserting_after(before[-1] if before else self.expert):
            made = self.graph.placeholder(name)
        made.meta = dict(node.meta)
        return made

    def stack(self, node: fx.Node) -> fx.Node:
        """The expert's part (...) of a stack of weights (E, ...).

        Raises:
            RefusedError: The stack holds the weights of a different number of experts.
        """
        chain = []
        while node.target in _ON_STACKS and _keeps_experts(node):
            chain.append(node)
            node = arguments(node)[0]
        size = shape_of(node)[0]
        if not same_size(size, self.region.count):
            raise RefusedError(
                f"{node.name} holds the weights of {size} experts, and {self.region.count} are used"
            )
        part = self.weight(Weight(stack=node))
        for step in reversed(chain):
            part = self.bare(self.call(step.target, self.as_rows(part), *arguments(step)[1:], **step.kwargs))
        return part

    def as_rows(self, bare: fx.Node, lead: int = 1) -> fx.Node:
        """A value that is the same for all rows, with `lead` axes of size 1 in the place of those of the rows."""
        rows = bare
        for _ in range(lead):
            rows = self.call(_aten.unsqueeze.default, rows, 0)
        self._bare[rows] = bare
        return rows

    def bare(self, rows: fx.Node, lead: int = 1) -> fx.Node:
        """The inverse of `as_rows`."""
        if rows not in self._bare:
            bare = rows
            for _ in range(lead):
                bare = self.call(_aten.squeeze.dim, bare, 0)
            self._bare[rows] = bare
        return self._bare[rows]

    def operand(self, node: Any, rows: Rows, rank: int) -> Any:
        """An operand of a row-wise operator: its R rows if it runs over pairs, else unchanged.

        Args:
            node: Any argument.
            rows: What the result's axes run over.
            rank: The rank of an operand that begins with the axes of the pairs.
        """
        if not isinstance(node, fx.Node):
            return node
        if node in self.region.rows:
            return self.value(node)
        return self.leaf(node, rows, rank)

    def leaf(self, node: fx.Node, rows: Rows, rank: int) -> fx.Node:
        """A value that does not depend on the indices, with its rows in the order of the pairs of those that do."""
        key = (node, rows.where, rank)
        if key not in self._leaves:
            self._leaves[key] = self._lined_up(node, rows, rank)
        return self._leaves[key]

    def _lined_up(self, node: fx.Node, rows: Rows, rank: int) -> fx.Node:
        if not runs_over_pairs(node, rows, rank):
            return self.share(node)
        if isinstance(rows.order, int):
            return self._of_slot(node, rows.order)
        if rows.order is not None:
            raise RefusedError(f"{named(node)} is not sorted by expert as the other values are")
        if rows.lead == 1:
            return self.flat(node)
        if rank - rank_of(node) == 1:  # (k, ...): by slot alone
            found = self.call(_aten.index.Tensor, self.share(node), [self.slot])
            return self.call(_aten.unsqueeze.default, found, 1)
        return self.grid(node)

    def flat(self, node: fx.Node) -> fx.Node:
        """The R rows of an outside value (S, ...)."""
        source = arguments(node)[0] if arguments(node) else None
        if isinstance(source, fx.Node):
            if node.target is _aten.unsqueeze.default and arguments(node)[1] not in (0, -1 - rank_of(source)):
                return self.call(node.target, self.flat(source), arguments(node)[1])
            repeats = node.target is _aten.repeat_interleave.self_int and argument(node, 2, "dim") == 0
            by_slots = repeats and argument(node, 1, "repeats") == self.region.slots
            if by_slots and same_size(shape_of(source)[0], self.region.tokens):
                return self.call(_aten.index.Tensor, self.share(source), [self.token])
            shaped = node.target in VIEWS and rest_of(node, 1) is not None
            if shaped and self.region.leads(shape_of(source), 2):
                return self.call(_aten.reshape.default, self.grid(source), [-1, *(rest_of(node, 1) or [])])
            if shaped and self.region.leads(shape_of(source), 1):
                return self.call(_aten.reshape.default, self.flat(source), [-1, *(rest_of(node, 1) or [])])
        if self.region.slots == 1:
            return self.call(_aten.index.Tensor, self.share(node), [self.token])
        return self.call(_aten.index.Tensor, self.share(node), [self.pair()])

    def _of_slot(self, node: fx.Node, slot: int) -> fx.Node:
        """The R rows of an outside value (N, ...), which is that of each pair's own slot if it is `whole[:, slot]`."""
        source, *places = arguments(node) or (None,)
        if node.target is _aten.unsqueeze.default and places[0] % rank_of(node):
            return self.call(node.target, self._of_slot(source, slot), *places)
        own: Mapping[Any, list[int]] = {_aten.select.int: [1, slot], _aten.slice.Tensor: [1, slot, slot + 1]}
        if places == own.get(node.target) and same_shape(
            shape_of(source)[:2], [self.region.tokens, self.region.slots]
        ):
            found = self.call(_aten.index.Tensor, self.share(source), [self.token, self.slot])
            return self.call(_aten.unsqueeze.default, found, 1) if rank_of(node) == rank_of(source) else found
        return self._by_token(node)

    def grid(self, node: fx.Node) -> fx.Node:
        """The R rows, (R, 1, ...), of an outside value (N or 1, k or 1, ...)."""
        source = arguments(node)[0] if arguments(node) else None
        first, second = shape_of(node)[:2]
        if isinstance(source, fx.Node):
            if node.target is _aten.unsqueeze.default and arguments(node)[1] == 1:
                return self.call(_aten.unsqueeze.default, self._by_token(source), 1)
            if (
                node.target is _aten.unsqueeze.default
                and arguments(node)[1] in (-1, rank_of(source))
                and rank_of(source) > 1
            ):
                return self.call(_aten.unsqueeze.default, self.grid(source), rank_of(source))
            same_rest = rank_of(source) == rank_of(node) and same_shape(
                shape_of(source)[2:], shape_of(node)[2:]
            )
            if node.target is _aten.expand.default and same_rest:
                return self.grid(source)
        if same_size(first, 1):
            found = self.call(
                _aten.index.Tensor, self.call(_aten.squeeze.dim, self.share(node), 0), [self.slot]
            )
            return self.call(_aten.unsqueeze.default, found, 1)
        if same_size(second, 1):
            return self.call(_aten.index.Tensor, self.share(node), [self.token])
        found = self.call(_aten.index.Tensor, self.share(node), [self.token, self.slot])
        return self.call(_aten.unsqueeze.default, found, 1)

    def _by_token(self, node: fx.Node) -> fx.Node:
        return self.call(_aten.index.Tensor, self.share(node), [self.token])

    def module(self, result: fx.Node) -> fx.GraphModule:
        """The finished body."""
        self.graph.output(result)
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        return fx.GraphModule(nn.Module(), self.graph)


def _keeps_experts(node: fx.Node) -> bool:
    """Whether an operator on a stack leaves the axis over experts where it is."""
    source, *given = arguments(node)
    if not isinstance(source, fx.Node) or rank_of(source) < 2:
        return False
    if node.target in TURNS:
        return order_of(node)[0] == 0
    if node.target is _aten.unsqueeze.default:
        return bool(given[0] % rank_of(node) > 0)
    if node.target is _aten.slice.Tensor:
        return any(given[:1]) or same_shape(shape_of(node)[:1], shape_of(source)[:1])
    return True
