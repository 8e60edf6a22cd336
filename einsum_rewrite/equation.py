"""An einsum equation, parsed once, whatever notation it was written in.

    torch     "bld,dn->bldn"                    a letter a label, spaces mean nothing, "->..." may be left out
    einops    "b l d_in, d_in n -> b l d_in n"  a name a label, spaces separate names, "->" is required
    sublists  [0, 1], [1, 2], [0, 2]            numbers below 52 stand for A-Z and a-z

An `Equation` knows labels and operands, never sizes; `binding.bind` puts the shapes of tensors to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moe_export.einsum_rewrite.notation import ELLIPSIS, Notation, Token, pointed, tokenize
from moe_export.errors import EquationError


@dataclass(frozen=True)
class Equation:
    """Which labels each operand has, and which the result keeps.

    Attributes:
        text: The equation as it was written (sublists are spelled with torch's letters).
        notation: How `text` is to be read.
        inputs: The labels of each operand, axis by axis; `"..."` stands for any number of axes.
        output: The labels of the result. An implicit output has been made explicit.
        columns: Where each label of `inputs` stands in `text`, for error messages.
    """

    text: str
    notation: Notation
    inputs: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, notation: Notation = "torch") -> Equation:
        """Read `text` in the given notation.

        Raises:
            EquationError: With a caret under the character that is wrong.
        """
        left, right = tokenize(text, notation)
        inputs = tuple(tuple(token.label for token in term) for term in left)
        for term in left:
            _refuse_second_ellipsis(text, term)
        if right is None:
            output = implicit_output(inputs)
        else:
            _check_output(text, left, right)
            output = tuple(token.label for token in right)
        columns = tuple(tuple(token.column for token in term) for term in left)
        return cls(text, notation, inputs, output, columns)

    @classmethod
    def from_sublists(
        cls, inputs: Sequence[Sequence[object]], output: Sequence[object] | None = None
    ) -> Equation:
        """Read torch's other form: a list of numbers (or `...`) an operand, and one for the result.

        `Equation.from_sublists([[0, 1], [1, 2]], [0, 2])` is `Equation.parse("AB,BC->AC")`.
        """
        text = ",".join(_spell(sublist) for sublist in inputs)
        if output is not None:
            text += "->" + _spell(output)
        return cls.parse(text, "torch")

    def __str__(self) -> str:
        return self.text

    @property
    def letters(self) -> str:
        """The same equation in torch's letters, for tools that read nothing else.

        An equation with more than 52 different names cannot be spelled so.
        """
        if self.notation == "torch":
            return ",".join(map("".join, self.inputs)) + "->" + "".join(self.output)
        names = list(dict.fromkeys(label for term in self.inputs for label in term if label != ELLIPSIS))
        if len(names) > len(ALPHABET):
            raise EquationError(f"the equation has {len(names)} names, and there are 52 letters")
        spelled = {ELLIPSIS: ELLIPSIS} | dict(zip(names, ALPHABET[26:] + ALPHABET[:26], strict=False))
        terms = ("".join(spelled[label] for label in term) for term in self.inputs)
        return ",".join(terms) + "->" + "".join(spelled[label] for label in self.output)


ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def implicit_output(inputs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Torch's rule: the ellipsis, then the labels that occur once, capitals before small letters."""
    seen = Counter(label for term in inputs for label in term)
    once = sorted(label for label, times in seen.items() if times == 1 and label != ELLIPSIS)
    return ((ELLIPSIS,) if ELLIPSIS in seen else ()) + tuple(once)


def read_notation(value: str) -> Literal["torch", "einops"]:
    """The notation that a user named, or an error that lists the two there are."""
    if value == "torch":
        return "torch"
    if value == "einops":
        return "einops"
    raise EquationError(f"there is no notation {value!r}", hint="use 'torch' or 'einops'")


def _refuse_second_ellipsis(text: str, term: Sequence[Token]) -> None:
    dots = [token for token in term if token.label == ELLIPSIS]
    if len(dots) > 1:
        raise EquationError(
            "an operand has two ellipses",
            where=pointed(text, dots[1].column),
            hint="one '...' an operand: it stands for all the axes that are not named",
        )


def _check_output(text: str, left: Sequence[Sequence[Token]], right: Sequence[Token]) -> None:
    known = {token.label for term in left for token in term} | {ELLIPSIS}
    seen: set[str] = set()
    for token in right:
        where = pointed(text, token.column)
        if token.label not in known:
            raise EquationError(
                f"label {token.label!r} is in the output, and no operand has it",
                where=where,
                hint=_known_labels(text, token.label, known - {ELLIPSIS}),
            )
        if token.label in seen:
            raise EquationError(
                f"label {token.label!r} is twice in the output",
                where=where,
                hint="name each axis of the result once; a diagonal can be read, not written",
            )
        seen.add(token.label)


def _known_labels(text: str, label: str, known: set[str]) -> str:
    hint = f"the operands' labels are: {', '.join(sorted(known)) or 'none'}"
    if label.swapcase() in known:
        hint += "; capitals and small letters are different labels"
    elif " " not in text and any("_" in each for each in known):
        hint += "; with such names a word is one label, as in einops"
    return hint


def _spell(sublist: Sequence[object]) -> str:
    letters = []
    for item in sublist:
        if item is Ellipsis:
            letters.append(ELLIPSIS)
        elif isinstance(item, int) and 0 <= item < len(ALPHABET):
            letters.append(ALPHABET[item])
        else:
            raise EquationError(
                f"{item!r} is no subscript: the sublist form takes the numbers 0 to 51 and `...`",
                where=f"sublist {list(sublist)!r}",
                hint="renumber the labels from 0, or write the equation as a string",
            )
    return "".join(letters)
