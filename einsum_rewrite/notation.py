"""The two ways to spell an equation, and which of them a string is meant in.

`torch.einsum` reads a letter as a label and ignores spaces; `einops.einsum` reads a word as a label. The call
tells them apart (torch's equation comes first, einops' comes last). Where there is only a string, `deduce`
asks:

1. Which of the two can read it at all? (`d_in`, `x1`: only einops. No `->`: only torch.)
2. Do both read the same labels? (`b l d, d n -> b l n`) Then it does not matter.
3. Which of them fits the number of axes of the operands, if these are known?
4. Otherwise it is einops when some term has several words, and some word several letters
   (`batch dim, dim -> batch`), and torch when not (`mr, nr->mn`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_export.errors import EquationError

Notation = Literal["torch", "einops"]
ELLIPSIS = "..."
ARROW = "->"


@dataclass(frozen=True)
class Token:
    """A label, or an ellipsis, and the column of the equation where it starts."""

    label: str
    column: int


Terms = list[list[Token]]


def tokenize(text: str, notation: Notation) -> tuple[Terms, list[Token] | None]:
    """Split an equation into the labels of each operand and of the output (None when there is no `->`)."""
    left, arrow, _ = text.partition(ARROW)
    start = len(left) + len(ARROW)
    if notation == "einops" and not arrow:
        raise EquationError(
            "an einops pattern must contain '->'",
            where=pointed(text, len(text)),
            hint="write the axes of the result after '->'; nothing after it means a scalar",
        )
    read = _letters if notation == "torch" else _words
    terms, column = [], 0
    for term in left.split(","):
        terms.append(read(text, column, column + len(term)))
        column += len(term) + 1
    return terms, read(text, start, len(text)) if arrow else None


def deduce(text: str, ranks: Sequence[int] | None = None) -> Notation:
    """The notation that `text` is meant in (the rule is at the top of this file)."""
    as_torch, as_einops = _try(text, "torch"), _try(text, "einops")
    if as_einops is None:
        return "torch"
    if as_torch is None:
        return "einops"
    if as_torch == as_einops:
        return "torch"
    if ranks is not None and _fits(as_torch, ranks) != _fits(as_einops, ranks):
        return "torch" if _fits(as_torch, ranks) or not _knows_its_output(text) else "einops"
    words = [term.split() for term in re.split(r",|->", text)]
    spaced = any(len(term) > 1 for term in words)
    long = any(word != ELLIPSIS and len(word) > 1 for term in words for word in term)
    return "einops" if spaced and long else "torch"


def pointed(text: str, column: int) -> str:
    """The equation with a caret under one column, to be shown behind `where: `."""
    return f"{text}\n{' ' * (len('where: ') + column)}^"


def _try(text: str, notation: Notation) -> list[list[str]] | None:
    try:
        left, _ = tokenize(text, notation)
    except EquationError:
        return None
    return [[token.label for token in term] for term in left]


def _knows_its_output(text: str) -> bool:
    """Whether every word behind the arrow stands before it, too."""
    left, right = tokenize(text, "einops")
    return {token.label for token in right or []} <= {token.label for term in left for token in term}


def _fits(terms: list[list[str]], ranks: Sequence[int]) -> bool:
    if len(terms) != len(ranks):
        return False
    return all(
        rank >= len(term) - 1 if ELLIPSIS in term else rank == len(term)
        for term, rank in zip(terms, ranks, strict=True)
    )


def _letters(text: str, start: int, stop: int) -> list[Token]:
    tokens: list[Token] = []
    column = start
    while column < stop:
        char = text[column]
        if text.startswith(ELLIPSIS, column, stop):
            tokens.append(Token(ELLIPSIS, column))
            column += len(ELLIPSIS)
            continue
        if char != " ":
            if not (char.isascii() and char.isalpha()):
                raise _stray(text, column, "a label is one of the letters a-z and A-Z")
            tokens.append(Token(char, column))
        column += 1
    return tokens


_WORD = re.compile(r"\s+|(?P<label>\.\.\.|[^\W\d]\w*)")


def _words(text: str, start: int, stop: int) -> list[Token]:
    tokens: list[Token] = []
    column = start
    while column < stop:
        match = _WORD.match(text, column, stop)
        if match is None:
            raise _stray(text, column, "an axis is a name such as `b` or `d_in`")
        if match["label"]:
            tokens.append(Token(match["label"], column))
        column = match.end()
    return tokens


def _stray(text: str, column: int, rule: str) -> EquationError:
    char = text[column]
    if "einsum(" in text:
        rule = "give the equation alone, without the call around it"
    elif char == ".":
        rule = "an ellipsis is three dots in a row: '...'"
    elif char in _MEANT:
        rule = _MEANT[char]
    elif char == "1" and text[column - 1 : column + 2].strip() == "1":
        rule = (
            "an axis is a name such as `b` or `d_in`; one of size 1 needs a name, too, or is squeezed first"
        )
    elif rule.startswith("a label") and (char.isdigit() or char == "_"):
        rule += "; names such as `d_in` are einops notation, where the pattern comes last"
    return EquationError(f"{char!r} has no meaning here", where=pointed(text, column), hint=rule)


_MEANT = {
    **dict.fromkeys("->", "there is one '->', between the operands and the output"),
    **dict.fromkeys(
        "()", "einsum has no axes in parentheses: reshape (or einops.rearrange) the operand first"
    ),
    **dict.fromkeys("→⇒=", "the result's labels follow '->'"),
    **dict.fromkeys(";|*@", "the operands' labels are separated by ','"),
    **dict.fromkeys("'\"`", "give the equation alone, without quotes"),
    "…": "an ellipsis is three dots in a row: '...'",
}
"""What a sign that has no place in an equation is likely to be meant for."""
