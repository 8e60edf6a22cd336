"""Sizes are the same if that is proved, however they are written, and never because the example's happened to be."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.export import Dim

from moe_export.export.sizes import expression_of, fixed, same_dim, same_shape, same_size

ROOT = Path(__file__).resolve().parents[3]


class Sum(nn.Module):
    def forward(self, a, b, c):
        return a.sum() + b.sum() + c.sum()


def traced(*dims: object) -> list[torch.SymInt]:
    """The sizes of three inputs; in the example all are 8."""
    shapes = tuple({0: dim} for dim in dims)
    program = torch.export.export(Sum(), tuple(torch.ones(8) for _ in dims), dynamic_shapes=shapes)
    return [node.meta["val"].shape[0] for node in program.graph.nodes if node.op == "placeholder"]


@pytest.fixture(scope="module")
def symbols():
    return traced(Dim("a", min=2, max=64), Dim("b"), 4 * Dim("quarter"))


def test_sizes_are_the_same_however_they_are_written(symbols):
    a, b, c = symbols
    for left, right in (
        (a, a),
        (2 * a, a * 2),
        (a + b, b + a),
        (a * b * 2, 2 * b * a),
        (a * (b + 1), a * b + a),
        (a + a, 2 * a),
        (2 * a // 2, a),
        (a - a + 3, 3),
        (c // 4 * 4, c),  # which 4 divides
        (3, 3),
    ):
        assert same_size(left, right), (left, right)
        assert same_size(right, left), (left, right)


def test_sizes_that_were_equal_in_the_example_alone_are_not_the_same(symbols):
    a, b, c = symbols
    for left, right in (
        (a, b),
        (a, c),
        (a, 8),  # which it was in the example
        (a * a, 64),
        (a * a, a * b),
        (a + 8, 2 * a),
        (a // 2 * 2, a),  # which 2 need not divide
        (a % 2, 0),
        (a, a + 1),
        (3, 4),
        (a, 1),  # below its minimum
        (a, None),
        (None, None),
        (True, 1),
        ("8", 8),
    ):
        assert not same_size(left, right), (left, right)
        assert not same_size(right, left), (left, right)


def test_comparing_adds_no_condition(symbols):
    a, b, _ = symbols
    env = a.node.shape_env
    before = len(env.guards)
    assert not same_size(a, b)
    assert not same_size(a * b, 64)
    assert len(env.guards) == before
    assert fixed(a) is None


def test_a_symbol_that_can_be_one_number_is_that_number():
    (three, free, _) = traced(Dim("three", min=2, max=64), Dim("free"), Dim("c"))
    env = three.node.shape_env
    env.constrain_symbol_range(three.node.expr, 8, 8)
    assert fixed(three) == 8
    assert same_size(three, 8)
    assert same_size(three + free, free + 8)
    assert not same_size(three, 7)
    assert not same_size(three, free)


def test_of_two_traces_only_what_is_written_the_same_is_compared(symbols):
    other, *_ = traced(Dim("a", min=2, max=64), Dim("b"), Dim("c"))
    first, *_ = symbols
    assert expression_of(first) == expression_of(other)
    assert same_size(first, other)
    assert not same_size(first + 1, other)


def test_what_is_fixed(symbols):
    a, *_ = symbols
    assert [fixed(size) for size in (5, 0, a - a + 2, a, a * 2, "5", None, True)] == [
        5,
        0,
        2,
        None,
        None,
        None,
        None,
        None,
    ]


def test_expressions_are_keys(symbols):
    a, b, _ = symbols
    table = {expression_of(a * b): "product", expression_of(a - a + 4): "four"}
    assert table[expression_of(b * a)] == "product"
    assert table[expression_of(4)] == "four"
    assert expression_of(a) not in table


def test_shapes(symbols):
    a, b, _ = symbols
    assert same_shape((a, 2 * b, 3), (a, b * 2, 3))
    assert not same_shape((a, b), (b, a))
    assert not same_shape((a, b), (a, b, 1))
    assert same_shape((), ())


def dim(text: str | int | None) -> int | ir.SymbolicDim:
    return text if isinstance(text, int) else ir.SymbolicDim(text)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (3, 3),
        ("sequence", "sequence"),
        ("2*sequence", "sequence*2"),
        ("batch + sequence", "sequence + batch"),
        ("(sequence - 1)*2 + 2", "2*sequence"),
        ("batch size", "batch size"),  # no expression, but the same name
        ("sequence - sequence + 3", 3),
    ],
)
def test_dimensions_are_the_same_however_they_are_written(left, right):
    assert same_dim(dim(left), dim(right))
    assert same_dim(dim(right), dim(left))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (3, 4),
        ("sequence", 3),
        ("sequence", "batch"),
        ("N", "E"),  # names, no constants
        ("sequence//2*2", "sequence"),
        ("batch size", "batch sizes"),
        (None, None),  # nobody knows either
        (None, "sequence"),
        (None, 3),
    ],
)
def test_other_dimensions_are_not(left, right):
    assert not same_dim(dim(left), dim(right))
    assert not same_dim(dim(right), dim(left))
