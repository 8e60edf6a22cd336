"""Products of two operands, summed over some of their axes: however they are written, as an einsum of two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from moe_export.export.axes.shapes import arguments, rank_of

_aten = torch.ops.aten
_PRODUCTS = {_aten.matmul.default, _aten.bmm.default, _aten.mm.default}


@dataclass(frozen=True)
class Contraction:
    """A product of two operands, summed over letters, as an einsum writes it."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    letters: tuple[str, str]
    out: str

    @property
    def turned(self) -> Contraction:
        return Contraction(self.node, self.operands[::-1], self.letters[::-1], self.out)

    def shared(self, *, kept: bool) -> list[str]:
        """Letters of both operands that the result has, or has not."""
        return [a for a in self.letters[0] if a in self.letters[1] and (a in self.out) is kept]

    def only(self, place: int) -> list[str]:
        """Letters of one operand that the result has and the other operand has not."""
        return [a for a in self.letters[place] if a not in self.letters[1 - place] and a in self.out]


def contractions(node: fx.Node) -> Iterator[Contraction]:
    """A product, either operand first."""
    args = arguments(node)
    if node.target is _aten.einsum.default:
        equation, operands = str(args[0]).replace(" ", ""), args[1]
        terms, arrow, out = equation.partition("->")
        letters = terms.split(",")
        plain = all(len(set(term)) == len(term) for term in (*letters, out)) and "." not in equation
        if not arrow or len(operands) != 2 or not plain:
            return
        found = Contraction(node, tuple(operands), (letters[0], letters[1]), out)
    elif (
        node.target in _PRODUCTS and rank_of(args[1]) in (2, rank_of(args[0])) and rank_of(args[0]) in (2, 3)
    ):
        batch = "b" * (rank_of(args[0]) - 2)
        other = batch if rank_of(args[1]) == rank_of(args[0]) else ""
        found = Contraction(node, (args[0], args[1]), (f"{batch}ij", f"{other}jk"), f"{batch}ik")
    else:
        return
    yield found
    yield found.turned
