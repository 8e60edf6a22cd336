"""What is known of the two sides before anything is compared: it fixes the plan, together with the seed."""

from __future__ import annotations

from dataclasses import dataclass

from moe_export.verify.price import Price


@dataclass(frozen=True)
class Known:
    """What decides which cases there are, besides inputs, dimensions and example.

    Attributes:
        price: What a case of given sizes costs; a guess by its elements if None.
    """

    price: Price | None = None


NOTHING = Known()
