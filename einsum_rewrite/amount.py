"""Amounts that may contain unknown sizes: `2·b·l·d·n` floating-point operations, 48 MB.

An `Amount` is a sum of products of sizes. It is a number once every size is known, prints as a formula
until then, and can be estimated by guessing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_export.einsum_rewrite.binding import Size


@dataclass(frozen=True)
class Amount:
    """A sum of terms, each a number times the names of sizes that are not known."""

    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    @classmethod
    def product(cls, labels: Iterable[str], sizes: Mapping[str, Size], times: int = 1) -> Amount:
        """The product of the sizes of `labels`, times a number."""
        names = []
        for label in labels:
            size = sizes[label]
            if isinstance(size, int):
                times *= size
            else:
                names.append(size or label)
        return cls(((tuple(sorted(names)), times),) if times else ())

    def __add__(self, other: Amount) -> Amount:
        total = dict(self.terms)
        for names, times in other.terms:
            total[names] = total.get(names, 0) + times
        return Amount(tuple(sorted(total.items(), key=lambda term: (-len(term[0]), term))))

    @property
    def number(self) -> int | None:
        """The amount, if it contains no unknown size."""
        return None if any(names for names, _ in self.terms) else sum(times for _, times in self.terms)

    def at(self, guess: Mapping[str, int], otherwise: int) -> int:
        """The amount when the sizes are as guessed."""
        total = 0
        for names, times in self.terms:
            total += times * math.prod(guess.get(name, otherwise) for name in names)
        return total

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.number:,}"
        return " + ".join(_show_term(names, times) for names, times in self.terms)


def _show_term(names: tuple[str, ...], times: int) -> str:
    return "·".join(([f"{times}"] if times != 1 or not names else []) + list(names))


def show_bytes(amount: Amount, itemsize: int) -> str:
    """An amount of elements as memory: `48.0 MB`, or a formula."""
    number = amount.number
    if number is None:
        return f"{itemsize} B × ({amount})" if len(amount.terms) > 1 else f"{itemsize} B × {amount}"
    size = float(number * itemsize)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
