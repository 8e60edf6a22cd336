"""What a traced node reads, and the shape of what it gives, for those who follow the axes of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moe_export.export.sizes import Size, fixed


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments. An operator has those of its schema, which type checkers do not know."""
    return node.args


def shape_of(node: object) -> tuple[Size, ...]:
    """The shape of a node's value; empty where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def rank_of(node: fx.Node) -> int:
    return len(shape_of(node))


def rest_of(node: fx.Node, lead: int) -> list[int] | None:
    """The sizes behind the leading axes; None where one is not a plain number."""
    numbers = [fixed(size) for size in shape_of(node)[lead:]]
    return [number for number in numbers if number is not None] if None not in numbers else None
