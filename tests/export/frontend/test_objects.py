"""Objects of a user's own classes: taken apart, and made again of other tensors."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.export.frontend.objects import (
    close_objects,
    numbers_in,
    open_objects,
    rebuilt,
    tensors_in,
)

Pair = namedtuple("Pair", "key value")


class Slotted:
    __slots__ = ("state",)

    def __init__(self, state: Tensor) -> None:
        self.state = state


@dataclass(frozen=True)
class Frozen:
    window: Tensor


class Cache:
    """One of each kind of thing that holds tensors, and what holds none."""

    def __init__(self) -> None:
        zeros = torch.zeros(2)
        self.layers: list[Any] = [
            Pair(zeros, zeros),
            {"slot": Slotted(torch.ones(1)), "frozen": Frozen(torch.ones(3))},
        ]
        self.seen, self.flag, self.text, self.sizes = 7, True, "keys", [1, 2]
        self.model = nn.Linear(2, 2)
        self.again = self.layers  # the same list once more
        self.myself = self


def test_tensors_have_paths():
    assert list(tensors_in(Cache())) == [
        "layers.0.key",
        "layers.0.value",
        "layers.1.slot.state",
        "layers.1.frozen.window",
    ]
    assert numbers_in(Cache()) == {"seen": 7}


def test_one_tensor_in_two_places_becomes_two():
    made = rebuilt(Cache(), lambda path, each: path if isinstance(each, Tensor) else each + 1)
    assert made.layers[0] == ("layers.0.key", "layers.0.value")
    assert made.layers[1]["slot"].state == "layers.1.slot.state"
    assert (made.seen, made.flag, made.text) == (8, True, "keys")


def test_what_was_the_same_object_is_again():
    old = Cache()
    made = rebuilt(old, lambda _, each: each)
    assert made.again is made.layers
    assert made.layers is not old.layers
    assert made.layers[1]["slot"] is not old.layers[1]["slot"]
    assert made.myself is made
    assert made.model is old.model
    made.sizes.append(3)
    assert old.sizes == [1, 2]


def test_only_objects_with_tensors_are_opened():
    given = (
        (torch.ones(2), SimpleNamespace(x=torch.ones(1)), SimpleNamespace(x=1)),
        {"linear": nn.Linear(1, 1)},
    )
    opened = open_objects(given)
    assert [type(each).__name__ for each in opened[0]] == ["Tensor", "_Opened", "SimpleNamespace"]
    assert opened[1]["linear"] is given[1]["linear"]
    assert isinstance(close_objects(opened)[0][1].x, Tensor)
