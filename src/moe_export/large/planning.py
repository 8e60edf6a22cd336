"""Calculate what splitting experts over ranks costs: bytes per rank, bytes exchanged, the batch that fits.

Letters: R ranks, E experts, N tokens, k choices, S = N*k pairs.

A rank holds everything outside the experts, and its share of every layer's experts. With `all_reduce` every rank has
all N tokens and computes the S / R pairs of its experts, if the routing is even. With `all_to_all` each rank has N
tokens of its own; it sends S rows and, if the routing is even, receives S rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from moe_export.export.parallel.placement import even
from moe_export.large.planning_count import Counted, ExpertsCount

_MOST_BATCH = 2**20  # the search for the largest batch ends here, and prints it with a "+"


@dataclass(frozen=True)
class Split:
    """The costs of one number of ranks; for each way to exchange, `all_reduce` and `all_to_all`, where they differ.

    Attributes:
        ranks: R.
        experts: For each layer, the number of experts on the fullest rank.
        weights: Bytes of the fullest rank's weights.
        activations: Peak bytes of a rank's values for the example's batch, for each way to exchange.
        reduced: Bytes per token that a rank adds to partial sums, over all layers.
        on_wire: Bytes per token that a rank sends if the sums go round a ring: 2 (R - 1) / R times `reduced`.
        rows: Bytes per token that a rank sends to other ranks as rows, there and back, if the routing is even.
        flops: A rank's FLOPs for the example's batch, for each way to exchange.
        batch: The largest batch that fits beside the weights, for each way to exchange; 0 if none does.
    """

    ranks: int
    experts: tuple[int, ...]
    weights: int
    activations: Mapping[str, int]
    reduced: int
    on_wire: float
    rows: float
    flops: Mapping[str, int]
    batch: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """The costs of a model on each number of ranks.

    Attributes:
        counted: The model.
        memory: Bytes of one device.
        splits: In order of the number of ranks.
        batch: The symbol of the batch dimension, the first free one; None if the model fixes all sizes.
    """

    counted: Counted
    memory: int
    splits: tuple[Split, ...]
    batch: str | None

    @property
    def fits_from(self) -> int | None:
        """The fewest ranks on which a batch of 1 fits with either way to exchange; None if it fits on none."""
        return next((split.ranks for split in self.splits if max(split.batch.values())), None)


def plan(counted: Counted, memory: int, gpus: int) -> Plan:
    """Calculate the costs on 1, 2, 4, ... ranks.

    Args:
        counted: The model.
        memory: Bytes of one device.
        gpus: The largest number of ranks, which need not be a power of 2.
    """
    batch = next(iter(counted.dims), None)
    return Plan(
        counted, memory, tuple(_split(counted, memory, ranks, batch) for ranks in numbers(gpus)), batch
    )


def numbers(gpus: int) -> list[int]:
    """1, 2, 4, ... up to `gpus`, and `gpus` itself."""
    found = [1]
    while found[-1] * 2 <= gpus:
        found.append(found[-1] * 2)
    return found if found[-1] == gpus else [*found, gpus]


def _split(counted: Counted, memory: int, ranks: int, batch: str | None) -> Split:
    blocks, fullest = counted.blocks, weights_of(counted, ranks)
    ways = ("all_reduce", "all_to_all")
    wire = (ranks - 1) / ranks
    reduced = sum(block.partial for block in blocks)
    return Split(
        ranks=ranks,
        experts=tuple(ceil(block.experts / ranks) for block in blocks),
        weights=max(fullest),
        activations={way: activations(counted, ranks, way, counted.dims) for way in ways},
        reduced=reduced if ranks > 1 else 0,
        on_wire=2 * wire * reduced,
        rows=sum(wire * block.slots * (block.there + block.back) for block in blocks),
        flops={way: _flops(counted, ranks, way) for way in ways},
        batch={way: _largest(counted, memory - max(fullest), ranks, way, batch) for way in ways},
    )


def weights_of(counted: Counted, ranks: int) -> list[int]:
    """(R,) bytes of each rank's weights, with the experts placed evenly and in order."""
    found = [counted.dense_bytes] * ranks
    for block in counted.blocks:
        for expert, rank in enumerate(even(block.experts, ranks)):
            found[rank] += block.bytes_each[expert]
    return found


def activations(counted: Counted, ranks: int, way: str, sizes: Mapping[str, int]) -> int:
    """Peak bytes of a rank's values: outside the experts, or within a block along with the values needed after it.

    Args:
        counted: The model.
        ranks: R.
        way: `all_reduce` or `all_to_all`.
        sizes: The size of each free dimension, by symbol.
    """
    most, at = counted.memory(sizes)
    for block, kept in zip(counted.blocks, at, strict=True):
        most = max(
            most, kept + _pairs(block, ranks, way, sizes) * block.values + _travelling(block, way, sizes)
        )
    return most


def _pairs(block: ExpertsCount, ranks: int, way: str, sizes: Mapping[str, int]) -> int:
    """The pairs that a rank computes if the routing is even: S / R with `all_reduce`, S with `all_to_all`."""
    pairs = block.tokens(sizes) * block.slots
    return ceil(pairs / min(ranks, block.experts)) if way == "all_reduce" else pairs


def _travelling(block: ExpertsCount, way: str, sizes: Mapping[str, int]) -> int:
    """Bytes of a block's exchange on a rank: the partial sum; or the rows sent and the rows received."""
    if way == "all_reduce":
        return block.tokens(sizes) * block.partial
    return 2 * block.tokens(sizes) * block.slots * max(block.there, block.back)


def _flops(counted: Counted, ranks: int, way: str) -> int:
    """A rank's FLOPs for the example's batch."""
    pairs = sum(_pairs(block, ranks, way, counted.dims) * block.flops for block in counted.blocks)
    return counted.flops(counted.dims) + pairs


def _largest(counted: Counted, memory: int, ranks: int, way: str, batch: str | None) -> int:
    """The largest batch whose values fit into `memory` bytes, the other dimensions as in the example.

    At most `_MOST_BATCH`; 0 if none fits. For a model of fixed sizes 1 if the example fits, else 0.
    """

    def fits(size: int) -> bool:
        sizes = counted.dims if batch is None else {**counted.dims, batch: size}
        return activations(counted, ranks, way, sizes) <= memory

    if batch is None:
        return int(fits(1))
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_BATCH and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def lines(found: Plan, names: Sequence[str] = ()) -> list[str]:
    """The plan as lines of text.

    Args:
        found: The plan.
        names: Lines on the model that come first.
    """
    counted = found.counted
    text = [*names, f"{counted.parameters:,} parameters, {human(counted.bytes)}; "
            f"{human(counted.dense_bytes)} of them on every rank"]  # fmt: skip
    for block in counted.blocks:
        each = max(block.bytes_each)
        text.append(
            f"  {block.module}: {block.experts} experts of {human(each)}, {block.slots} a token, "
            f"{block.flops:,} FLOP a pair"
        )
    sizes = ", ".join(f"{counted.names[name]}={size}" for name, size in counted.dims.items())
    text.append(f"example sizes: {sizes or 'all fixed'}; {human(found.memory)} a device")
    text += _table(found)
    text.append(_verdict(found))
    return text


def _table(found: Plan) -> list[str]:
    size = found.counted.names[found.batch] if found.batch else "fits"
    head = ("ranks", "experts", "weights", "all_reduce: values", "B/token", "on a ring", f"largest {size}",
            "all_to_all: values", "B/token", f"largest {size}")  # fmt: skip
    rows = [
        (
            str(split.ranks),
            "/".join(map(str, dict.fromkeys(split.experts))) or "-",
            human(split.weights),
            human(split.activations["all_reduce"]),
            f"{split.reduced:,}",
            f"{split.on_wire:,.0f}",
            _batch(found, split.batch["all_reduce"]),
            human(split.activations["all_to_all"]),
            f"{split.rows:,.0f}",
            _batch(found, split.batch["all_to_all"]),
        )
        for split in found.splits
    ]
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    ]


def _batch(found: Plan, size: int) -> str:
    if not size:
        return "does not fit"
    return "fits" if found.batch is None else f"{size:,}" + ("+" if size >= _MOST_BATCH // 2 else "")


def _verdict(found: Plan) -> str:
    first, last = found.fits_from, found.splits[-1]
    if first is not None:
        before = [split.ranks for split in found.splits if split.ranks < first]
        return f"fits from {first} rank{'s' * (first > 1)} on" + (f"; not on {before[-1]}" if before else "")
    least = last.weights
    dense = found.counted.dense_bytes
    if dense > found.memory:
        return f"does not fit on any number of ranks: every rank needs {human(dense)} without any experts"
    if not found.counted.blocks:
        return "does not fit, and there are no experts to spread"
    if least > found.memory:
        return f"does not fit on {last.ranks} ranks: the fullest rank's weights are {human(least)}"
    return (
        f"does not fit on {last.ranks} ranks: the weights fit, but not the values of a batch of 1 beside them"
    )


def human(size: float) -> str:
    """A number of bytes as `24.0 KB` or `80.0 GB`, in powers of 1000 as devices are sold."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
