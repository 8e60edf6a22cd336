"""What is known about the two artifacts before they are compared; with the seed, it determines the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moe_export.verify.inputs.meaning import Meaning
from moe_export.verify.inputs.price import Price
from moe_export.verify.specs import Array


@dataclass(frozen=True)
class Known:
    """What determines the cases, besides inputs, dimensions and example.

    Attributes:
        price: What a case of given sizes costs; a guess by its elements if None.
        meanings: What inputs of integers are drawn from, by name; the example's own values where nothing is known.
        numbers: Integers in the model's code and in the graph, near which either may do something else; None
            where nothing is known of either.
        holds: Whether the graph is said to be right at some sizes; None if nothing is said.
        unfilled: Inputs of floats whose example is no measurement, but zeros or ones in the place of one.
        limits: The least and greatest values of inputs, each an array of the input's shape: those that decide the
            shapes of an engine, which takes no others.
    """

    price: Price | None = None
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    unfilled: frozenset[str] = frozenset()
    numbers: tuple[int, ...] | None = None
    holds: Callable[[Mapping[str, int]], bool] | None = None
    limits: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)


NOTHING = Known()
