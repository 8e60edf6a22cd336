"""Draw which rank's tokens go to which expert on which rank, and the bytes that this takes: SVG, and the same as text.

The tokens are those of a real batch. Left the ranks that have them, right the ranks with their experts, a band for the
rows that go from one to the other, as wide as they are many; rows that stay on their rank are pale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from moe_export.export.gates.colours import COLOURS, INK, PAPER, STYLE
from moe_export.own_files import MARK

_WIDTH, _MARGIN, _ROW, _GAP, _HEAD = 760, 16, 18, 12, 46
_LEFT, _RIGHT = 170, 470
_BAR = 120


@dataclass(frozen=True)
class Flow:
    """The rows of one layer.

    Attributes:
        name: Of the layer's module.
        kind: `all_reduce` or `all_to_all`.
        placement: (E,) the rank of each expert.
        ranks: R.
        rows: (R, E) pairs of a token of a rank and an expert; of an `all_reduce` every rank has all tokens, and
            there is one line (1, E).
        tokens: (R,) or (1,) tokens of each rank.
        bytes_there: Of a row on its way to its expert; of an `all_reduce`, of a token in the partial sum.
        bytes_back: Of a row on its way back; 0 for an `all_reduce`.
    """

    name: str
    kind: str
    placement: tuple[int, ...]
    ranks: int
    rows: np.ndarray
    tokens: tuple[int, ...]
    bytes_there: int
    bytes_back: int

    @property
    def between(self) -> np.ndarray:
        """(R, R) or (1, R): rows from each rank to each."""
        found = np.zeros((len(self.rows), self.ranks), dtype=np.int64)
        for expert, rank in enumerate(self.placement):
            found[:, rank] += self.rows[:, expert]
        return found

    @property
    def bytes(self) -> int:
        """What all ranks give: partial sums; or rows that go to other ranks, and come back."""
        if self.kind == "all_reduce":
            return self.ranks * self.tokens[0] * self.bytes_there
        between = self.between
        return int(between.sum() - np.trace(between)) * (self.bytes_there + self.bytes_back)


def flow(
    layer: tuple[str, str, Sequence[int], int], indices: np.ndarray, batch: int, row_bytes: tuple[int, int]
) -> Flow:
    """The rows of one layer on a batch.

    Args:
        layer: Its module, the kind of exchange, the rank of each expert, and R.
        indices: (N, k) the experts of each token; what names none goes nowhere.
        batch: Rows of the batch, which the ranks share in order; N tokens are as many for each.
        row_bytes: Of a row there and back.
    """
    name, kind, placement, ranks = layer
    experts, tokens = len(placement), len(indices)
    owner = np.zeros(tokens, dtype=np.int64)
    if kind == "all_to_all":
        bounds = [batch * rank // ranks for rank in range(ranks + 1)]
        row = np.arange(tokens) * batch // max(1, tokens)
        owner = np.searchsorted(bounds, row, side="right") - 1
    lines = ranks if kind == "all_to_all" else 1
    rows = np.zeros((lines, experts), dtype=np.int64)
    for line in range(lines):
        chosen = indices[owner == line].reshape(-1)
        chosen = chosen[(chosen >= 0) & (chosen < experts)]
        rows[line] = np.bincount(chosen, minlength=experts)
    shares = tuple(int((owner == line).sum()) for line in range(lines))
    return Flow(name, kind, tuple(placement), ranks, rows, shares, *row_bytes)


def lines(flows: Sequence[Flow]) -> list[str]:
    """The same as text: for each layer the loads, the rows between ranks, and the bytes."""
    found = []
    for one in flows:
        found.append(f"{one.name}: {sum(one.tokens)} tokens, {len(one.placement)} experts, {one.kind}")
        for rank in range(one.ranks):
            own = [expert for expert, owner in enumerate(one.placement) if owner == rank]
            loads = " ".join(f"{expert}:{int(one.rows[:, expert].sum())}" for expert in own) or "none"
            found.append(f"  rank {rank} has experts (rows) {loads}")
        if one.kind == "all_to_all":
            for rank, row in enumerate(one.between):
                found.append(
                    f"  rank {rank} sends {' '.join(map(str, row))} rows to ranks 0 to {one.ranks - 1}"
                )
        found.append(f"  exchanged: {one.bytes} bytes")
    return found


def draw(flows: Sequence[Flow]) -> str:
    """The picture, as the text of an SVG file."""
    parts, top = [], _MARGIN
    for one in flows:
        drawn, height = _drawn(one, top)
        parts += drawn
        top += height + 2 * _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}" '
        f'font-family="sans-serif" font-size="12"><!-- {MARK} -->{STYLE}'
        f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _drawn(one: Flow, top: int) -> tuple[list[str], int]:
    """One layer, and its height."""
    begin = top + _HEAD
    places, end = _expert_places(one, begin)
    sources = _source_places(one, begin, end)
    most = max(1, int(one.rows.max(initial=0)))
    parts = [
        _text(_MARGIN, top + 14, f"{one.name}: {one.kind} of {len(one.placement)} experts", weight="bold")
    ]
    parts.append(_text(_MARGIN, top + 32, _caption(one)))
    for (source, expert), count in np.ndenumerate(one.rows):
        if count:
            stays = one.kind == "all_to_all" and one.placement[expert] == source
            parts.append(
                _band(sources[source], places[expert], 1 + 9 * count / most, one.placement[expert], stays)
            )
    for line, middle in enumerate(sources):
        what = f"rank {line}: {one.tokens[line]} tokens"
        what = what if one.kind == "all_to_all" else f"{one.tokens[0]} tokens on every rank"
        colour = COLOURS[line % len(COLOURS)] if one.kind == "all_to_all" else INK
        parts.append(_box(_MARGIN, middle - 14, _LEFT - _MARGIN, 28, colour))
        parts.append(_text(_MARGIN + 8, middle + 4, what))
    loads = one.rows.sum(axis=0)
    for rank in range(one.ranks):
        parts += _rank(one, rank, places, loads)
    return parts, int(end - top)


def _caption(one: Flow) -> str:
    if one.kind == "all_reduce":
        return f"each rank gives {one.tokens[0]} x {one.bytes_there} bytes of partial sums; {one.bytes} bytes in all"
    between = one.between
    away = int(between.sum() - np.trace(between))
    return (
        f"{away} of {int(between.sum())} rows go to another rank: {one.bytes_there} bytes there, "
        f"{one.bytes_back} back; {one.bytes} bytes in all"
    )


def _expert_places(one: Flow, begin: int) -> tuple[list[float], float]:
    """The middle of each expert, rank by rank; and where they end."""
    places, place = [0.0] * len(one.placement), float(begin)
    for rank in range(one.ranks):
        own = [expert for expert, owner in enumerate(one.placement) if owner == rank]
        for expert in own:
            places[expert] = place + _ROW / 2
            place += _ROW
        place += _GAP + (0 if own else _ROW)
    return places, place


def _source_places(one: Flow, begin: float, end: float) -> list[float]:
    step = (end - begin - _GAP) / len(one.rows)
    return [begin + step * (line + 0.5) for line in range(len(one.rows))]


def _rank(one: Flow, rank: int, places: Sequence[float], loads: np.ndarray) -> list[str]:
    own = [expert for expert, owner in enumerate(one.placement) if owner == rank]
    if not own:
        return []
    colour = COLOURS[rank % len(COLOURS)]
    first, last = places[own[0]] - _ROW / 2, places[own[-1]] + _ROW / 2
    parts = [_box(_RIGHT, first, _WIDTH - _MARGIN - _RIGHT, last - first, colour)]
    parts.append(_text(_WIDTH - _MARGIN - 8, first + 13, f"rank {rank}", anchor="end", weight="bold"))
    most = max(1, int(loads.max(initial=0)))
    for expert in own:
        size = _BAR * int(loads[expert]) / most
        parts.append(_text(_RIGHT + 8, places[expert] + 4, f"expert {expert}"))
        parts.append(
            f'<rect x="{_RIGHT + 76}" y="{places[expert] - 5:.1f}" width="{size:.1f}" height="10" fill="{colour}"/>'
        )
        parts.append(_text(_RIGHT + 80 + size, places[expert] + 4, str(int(loads[expert]))))
    return parts


def _box(left: float, top: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{left}" y="{top:.1f}" width="{width}" height="{height:.1f}" rx="4" fill="{colour}" '
        f'fill-opacity="0.10" stroke="{colour}"/>'
    )


def _band(begin: float, end: float, width: float, rank: int, stays: bool) -> str:
    middle = (_LEFT + _RIGHT) / 2
    return (
        f'<path d="M{_LEFT},{begin:.1f} C{middle},{begin:.1f} {middle},{end:.1f} {_RIGHT},{end:.1f}" fill="none" '
        f'stroke="{COLOURS[rank % len(COLOURS)]}" stroke-width="{width:.1f}" '
        f'stroke-opacity="{0.2 if stays else 0.6}"/>'
    )


def _text(left: float, base: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}">'
        f"{escape(text)}</text>"
    )
