"""Einsums, and products as einsums of two operands, with a letter for each axis, also where the code writes `...`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_letters

import torch
from torch import fx

from moe_export.einsum_rewrite import Equation
from moe_export.export.axes.shapes import arguments, rank_of, shape_of
from moe_export.export.sizes import same_size

_aten = torch.ops.aten
_PRODUCTS = {_aten.matmul.default, _aten.bmm.default, _aten.mm.default}


@dataclass(frozen=True)
class Letters:
    """An einsum as it would be written with nothing left out.

    Attributes:
        node: The node that computes it.
        operands: Its operands.
        terms: The letters of each.
        out: Those of the result.
    """

    node: fx.Node
    operands: tuple[fx.Node, ...]
    terms: tuple[str, ...]
    out: str

    @property
    def is_plain(self) -> bool:
        """Whether each letter runs over one axis of an operand, and nothing of size 1 is stretched along it."""
        stretched: dict[str, set[bool]] = {}
        for operand, term in zip(self.operands, self.terms, strict=True):
            for letter, size in zip(term, shape_of(operand), strict=True):
                stretched.setdefault(letter, set()).add(same_size(size, 1))
        one_size = all(len(found) == 1 for found in stretched.values())
        return one_size and all(len(set(term)) == len(term) for term in self.terms)

    @property
    def turned(self) -> Letters:
        """The same with the operands the other way round."""
        return Letters(self.node, self.operands[::-1], self.terms[::-1], self.out)

    def shared(self, *, kept: bool) -> list[str]:
        """Letters of both of two operands that the result has, or has not."""
        return [a for a in self.terms[0] if a in self.terms[1] and (a in self.out) is kept]

    def only(self, place: int) -> list[str]:
        """Letters of one of two operands that the result has and the other operand has not."""
        return [a for a in self.terms[place] if a not in self.terms[1 - place] and a in self.out]


def letters_of(einsum: fx.Node) -> Letters:
    """The letters of an einsum in a trace: `...d,de` of a matrix (t, d) is `td,de->te`."""
    text, operands = arguments(einsum)[:2]
    equation = Equation.parse(str(text))
    widths = [rank_of(each) - len(labels) + 1 for each, labels in zip(operands, equation.inputs, strict=True)]
    spread = [width for width, labels in zip(widths, equation.inputs, strict=True) if "..." in labels]
    unused = [letter for letter in ascii_letters if letter not in text][: max(spread, default=0)]

    def spelled(labels: tuple[str, ...], width: int) -> str:
        return "".join("".join(unused[len(unused) - width :]) if each == "..." else each for each in labels)

    terms = tuple(spelled(labels, width) for labels, width in zip(equation.inputs, widths, strict=True))
    return Letters(einsum, tuple(operands), terms, spelled(equation.output, len(unused)))


def products(node: fx.Node) -> Iterator[Letters]:
    """A product of two operands, summed over some of their axes: either operand first; none of any other node."""
    args = arguments(node)
    if node.target is _aten.einsum.default:
        found = letters_of(node)
        if len(found.operands) != 2 or not found.is_plain:
            return
    elif (
        node.target in _PRODUCTS and rank_of(args[1]) in (2, rank_of(args[0])) and rank_of(args[0]) in (2, 3)
    ):
        batch = "b" * (rank_of(args[0]) - 2)
        its_batch = batch if rank_of(args[1]) == rank_of(args[0]) else ""
        found = Letters(node, (args[0], args[1]), (f"{batch}ij", f"{its_batch}jk"), f"{batch}ik")
    else:
        return
    yield found
    yield found.turned
