"""Nested values as flat named ones."""

from __future__ import annotations

import collections

import torch

from moe_export.export.frontend.pytree import identifier, leaves, unique


def names(value, name=""):
    return [leaf.name for leaf in leaves(value, name)]


def test_paths():
    value = {"a": [1, (2, None)], "b": collections.OrderedDict(c=torch.ones(1))}
    assert names(value) == ["a.0", "a.1.0", "b.c"]
    assert names(value, "out") == ["out.a.0", "out.a.1.0", "out.b.c"]


def test_tensors_are_leaves_and_constants_too():
    found = list(leaves([torch.ones(2), "text"]))
    assert [leaf.is_tensor for leaf in found] == [True, False]
    assert names(None) == []
    assert names({}) == []


def test_identifiers():
    assert [identifier(text) for text in ("a.b[0]", "x", "--", "größe")] == ["a_b_0", "x", "value", "größe"]


def test_unique():
    assert unique(["a", "a", "a_1", "b"], {"b"}) == ["a", "a_1", "a_1_1", "b_1"]
