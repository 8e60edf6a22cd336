"""A layered layout, from top to bottom, of the boxes and lines of a graph's picture.

    layers ─▶ bends of long edges ─▶ order within a layer ─▶ x coordinates ─▶ y coordinates

*Layers*: a box lies below everything that it reads, by the longest path; boxes that no input leads to move down to
their readers. Between two layers of boxes lies a layer of labels, so that no label covers anything.
*Order*: by the mean position of the neighbours, downwards and upwards by turns; the order with the fewest crossings is
kept.
*x coordinates*: each layer is put as near to its neighbours as the order and the gaps allow, which is an isotonic
regression; then successive items, the bends of an edge above all, are aligned where there is room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

Point = tuple[float, float]
_APART, _BESIDE = 26.0, 14.0  # between boxes; beside the line of a long edge
_GAP, _MOST_GAP = 13.0, 44.0  # between layers, where all edges go straight down; where they go far sideways
_ORDERINGS, _SWEEPS, _ROUNDS = 12, 40, 6  # iterations over the order; over x coordinates; over alignments
_MOST_STEPS = 1_000_000  # moves of single items; a very large picture gets fewer sweeps
_SLOT = 16.0  # between the ends of two edges at a box


@dataclass(frozen=True)
class Box:
    """A box to place.

    Attributes:
        key: A unique key.
        width, height: In pixels.
        top: Whether it stays in the first layer.
    """

    key: str
    width: float
    height: float
    top: bool = False


@dataclass(frozen=True)
class Edge:
    """A line between two boxes, by their keys, with room for a label of `width` × `height` pixels."""

    source: str
    target: str
    width: float = 0.0
    height: float = 0.0


@dataclass(frozen=True)
class Placed:
    """A layout, in pixels; its upper left corner is (0, 0).

    Attributes:
        boxes: The centre of each box, by key.
        lines: For each edge the points that it goes through, from its source's lower edge to its target's upper edge.
        labels: For each edge the centre of its label.
        width, height: The size of the whole layout.
    """

    boxes: Mapping[str, Point]
    lines: tuple[tuple[Point, ...], ...]
    labels: tuple[Point, ...]
    width: float
    height: float


@dataclass(eq=False)
class _Item:
    """A box, a label or a bend of a long edge, in a layer."""

    layer: int
    width: float
    height: float
    is_box: bool
    above: list[_Item] = field(default_factory=list)
    below: list[_Item] = field(default_factory=list)
    place: int = 0
    x: float = 0.0
    y: float = 0.0


def place(boxes: Sequence[Box], edges: Sequence[Edge]) -> Placed:
    """Place boxes and the edges between them.

    Args:
        boxes: The boxes in topological order.
        edges: The edges between them, at most one for each pair of boxes.
    """
    ranks = _ranks(boxes, edges)
    items = {box.key: _Item(2 * ranks[box.key], box.width, box.height, True) for box in boxes}
    chains = [_chain(items[edge.source], items[edge.target], edge) for edge in edges]
    every = list(dict.fromkeys([*items.values(), *(item for chain in chains for item in chain)]))
    layers: list[list[_Item]] = [[] for _ in range(max((item.layer for item in every), default=0) + 1)]
    for item in every:
        layers[item.layer].append(item)
    _order(layers)
    _across(layers)
    height = _down(layers)
    left = min((item.x - item.width / 2 for item in every), default=0.0)
    right = max((item.x + item.width / 2 for item in every), default=0.0)
    for item in every:
        item.x -= left
    return Placed(
        {key: (item.x, item.y) for key, item in items.items()},
        _lines(chains, layers),
        tuple((chain[1].x, chain[1].y) for chain in chains),
        right - left,
        height,
    )


def _ranks(boxes: Sequence[Box], edges: Sequence[Edge]) -> dict[str, int]:
    """The layer of each box."""
    before: dict[str, list[str]] = {box.key: [] for box in boxes}
    after: dict[str, list[str]] = {box.key: [] for box in boxes}
    for edge in edges:
        before[edge.target].append(edge.source)
        after[edge.source].append(edge.target)
    ranks: dict[str, int] = {}
    loose: set[str] = set()
    for box in boxes:
        ranks[box.key] = max((ranks[key] + 1 for key in before[box.key]), default=0)
        if not box.top and all(key in loose for key in before[box.key]):
            loose.add(box.key)
    for box in reversed(boxes):
        if box.key in loose and after[box.key]:
            ranks[box.key] = min(ranks[key] for key in after[box.key]) - 1
    return ranks


def _chain(source: _Item, target: _Item, edge: Edge) -> list[_Item]:
    """An edge as one item per layer: its ends, its label in the layer below its source, and bends."""
    chain = [source]
    for layer in range(source.layer + 1, target.layer):
        is_label = layer == source.layer + 1
        size = (edge.width, edge.height) if is_label else (0.0, 0.0)
        chain.append(_Item(layer, *size, is_box=False))
    chain.append(target)
    for upper, lower in pairwise(chain):
        upper.below.append(lower)
        lower.above.append(upper)
    return chain


def _order(layers: list[list[_Item]]) -> None:
    """Sort each layer in place, so that few edges cross."""
    _number(layers)
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for iteration in range(_ORDERINGS):
        down = iteration % 2 == 0
        for layer in layers if down else reversed(layers):
            layer.sort(key=lambda item: _middle(item.above if down else item.below, item.place))
            _number([layer])
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best
    _number(layers)


def _number(layers: Sequence[Sequence[_Item]]) -> None:
    for layer in layers:
        for place, item in enumerate(layer):
            item.place = place


def _middle(neighbours: Sequence[_Item], otherwise: float) -> float:
    return sum(item.place for item in neighbours) / len(neighbours) if neighbours else otherwise


def _crossings(layers: Sequence[Sequence[_Item]]) -> int:
    count = 0
    for layer in layers:
        ends: list[int] = []
        for item in layer:
            own = [lower.place for lower in item.below]
            count += sum(len(ends) - bisect_left(ends, place + 1) for place in own)
            for place in own:
                insort(ends, place)
    return count


def _across(layers: Sequence[Sequence[_Item]]) -> None:
    """Give every item its x."""
    for layer in layers:
        x = 0.0
        for item, gap in zip(layer, [0.0, *_gaps(layer)], strict=False):
            x += gap
            item.x = x
    sweeps = max(8, min(_SWEEPS, _MOST_STEPS // max(1, sum(map(len, layers)))))
    for sweep in range(sweeps):
        down = sweep % 2 == 0
        both = sweep >= sweeps // 3
        for layer in layers if down else reversed(layers):
            wanted = [_wanted(item, down or both, not down or both) for item in layer]
            for item, x in zip(layer, _fitted(wanted, _gaps(layer)), strict=True):
                item.x = x
    spines = sorted(_spines(layers), key=len, reverse=True)
    for _ in range(_ROUNDS):
        for spine in spines:
            _straighten(spine, layers)


def _spines(layers: Sequence[Sequence[_Item]]) -> list[list[_Item]]:
    """Chains of items to be aligned: each item with its middle neighbour above, such that no two chains cross."""
    spine_of: dict[_Item, list[_Item]] = {}
    for layer in layers:
        last = -1
        low, high = _limits(layer)
        for item in layer:
            above = sorted(item.above, key=lambda other: other.place)
            middles = above[(len(above) - 1) // 2 : len(above) // 2 + 1]
            middles.sort(key=lambda other: -len(spine_of.get(other, ())))  # of two, prefer the longer spine
            for other in middles:
                taken = other in spine_of and spine_of[other][-1] is not other
                crosses = not low[item.place] <= other.place <= high[item.place]
                if other.place > last and not taken and not crosses:
                    spine_of.setdefault(other, [other]).append(item)
                    spine_of[item] = spine_of[other]
                    last = other.place
                    break
    return list({id(spine): spine for spine in spine_of.values()}.values())


def _limits(layer: Sequence[_Item]) -> tuple[list[float], list[float]]:
    """For each item, the least and greatest place in the layer above that it can be aligned with.

    An alignment must not cross an edge between two bends.
    """
    ends = [None if item.is_box or item.above[0].is_box else item.above[0].place for item in layer]
    low = list(accumulate((-1.0 if end is None else end for end in ends), max))
    high = list(accumulate((float("inf") if end is None else end for end in reversed(ends)), min))[::-1]
    return low, high


def _straighten(spine: Sequence[_Item], layers: Sequence[Sequence[_Item]]) -> None:
    """Give successive items of a spine the same x, as far as their neighbours leave room for it."""
    run: list[_Item] = []
    low, high = float("-inf"), float("inf")
    for item in spine:
        left, right = _room(item, layers[item.layer])
        if run and max(low, left) > min(high, right):
            _align(run, low, high)
            run, low, high = [], float("-inf"), float("inf")
        run.append(item)
        low, high = max(low, left), min(high, right)
    _align(run, low, high)


def _align(run: Sequence[_Item], low: float, high: float) -> None:
    """Give a run the same x between `low` and `high`: near the ends of the edge for bends, else near its mean x."""
    if low <= high:
        ends = [*run[0].above, *run[-1].below] if not any(item.is_box for item in run) else run
        x = min(high, max(low, sum(item.x for item in ends) / len(ends)))
        for item in run:
            item.x = x


def _room(item: _Item, layer: Sequence[_Item]) -> tuple[float, float]:
    """The least and greatest x of an item between its neighbours in the layer."""
    low, high = float("-inf"), float("inf")
    if item.place:
        left = layer[item.place - 1]
        low = left.x + _gaps([left, item])[0]
    if item.place + 1 < len(layer):
        right = layer[item.place + 1]
        high = right.x - _gaps([item, right])[0]
    return low, high


def _gaps(layer: Sequence[_Item]) -> list[float]:
    """The least distances between the centres of the items of a layer."""
    return [
        (left.width + right.width) / 2 + (_APART if left.is_box and right.is_box else _BESIDE)
        for left, right in pairwise(layer)
    ]


def _wanted(item: _Item, up: bool, down: bool) -> tuple[float, float]:
    """The mean x of an item's neighbours, and its weight; bends weigh more, so that long edges become straight."""
    around = [*(item.above if up else ()), *(item.below if down else ())]
    if not around:
        return item.x, 0.05
    weights = [1.0 if item.is_box or other.is_box else 6.0 for other in around]
    mean = sum(weight * other.x for weight, other in zip(weights, around, strict=True)) / sum(weights)
    return mean, sum(weights)


def _fitted(wanted: Sequence[tuple[float, float]], gaps: Sequence[float]) -> list[float]:
    """The x coordinates nearest to the wanted ones, by weighted least squares, that keep the order and the gaps.

    Pool adjacent violators: items that would violate a gap are merged into a pool, and moved to its weighted mean.
    """
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of items
    for (x, weight), offset in zip(wanted, offsets, strict=False):
        mean, total, count = x - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, members = pools.pop()
            mean = (mean * total + other * more) / (total + more)
            total, count = total + more, count + members
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]


def _down(layers: Sequence[Sequence[_Item]]) -> float:
    """Give every item its y, and return the total height. A gap grows with the sideways distance of its edges."""
    y = 0.0
    for layer in layers:
        height = max((item.height for item in layer), default=0.0)
        for item in layer:
            item.y = y + height / 2
        way = max((abs(lower.x - item.x) for item in layer for lower in item.below), default=0.0)
        y += height + (min(_MOST_GAP, max(_GAP, way / 9)) if layer is not layers[-1] else 0.0)
    return y


def _lines(
    chains: Sequence[Sequence[_Item]], layers: Sequence[Sequence[_Item]]
) -> tuple[tuple[Point, ...], ...]:
    """The points of each edge; beside a box that it passes, it goes straight down."""
    tall = {
        item: max(other.height for other in layer) / 2
        for layer in layers
        for item in layer
        if not item.is_box
    }
    starts = _slots([(chain[0], chain[1].x, number) for number, chain in enumerate(chains)])
    ends = _slots([(chain[-1], chain[-2].x, number) for number, chain in enumerate(chains)])
    lines = []
    for number, chain in enumerate(chains):
        first, last = chain[0], chain[-1]
        points = [(first.x + starts[number], first.y + first.height / 2)]
        for item in chain[1:-1]:
            half = tall[item]
            points += [(item.x, item.y - half), (item.x, item.y + half)] if half else [(item.x, item.y)]
        lines.append((*points, (last.x + ends[number], last.y - last.height / 2)))
    return tuple(lines)


def _slots(ends: Sequence[tuple[_Item, float, int]]) -> dict[int, float]:
    """For each edge, by number, the offset of its end from the middle of its box, in the order of where edges lead.

    The edge to the item nearest to the box's middle starts at the middle if that lies straight below or above.
    """
    groups: dict[_Item, list[tuple[float, int]]] = {}
    for box, x, number in ends:
        groups.setdefault(box, []).append((x, number))
    found = {}
    for box, members in groups.items():
        step = min(_SLOT, box.width * 0.75 / len(members))
        ordered = sorted(members)
        most = box.width / 2 - 12
        straight = min(range(len(ordered)), key=lambda place: abs(ordered[place][0] - box.x))
        off = 0.0 if abs(ordered[straight][0] - box.x) < 1 else straight - (len(ordered) - 1) / 2
        for place, (_, number) in enumerate(ordered):
            found[number] = max(-most, min(most, (place - straight + off) * step))
    return found
