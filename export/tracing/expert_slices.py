"""Slices of sorted rows by how many rows each expert has, as DeepSeek's `moe_infer` takes them, in a trace.

Such code sorts the pairs by expert, reads the numbers of rows as Python integers, runs expert e on
`rows[start:end]` and puts the results behind each other. In a trace these integers are `Count`s, which know the
experts whose rows they count. Row r belongs to the expert whose span holds r:

    segment[r] = the number of experts whose rows end at or before r
    rows[start:end] of expert e  →  rows[where(segment == e)]
    cat of the results           →  zeros.index_add(where(segment == e), result of e), for each e

which is what a slice means whatever the order of the rows. That the rows are sorted by expert, and the loop is an MoE
block, is found out later (`experts/pairs`).

Letters: S pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_export.export.sizes import expression_of, same_shape
from moe_export.export.torch_compat.proxies import node_of

_aten = torch.ops.aten
_ANYTHING = {_aten.empty_like.default, _aten.empty.memory_format, _aten.new_empty.default}
_NOTHING = {*_ANYTHING, _aten.zeros_like.default, _aten.zeros.default, _aten.new_zeros.default}


@dataclass(frozen=True)
class Segments:
    """The rows of all experts, one expert behind the other.

    Attributes:
        counts: (E,), how many rows each expert has; or where its rows end.
        running: Whether it is where they end.
        found: What was made for them, by the number of rows.
        rows: The numbers of the rows of each expert.
        written: The experts whose rows were written to what a node gives, and nothing else was.
    """

    counts: torch.Tensor
    running: bool = False
    found: dict[Any, torch.Tensor] = field(default_factory=dict, compare=False)
    rows: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)
    written: dict[fx.Node, frozenset[int]] = field(default_factory=dict, compare=False)

    def of(self, size: Any) -> torch.Tensor:
        """(S,): the expert of each of S rows."""
        key = expression_of(size)
        if key not in self.found:
            numbers = torch.arange(size, device=self.counts.device).unsqueeze(1)  # (S, 1)
            ends = self.counts if self.running else self.counts.cumsum(0)
            self.found[key] = (numbers >= ends).sum(1)  # (S, E) → (S,)
        return self.found[key]

    def rows_of(self, expert: int, size: Any) -> torch.Tensor:
        """(R,): the numbers of one expert's rows."""
        if expert not in self.rows:
            self.rows[expert] = torch.where(self.of(size) == expert)[0]
        return self.rows[expert]


class Count:
    """How many rows experts `first` to `last` (exclusive) have, for code that takes it for an integer."""

    def __init__(self, segments: Segments | None, first: int, last: int) -> None:
        self.segments, self.first, self.last = segments, first, last

    def __bool__(self) -> bool:
        return self.last > self.first

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Count):
            return (self.first, self.last) == (other.first, other.last)
        return not self._compared(other)

    def __gt__(self, other: object) -> bool:
        return self._compared(other)

    def __lt__(self, other: object) -> bool:
        if isinstance(other, Count) and other.first == self.first:
            return self.last < other.last
        raise self._unknown()

    def __le__(self, other: object) -> bool:
        return not self._compared(other)

    def __hash__(self) -> int:
        return hash((self.first, self.last))

    def _compared(self, other: object) -> bool:
        if isinstance(other, Count) and other.first == self.first:
            return self.last > other.last
        if other != 0:
            raise self._unknown()
        return bool(self)

    def _unknown(self) -> TypeError:
        return TypeError(
            "how many tokens an expert has depends on the data, and is compared with more than 0"
        )

    def __add__(self, other: object) -> Count:
        if isinstance(other, Count) and other.first == self.last:
            return Count(self.segments, self.first, other.last)
        if other == 0:
            return self
        raise self._unknown()

    def __radd__(self, other: object) -> Count:
        return self + other

    def __sub__(self, other: object) -> Count:
        if isinstance(other, Count) and other.first == self.first and other.last <= self.last:
            return Count(self.segments, other.last, self.last)
        if other == 0:
            return self
        raise self._unknown()

    def item(self) -> Count:
        return self

    def rows(self, expert: int, size: Any) -> torch.Tensor:
        """(R,): the numbers of the rows of one of its experts, of `size` rows in all."""
        if self.segments is None:
            raise self._unknown()
        return self.segments.rows_of(expert, size)


class Counts(list[Any]):
    """The numbers of rows of all experts, for code that takes them for an array or a list."""

    def tolist(self) -> Counts:
        return self

    def cpu(self) -> Counts:
        return self

    def numpy(self) -> Counts:
        return self

    def cumsum(self, *args: Any, **kwargs: Any) -> Counts:
        """Where the rows of each expert end."""
        return Counts(Count(count.segments, 0, count.last) for count in self)


def counts_of(counts: torch.Tensor, *, running: bool = False) -> Counts:
    """Python integers for a tensor (E,) of how many rows each expert has, or of where they end."""
    segments = Segments(counts, running)
    each = Counts(Count(segments, expert, expert + 1) for expert in range(int(counts.shape[0])))
    return each.cumsum() if running else each


def sliced(tensor: torch.Tensor, index: Any) -> torch.Tensor | None:
    """`tensor[start:end]` with counts for bounds; None if it is another index."""
    between = _rows_between(tensor, index)
    if between is None:
        return None
    found = tensor[between[0]]
    return found if not isinstance(index, tuple) else found[(slice(None), *index[1:])]


def written(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor | None:
    """`tensor[start:end] = value` with counts for bounds; None if it is another index."""
    between = _rows_between(tensor, index)
    if between is None:
        return None
    rows, expert, segments = between
    before = _written_so_far(tensor, segments)
    whole = not isinstance(index, tuple) and isinstance(value, torch.Tensor) and value.dim() == tensor.dim()
    if not whole or before is None or expert in before:
        tensor[rows if not isinstance(index, tuple) else (rows, *index[1:])] = value
        return tensor
    if not before:
        tensor.copy_(value.new_zeros(tensor.shape))
    tensor.index_add_(0, rows, value.to(tensor.dtype))  # to zeros, as `joined` puts the results together
    node = node_of(tensor)
    if node is not None:
        segments.written[node] = before | {expert}
    return tensor


def _written_so_far(tensor: torch.Tensor, segments: Segments) -> frozenset[int] | None:
    """The experts whose rows were written to a tensor that holds nothing else; None if it may hold more."""
    node = node_of(tensor)
    if node is None:
        return None
    return frozenset() if node.target in _NOTHING else segments.written.get(node)


def _rows_between(tensor: torch.Tensor, index: Any) -> tuple[torch.Tensor, int, Segments] | None:
    """(R,), the numbers of the rows of one expert, and which, if counts are the bounds of a slice."""
    first = index[0] if isinstance(index, tuple) and index else index
    if not isinstance(first, slice) or not isinstance(first.stop, Count) or first.step not in (None, 1):
        return None
    start, stop = first.start or 0, first.stop
    begin = start.last if isinstance(start, Count) else stop.first
    if stop.last != begin + 1:
        raise TypeError("rows of several experts at once are sliced by numbers that depend on the data")
    rows = stop.rows(begin, tensor.shape[0])
    assert stop.segments is not None
    return rows, begin, stop.segments


def split(tensor: torch.Tensor, sizes: Any, axis: int) -> tuple[torch.Tensor, ...] | None:
    """`tensor.split(counts)`; None if it is split by other sizes."""
    if (
        not isinstance(sizes, (list, tuple))
        or not sizes
        or not all(isinstance(each, Count) for each in sizes)
    ):
        return None
    if axis != 0:
        raise TypeError("numbers of rows that depend on the data split another axis than the first")
    return tuple(tensor[each.rows(each.first, tensor.shape[0])] for each in sizes)


def joined(parts: Sequence[Any], known: Iterable[Segments]) -> torch.Tensor | None:
    """`cat` of the results of experts 0 to E - 1, each for the rows of its expert; None if they are no such."""
    if len(parts) < 2 or not all(isinstance(part, torch.Tensor) and part.dim() for part in parts):
        return None
    for segments in known:
        rows = [segments.rows.get(expert) for expert in range(int(segments.counts.shape[0]))]
        if len(rows) != len(parts) or any(row is None for row in rows):
            continue
        if same_shape([part.shape[0] for part in parts], [row.shape[0] for row in rows if row is not None]):
            (segment,) = list(segments.found.values())[:1]
            result: torch.Tensor = parts[0].new_zeros((segment.shape[0], *parts[0].shape[1:]))
            for row, part in zip(rows, parts, strict=True):
                assert row is not None
                result = result.index_add(0, row, part)
            return result
    return None
