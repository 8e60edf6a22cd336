"""Slices of sorted rows by how many rows each expert has, as DeepSeek's `moe_infer` takes them, in a trace.

Such code sorts the pairs by expert, reads the numbers of rows as Python integers, runs expert e on
`rows[start:end]` and puts the results behind each other. In a trace these integers are `Count`s, which know the
experts whose rows they count. Row r belongs to the expert whose span holds r:

    segment[r] = the number of experts whose rows end at or before r
    rows[start:end] of expert e  →  rows[where(segment == e)]
    cat of the results           →  zeros.index_add(where(segment == e), result of e), for each e

which is what a slice means whatever the order of the rows. That the rows are sorted by expert, and the loop is an MoE
block, is found out later (`experts/pairs`).

A slice is a view, and `rows[where(…)]` is a copy. So what was written into a slice, `torch.mm(x, w, out=parts[e])`, is
written into what it is a slice of before that is read, and the other way round (`Slices`).

Letters: S pairs, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moe_export.export.sizes import expression_of, same_shape
from moe_export.export.torch_compat.operators import owner_of, writes_to
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


@dataclass
class _Slice:
    """The rows of one expert, copied.

    Attributes:
        rows: (R, ...), the copy.
        source: (S, ...), what they are a slice of.
        numbers: (R,), which rows of it they are.
        expert: Whose rows they are.
        segments: The rows of all experts.
        agreed: The counts of writes to the copy and to the source up to which both hold the same.
    """

    rows: torch.Tensor
    source: torch.Tensor
    numbers: torch.Tensor
    expert: int
    segments: Segments
    agreed: tuple[int, int] = (0, 0)

    def writes(self) -> tuple[int, int]:
        return writes_to(self.rows), writes_to(self.source)

    def is_apart_from(self, other: _Slice) -> bool:
        """Whether no row is in both."""
        return self.segments is other.segments and self.expert != other.expert


class Slices:
    """The slices that a trace has taken; whenever one is read, or its source is, it holds what a view would."""

    def __init__(self) -> None:
        self._by_rows: dict[int, _Slice] = {}
        self._by_source: dict[int, list[_Slice]] = {}

    def take(self, source: torch.Tensor, count: Count, expert: int) -> torch.Tensor:
        """(R, ...): the rows of one expert."""
        numbers = count.rows(expert, source.shape[0])
        assert count.segments is not None
        taken = _Slice(source[numbers], source, numbers, expert, count.segments)
        taken.agreed = taken.writes()
        self._by_rows[id(taken.rows)] = taken
        self._by_source.setdefault(id(owner_of(source)), []).append(taken)
        return taken.rows

    def before_a_call(self, given: Iterable[Any]) -> None:
        """Let what a call is given hold what was written into slices of it, or into what it is a slice of."""
        leaves = (leaf for each in given for leaf in (each if isinstance(each, (list, tuple)) else [each]))
        for owner in [owner_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]:
            taken = self._by_rows.get(id(owner))
            if taken is not None:
                self._write_back(taken.source, taken)
                if taken.writes()[1] != taken.agreed[1]:
                    taken.rows.copy_(taken.source[taken.numbers])
                    taken.agreed = taken.writes()
            self._write_back(owner)

    def _write_back(self, source: torch.Tensor, reader: _Slice | None = None) -> None:
        """Write what was written into slices; for a slice that is read, only into rows that are its own, too."""
        for each in self._by_source.get(id(owner_of(source)), ()):
            apart = reader is not None and (each is reader or each.is_apart_from(reader))
            if not apart and each.writes()[0] != each.agreed[0]:
                self._write(each.source, each.numbers, each.expert, each.segments, each.rows)

    def sliced(self, tensor: torch.Tensor, index: Any) -> torch.Tensor | None:
        """`tensor[start:end]` with counts for bounds; None if it is another index."""
        bounds = _bounds(index)
        if bounds is None:
            return None
        found = self.take(tensor, *bounds)
        return found if not isinstance(index, tuple) else found[(slice(None), *index[1:])]

    def split(self, tensor: torch.Tensor, sizes: Any, axis: int) -> tuple[torch.Tensor, ...] | None:
        """`tensor.split(counts)`; None if it is split by other sizes."""
        if (
            not isinstance(sizes, (list, tuple))
            or not sizes
            or not all(isinstance(each, Count) for each in sizes)
        ):
            return None
        if axis != 0:
            raise TypeError("numbers of rows that depend on the data split another axis than the first")
        return tuple(self.take(tensor, each, each.first) for each in sizes)

    def written(self, tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor | None:
        """`tensor[start:end] = value` with counts for bounds; None if it is another index."""
        bounds = _bounds(index)
        if bounds is None:
            return None
        count, expert = bounds
        numbers = count.rows(expert, tensor.shape[0])
        assert count.segments is not None
        if isinstance(index, tuple) or not isinstance(value, torch.Tensor) or value.dim() != tensor.dim():
            tensor[numbers if not isinstance(index, tuple) else (numbers, *index[1:])] = value
        elif not self._holds(tensor, numbers, value):  # of `tensor[start:end] += …`, which wrote it already
            self._write(tensor, numbers, expert, count.segments, value)
        return tensor

    def _holds(self, tensor: torch.Tensor, numbers: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether a value is the slice of these rows."""
        taken = self._by_rows.get(id(value))
        return taken is not None and taken.source is tensor and taken.numbers is numbers

    def _write(
        self,
        tensor: torch.Tensor,
        numbers: torch.Tensor,
        expert: int,
        segments: Segments,
        value: torch.Tensor,
    ) -> None:
        """Write the rows of one expert; slices of others' rows, and the one that is written, agree as before."""
        agreeing = [
            each
            for each in self._by_source.get(id(owner_of(tensor)), ())
            if each.source is tensor
            and each.segments is segments
            and (each.expert != expert or each.rows is value)
            and each.writes()[1] == each.agreed[1]
        ]
        before = _written_so_far(tensor, segments)
        if before is None or expert in before:
            tensor[numbers] = value
        else:
            if not before:
                tensor.copy_(value.new_zeros(tensor.shape))
            tensor.index_add_(
                0, numbers, value.to(tensor.dtype)
            )  # to zeros, as `joined` puts the results together
            node = node_of(tensor)
            if node is not None:
                segments.written[node] = before | {expert}
        for each in agreeing:
            own = each.writes()[0] if each.rows is value else each.agreed[0]
            each.agreed = (own, each.writes()[1])


def _written_so_far(tensor: torch.Tensor, segments: Segments) -> frozenset[int] | None:
    """The experts whose rows were written to a tensor that holds nothing else; None if it may hold more."""
    node = node_of(tensor)
    if node is None:
        return None
    return frozenset() if node.target in _NOTHING else segments.written.get(node)


def _bounds(index: Any) -> tuple[Count, int] | None:
    """The counts that bound a slice, and the one expert whose rows are between them."""
    first = index[0] if isinstance(index, tuple) and index else index
    if not isinstance(first, slice) or not isinstance(first.stop, Count) or first.step not in (None, 1):
        return None
    start, stop = first.start or 0, first.stop
    begin = start.last if isinstance(start, Count) else stop.first
    if stop.last != begin + 1:
        raise TypeError("rows of several experts at once are sliced by numbers that depend on the data")
    return stop, begin


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
