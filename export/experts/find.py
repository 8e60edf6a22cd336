"""Find MoE blocks in a traced program: chains of additions to chosen rows, one an expert.

See docs/experts.md for what is recognised and what is checked. Letters: N tokens, k slots, E experts, R pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moe_export.export.axes.chosen import name_once
from moe_export.export.axes.listing import column_of
from moe_export.export.axes.one_hot import OneHotMask, one_hot_mask_of
from moe_export.export.axes.shapes import argument
from moe_export.export.axes.support import support_of
from moe_export.export.experts.derived import indices_of_entries, masked_indices, masked_indices_among
from moe_export.export.frontend.source import line_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class Selection:
    """The pairs that chose one expert, as row numbers or as a boolean mask.

    Attributes:
        one_hot: Which expert, of which indices.
        token, slot: Nodes (R,) with the pairs' tokens and slots; None where the code has no such node.
        mask: A boolean node (N,) that is used as an index itself.
    """

    one_hot: OneHotMask
    token: fx.Node | None
    slot: fx.Node | None
    mask: fx.Node | None

    @property
    def rows(self) -> tuple[fx.Node, ...]:
        return tuple(node for node in (self.token, self.slot, self.mask) if node is not None)


@dataclass(frozen=True)
class Iteration:
    """One expert's part: the rows that it computes and the node that adds them.

    Attributes:
        selection: Its pairs.
        value: (R, H), what is added; row r belongs to pair r.
        before, after: The accumulated value (N, H) before and after.
        overwrites: Whether the rows are put in place of the old ones instead of being added.
        accumulates: Whether the operator adds up rows of one token; otherwise the last of them is kept.
        through: (S,), where the row of each pair is added, if not to the row that the pair was read from.
    """

    selection: Selection
    value: fx.Node
    before: fx.Node
    after: fx.Node
    overwrites: bool = False
    accumulates: bool = True
    through: fx.Node | None = None


@dataclass(frozen=True)
class Chain:
    """The iterations of one block, in trace order: one an expert."""

    iterations: tuple[Iteration, ...]

    @property
    def indices(self) -> fx.Node:
        return self.iterations[0].selection.one_hot.indices

    @property
    def through(self) -> fx.Node | None:
        """Where the iterations add their rows; see `Iteration`."""
        return self.iterations[0].through

    @property
    def line(self) -> str | None:
        """`file:line` of the addition."""
        return line_of(self.iterations[0].after.meta.get("stack_trace"))


def find_chains(graph: fx.Graph) -> tuple[Chain, ...]:
    """Every chain of additions by experts 0, 1, ... in the graph; each expert adds once."""
    iterations = [iteration for selection in _selections(graph) for iteration in _iterations(selection)]
    by_before = {iteration.before: iteration for iteration in iterations}
    afters = {iteration.after for iteration in iterations}
    chains = []
    for iteration in iterations:
        if iteration.before in afters:
            continue
        chain = [iteration]
        while chain[-1].after in by_before:
            chain.append(by_before[chain[-1].after])
        if len(chain) > 1:
            chains.append(Chain(tuple(chain)))
    return tuple(chains)


def _selections(graph: fx.Graph) -> Iterator[Selection]:
    indices: dict[object, fx.Node] = {}
    for node in list(graph.nodes):
        one_hot = one_hot_mask_of(node) or _column(node, indices)
        if one_hot is None or one_hot.expert is None or "expert" in one_hot.axes:
            continue
        token, slot = row_numbers(node, one_hot)
        is_index = one_hot.axes == ("token",) and any(_indexes_by(user, node) for user in node.users)
        if token is None and not is_index:
            continue
        if not one_hot.exact:
            left = one_hot.remaining or one_hot.among
            if left is None:
                continue
            key = (one_hot.indices, left)
            if key not in indices:
                indices[key] = (
                    masked_indices(left)
                    if left is one_hot.remaining
                    else masked_indices_among(one_hot.indices, left)
                )
            one_hot = OneHotMask(indices[key], one_hot.axes, one_hot.expert)
        yield Selection(one_hot, token, slot, node if is_index else None)


def _column(node: fx.Node, indices: dict[object, fx.Node]) -> OneHotMask | None:
    """`gates[:, e] > 0`, as a mask of the choices outside of which the gates are 0; None if they are not seen to be."""
    column = column_of(node)
    if column is None or support_of(column[0].matrix) is None:
        return None
    entries, expert = column
    key = (entries.matrix, entries.above)
    if key not in indices:
        indices[key], _ = indices_of_entries(entries)
    return OneHotMask(indices[key], ("token",), expert)


def row_numbers(mask: fx.Node, one_hot: OneHotMask) -> tuple[fx.Node | None, fx.Node | None]:
    """The nodes with the token and the slot of each pair, where the mask goes through `nonzero` or `where`.

    A number along one of several axes of tokens names no token; `flat_tokens` has made one axis of those it can.
    """
    if one_hot.axes.count("token") > 1:
        return None, None
    found: dict[str, fx.Node] = {}
    for user in mask.users:
        for part in user.users:
            axis = _part_axis(user, part, len(one_hot.axes))
            if axis is not None:
                found[one_hot.axes[axis]] = part
    return found.get("token"), found.get("slot")


def _part_axis(numbers: fx.Node, part: fx.Node, rank: int) -> int | None:
    """Which axis of a mask the row numbers in `part` count along; None if it is no such part."""
    if numbers.target in (_aten.nonzero_numpy.default, _aten.where.default):
        return int(part.args[1])  # type: ignore[arg-type]
    if numbers.target is not _aten.nonzero.default:
        return None
    if part.target is _aten.select.int and part.args[1] in (1, -1):
        return int(part.args[2])  # type: ignore[arg-type]
    flat = {_aten.squeeze.dim, _aten.view.default, _aten.reshape.default}
    return 0 if rank == 1 and part.target in flat else None


def _indexes_by(user: fx.Node, mask: fx.Node) -> bool:
    value = mask.meta["val"]
    return (
        user.target in (_aten.index.Tensor, _aten.index_put.default)
        and value.dtype is torch.bool
        and list(user.args[1])[:1] == [mask]  # type: ignore[arg-type]
    )


def _iterations(selection: Selection) -> Iterator[Iteration]:
    """The additions to the rows of a selection, or to rows that a table of the pairs gives for them."""
    for rows in selection.rows:
        yield from _iterations_at(rows, selection)
        for user in rows.users:
            if user.target is _aten.index.Tensor and list(user.args[1]) == [rows]:  # type: ignore[arg-type]
                table = user.args[0]
                if isinstance(table, fx.Node) and _is_numbers(table):
                    for iteration in _iterations_at(user, selection, through=table):
                        yield dataclasses.replace(iteration, through=table)


def _iterations_at(
    rows: fx.Node, selection: Selection, through: fx.Node | None = None
) -> Iterator[Iteration]:
    for place in _spread(rows):
        for user in place.users:
            iteration = _as_iteration(user, place, selection)
            if iteration is not None and (iteration.accumulates or _rows_differ(selection, through)):
                yield iteration


def _rows_differ(selection: Selection, through: fx.Node | None) -> bool:
    """Whether a selection has no row of a token twice.

    `out[token] += rows` reads, adds and writes: of a token that is there twice, the last row is kept. What adds both
    may stand in its place only where there is no such token.
    """
    if through is None and "slot" not in selection.one_hot.axes:
        return True  # a mask of tokens
    return through is None and name_once(selection.one_hot.indices)


def _is_numbers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.int64 and value.dim() == 1


def _spread(rows: fx.Node) -> Iterator[fx.Node]:
    """Row numbers, also repeated along the axes of a row, as `scatter_add` wants them."""
    yield rows
    for user in rows.users:
        if (user.target in _SPREADS and user.args[0] is rows and user.meta["val"].dim() > 1) or (
            user.target in _SPREADS and rows.meta["val"].dim() > 1
        ):
            yield from _spread(user)


_SPREADS = {
    _aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.expand.default, _aten.repeat.default,
}  # fmt: skip
_SCATTERS = {_aten.scatter_add.default, _aten.scatter_reduce.two}


def _as_iteration(node: fx.Node, rows: fx.Node, selection: Selection) -> Iteration | None:
    args = node.args
    if node.target in _SCATTERS and args[1] == 0 and args[2] is rows and not node.kwargs:
        adds = len(args) < 5 or args[4] == "sum"
        value = args[3]
        assert isinstance(value, fx.Node)
        if adds and rows.meta["val"].dim() == value.meta["val"].dim():
            return Iteration(selection, value, args[0], node)  # type: ignore[arg-type]
        return None
    if node.target is _aten.index_add.default and args[1] == 0 and args[2] is rows and not node.kwargs:
        return Iteration(selection, args[3], args[0], node)  # type: ignore[arg-type]
    if node.target is not _aten.index_put.default or list(args[1]) != [rows]:  # type: ignore[arg-type]
        return None
    before, value = args[0], args[2]
    assert isinstance(before, fx.Node)
    assert isinstance(value, fx.Node)
    if argument(node, 3, "accumulate", False):
        return Iteration(selection, value, before, node)
    added = _added(value, before, rows)
    if added is None:
        return Iteration(selection, value, before, node, overwrites=True, accumulates=False)
    return Iteration(selection, added, before, node, accumulates=False)


def _added(value: fx.Node, before: fx.Node, rows: fx.Node) -> fx.Node | None:
    """In `before[rows] = before[rows] + added`: what is added."""
    if value.target is not _aten.add.Tensor or value.kwargs:
        return None
    parts = [part for part in value.args if isinstance(part, fx.Node)]
    old = [
        part
        for part in parts
        if part.target is _aten.index.Tensor and part.args[0] is before and list(part.args[1]) == [rows]  # type: ignore[arg-type]
    ]
    rest = [part for part in parts if part not in old]
    return rest[0] if len(old) == 1 and len(rest) == 1 else None
