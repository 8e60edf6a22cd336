"""Which rank holds which expert: evenly, in order, or as a file says.

Letters: E experts of a layer, R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_export.errors import UsageError


@dataclass(frozen=True)
class Layer:
    """What a placement is asked for.

    Attributes:
        module: Path of the module that the experts run in.
        experts: E.
        line: `file:line` of the block, for errors.
    """

    module: str
    experts: int
    line: str | None = None


@dataclass(frozen=True)
class Placement:
    """The rank of every expert.

    Attributes:
        ranks: R.
        layers: For each layer (E,), the rank of each expert.
    """

    ranks: int
    layers: tuple[tuple[int, ...], ...]

    def experts_of(self, layer: int, rank: int) -> tuple[int, ...]:
        """The experts of a layer that a rank holds, in their order."""
        return tuple(expert for expert, owner in enumerate(self.layers[layer]) if owner == rank)


def even(experts: int, ranks: int) -> tuple[int, ...]:
    """E experts in order on R ranks, (E,) ranks; where R does not divide E, the first ranks hold one more.

    Example:
        >>> even(6, 4)
        (0, 0, 1, 1, 2, 3)
    """
    least, more = divmod(experts, ranks)
    sizes = [least + (rank < more) for rank in range(ranks)]
    return tuple(rank for rank, size in enumerate(sizes) for _ in range(size))


def place(layers: Sequence[Layer], ranks: int, file: str | Path | None = None) -> Placement:
    """Place the experts of every layer.

    Args:
        layers: In the order of the graph.
        ranks: R.
        file: JSON: a list of E ranks for all layers, or an object from a layer (its number, or its module's path)
            to such a list; layers that it does not name are placed evenly.

    Raises:
        UsageError: The file cannot be read, names no such layer, or does not fit the experts; says which field.
    """
    found = tuple(even(layer.experts, ranks) for layer in layers)
    if file is None:
        return Placement(ranks, found)
    document = _read(Path(file))
    if isinstance(document, list):
        placed = [
            _checked(document, layer, ranks, f"{file}: the list", f", the experts of layer {number}")
            for number, layer in enumerate(layers)
        ]
        return Placement(ranks, tuple(placed))
    if not isinstance(document, dict):
        raise UsageError(
            f"{file}: a placement is a list of ranks, or an object from layers to lists",
            hint="for example [0, 0, 1, 1], or " + '{"0": [0, 0, 1, 1]}',
        )
    return Placement(ranks, tuple(_by_layer(document, layers, found, ranks, str(file))))


def _by_layer(
    document: Mapping[str, Any],
    layers: Sequence[Layer],
    found: Sequence[tuple[int, ...]],
    ranks: int,
    file: str,
) -> list[tuple[int, ...]]:
    placed = list(found)
    names = {str(number): number for number in range(len(layers))}
    names |= {layer.module: number for number, layer in enumerate(layers)}
    for name, value in document.items():
        if name not in names:
            raise UsageError(
                f"{file}: {name!r} is no layer of experts",
                hint="the layers: "
                + ", ".join(f"{number} ({layer.module})" for number, layer in enumerate(layers)),
            )
        placed[names[name]] = _checked(value, layers[names[name]], ranks, f"{file}: {name}")
    return placed


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the placement {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"the placement {path} is no JSON: {error}") from None


def _checked(value: Any, layer: Layer, ranks: int, where: str, of: str = "") -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != layer.experts:
        got = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UsageError(f"{where} has {got}, and there are {layer.experts} experts{of}", where=layer.line)
    for expert, rank in enumerate(value):
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < ranks:
            raise UsageError(f"{where}[{expert}]: {rank!r} is no rank", hint=f"the ranks: 0 to {ranks - 1}")
    return tuple(value)
