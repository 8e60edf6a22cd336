"""FLOPs of an `Einsum` node, as ONNX Runtime runs it: operands from left to right, two at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Shape = Sequence[int]


def einsum_flops(equation: str, shapes: Sequence[Shape]) -> int:
    """FLOPs of one run: a multiplication for each product, and an addition where a label is summed in that step.

    A label is summed as soon as neither the output nor a later operand has it. Summing a single operand counts one
    FLOP for each element.

    Args:
        equation: As the node has it: `bij,bjk->bik`, with or without an ellipsis and an output.
        shapes: Of the operands.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_labels(term, shape) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))  # a size of 1 is repeated
    every = [label for term in terms for label in term]
    kept = {label for label in every if label.startswith(".")}
    kept |= set(right) if arrow else {label for label in every if every.count(label) == 1}
    held, flops = set(terms[0]), 0
    for number, term in enumerate(terms):
        both = held | set(term)
        later = {label for other in terms[number + 1 :] for label in other}
        rest = both & (kept | later)
        work = prod(sizes[label] for label in both)
        flops += (work if number else 0) + (work if both != rest else 0)
        held = rest
    return flops


def _labels(term: str, shape: Shape) -> list[str]:
    """A label for each axis; those of an ellipsis count from the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    count = len(shape) - len(before) - len(after)
    return [*before, *(f".{place}" for place in range(count, 0, -1)), *after]
