"""Prove the lines that replace a call: run them on small integers of several sizes against an independent loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_export.einsum_rewrite.codemod_call import UnknownError
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.notation import ELLIPSIS
from moe_export.einsum_rewrite.tensor_methods import IntTensor

SIZES = ((2, 3, 5, 7), (3, 2, 4, 2), (1, 2, 1, 3), (0, 2, 3, 2))
"""Sizes that labels take in turn: distinct primes, repeated ones, size 1, size 0."""

MOST = 200_000  # products; an equation with many labels is proved at smaller sizes
RANKS = (0, 1, 2)


def prove_lines(equation: Equation, names: Sequence[str], code: str) -> None:
    """Run lines and compare with the definition of the equation, exactly.

    Args:
        equation: What the lines should compute.
        names: The operands' names in the lines.
        code: Lines; the last one is an expression.

    Raises:
        UnknownError: The lines fail or give something else for some sizes, or some numbers of dimensions that
            its ellipses may stand for.
    """
    *before, last = code.split("\n")
    program = compile("\n".join([*before, f"result = {last}"]), "<lines>", "exec")
    generator = np.random.default_rng(0)
    for terms, output, sizes in _cases(equation):
        arrays = [generator.integers(-4, 5, shape) for shape in sizes]
        expected = np.einsum(_spelled(terms, output), *arrays, optimize=False)
        scope: dict[str, Any] = {name: IntTensor(array) for name, array in zip(names, arrays, strict=True)}
        try:
            exec(program, scope)
        except Exception as error:
            raise UnknownError(_doubt(equation, arrays, f"{type(error).__name__}")) from error
        got = scope["result"].array
        if got.shape != expected.shape or not (got == expected).all():
            raise UnknownError(_doubt(equation, arrays, "another result"))


def _doubt(equation: Equation, arrays: Sequence[np.ndarray], what: str) -> str:
    shapes = ", ".join(str(array.shape) for array in arrays)
    return f"the lines for {equation.text!r} give {what} on operands of the shapes {shapes}"


Shape = tuple[int, ...]
Terms = list[tuple[str, ...]]


def _cases(equation: Equation) -> Iterator[tuple[Terms, tuple[str, ...], list[Shape]]]:
    """Every operand's labels with its ellipsis spelled out, the result's, and the operands' shapes."""
    dotted = [index for index, term in enumerate(equation.inputs) if ELLIPSIS in term]
    for ranks in itertools.product(RANKS, repeat=len(dotted)):
        widest = max(ranks, default=0)
        rank_of = dict(zip(dotted, ranks, strict=True))
        terms = [_spread(term, rank_of.get(index, 0), widest) for index, term in enumerate(equation.inputs)]
        output = _spread(equation.output, widest, widest)
        labels = list(dict.fromkeys(label for term in terms for label in term))
        for sizes in SIZES:
            chosen = {label: sizes[index % len(sizes)] for index, label in enumerate(labels)}
            if np.prod([float(size) for size in chosen.values()]) > MOST:
                chosen = {label: 1 + index % 2 for index, label in enumerate(labels)}
            yield terms, output, [tuple(chosen[label] for label in term) for term in terms]
        if len(dotted) > 1 and widest:
            chosen = {label: 2 + index % 2 for index, label in enumerate(labels)}
            for thin in dotted:
                yield terms, output, [_shape(term, chosen, index == thin) for index, term in enumerate(terms)]


def _shape(term: tuple[str, ...], sizes: Mapping[str, int], thin: bool) -> Shape:
    """A shape; `thin` makes the dimensions of the ellipsis 1, to be broadcast against another operand's."""
    return tuple(1 if thin and label.startswith(ELLIPSIS) else sizes[label] for label in term)


def _spread(term: tuple[str, ...], rank: int, widest: int) -> tuple[str, ...]:
    """`(..., i)` → `(...1, ...2, i)`: an ellipsis of fewer dimensions has the last of them."""
    dots = tuple(f"{ELLIPSIS}{index}" for index in range(widest - rank, widest))
    return tuple(part for label in term for part in (dots if label == ELLIPSIS else (label,)))


def _spelled(terms: Sequence[Sequence[str]], output: Sequence[str]) -> str:
    """The equation in NumPy's letters."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    labels = dict.fromkeys(label for term in terms for label in term)
    names = dict(zip(labels, letters, strict=False))
    inputs = ",".join("".join(names[label] for label in term) for term in terms)
    return f"{inputs}->{''.join(names[label] for label in output)}"
