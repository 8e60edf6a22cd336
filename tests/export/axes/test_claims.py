"""No claim of the analysis is false: entries reordered in what a program is given are reordered in what it computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from random_programs import Program, random_program
from torch import Tensor, fx

from moe_export.export.axes.analysis import meanings_of
from moe_export.export.axes.chosen import experts_of, name_once
from moe_export.export.axes.extents import Axis, Extent, size_of
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.one_hot import OneHotMask, one_hot_mask_of
from moe_export.export.axes.rules import RULES
from moe_export.export.axes.support import is_never_negative, support_of

QUICK, MANY = 300, 5_000
UNTESTED = {
    torch.ops.onnx_symbolic._symbolic.default,
    torch.ops.onnx_symbolic._symbolic_multi_out.default,
    torch.ops.aten.scatter_.src,
    torch.ops.aten.scatter_.value,
    torch.ops.aten.scatter_add_.default,
    torch.ops.aten.empty_like.default,
}
"""Operators with a rule that are in no program: ends of loops are opaque, some write in place, `empty` is anything."""


def run(program: Program, given: dict[fx.Node, Tensor]) -> dict[fx.Node, Any]:
    """The values of a program on other inputs."""
    values: dict[fx.Node, Any] = dict(given)
    for node in program.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.get)
            values[node] = node.target(*args, **kwargs)
    return values


def reordered(known: Meanings, value: Tensor, meaning: Meaning, extent: Extent, order: Tensor) -> Tensor:
    """What a value is to be once the entries of an extent stand in another order: entry `order[i]` is now entry i."""
    axes = [known.extents.of(axis) for axis in meaning.axes]
    flat = value.reshape([size for axis in axes for size in ([each.size for each in axis] or [1])])
    place = 0
    for axis in axes:
        for each in axis or (None,):
            if each is extent:
                flat = flat.index_select(place, order)
            place += 1
    value = flat.reshape(value.shape)
    if meaning.numbers is not None:
        value = renamed(value, known.extents.of(meaning.numbers), extent, order)
    if meaning.columns:
        columns = [known.extents.of(column) for column in meaning.columns]
        value = torch.stack(
            [renamed(value[..., at], axis, extent, order) for at, axis in enumerate(columns)], -1
        )
    return value


def renamed(numbers: Tensor, axis: Axis, extent: Extent, order: Tensor) -> Tensor:
    """Numbers along an axis, once the entries of one of its extents stand in another order."""
    grid = torch.arange(size_of(axis)).reshape([each.size for each in axis])
    for place, each in enumerate(axis):
        if each is extent:
            grid = grid.index_select(place, order.argsort())
    found = torch.where(numbers >= 0, grid.reshape(-1)[numbers.clamp(min=0).long()], numbers.long())
    return found.to(numbers.dtype)


def claims_of(seed: int) -> int:
    """Check all claims about a random program; how many extents were reordered."""
    program = random_program(seed)
    known = meanings_of(program.graph)
    inputs = {node: value for node, value in program.values.items() if node.op == "placeholder"}
    free: dict[Extent, None] = {}
    for node, found in known.found.items():
        value = program.values[node]
        for part, meaning in zip(value if isinstance(value, (list, tuple)) else [value], found, strict=True):
            where = f"program {seed}, {node.format_node()}"
            assert [size_of(known.extents.of(axis)) for axis in meaning.axes] == list(part.shape), where
            if meaning.numbers is not None:
                assert int(part.max()) < size_of(known.extents.of(meaning.numbers)), where
                assert meaning.partly or int(part.min()) >= 0, where
            for axis in (*meaning.axes, *([meaning.numbers] if meaning.numbers else []), *meaning.columns):
                free.update(dict.fromkeys(each for each in known.extents.of(axis) if each.order is None))
    for extent in free:
        order = torch.randperm(extent.size, generator=torch.Generator().manual_seed(seed + extent.size))
        given = {
            node: reordered(known, value, known.found[node][0], extent, order)
            for node, value in inputs.items()
        }
        after = run(program, given)
        for node, found in known.found.items():
            one, other = (values[node] for values in (program.values, after))
            pairs = zip(one, other, strict=True) if isinstance(one, (list, tuple)) else [(one, other)]
            for meaning, (before, now) in zip(found, pairs, strict=True):
                expected = reordered(known, before, meaning, extent, order)
                same = expected.shape == now.shape and torch.allclose(
                    expected.double(), now.double(), 1e-6, 1e-9
                )
                assert same, f"program {seed}: {extent} in\n{program.graph}\nat {node.format_node()}"
    return len(free)


def facts_of(seed: int) -> Counter[str]:
    """Check what is read of single values of a random program; how often each was."""
    program, seen = random_program(seed), Counter[str]()
    for node, value in program.values.items():
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        where = f"program {seed}, {node} in\n{program.graph}"
        mask, chosen = one_hot_mask_of(node), support_of(node)
        if mask is not None and mask.exact and program.values[mask.indices].dim() < 3:
            seen["one-hot"] += 1
            expected = marked(mask, program.values[mask.indices], value)
            assert torch.equal(expected, value.bool().reshape(expected.shape)), where
        if chosen is not None:
            seen["support"] += 1
            indices = program.values[chosen]
            indices = indices if indices.dim() == 2 else indices[:, None]
            named = (indices[..., None] == torch.arange(value.shape[1])).any(1)
            assert not value[~named].any(), where
        if is_never_negative(node):
            seen["sign"] += 1
            assert not (value < 0).any(), where
        if value.dtype is torch.int64 and value.dim() == 2 and name_once(node):
            seen["distinct"] += 1
            assert (value.sort(1).values.diff(dim=1) != 0).all(), where
        experts = experts_of(node) if value.dtype is torch.int64 and value.dim() else None
        if experts is not None:
            seen["range"] += 1
            assert 0 <= int(value.min()) <= int(value.max()) < experts, where
    return seen


def marked(mask: OneHotMask, indices: Tensor, value: Tensor) -> Tensor:
    """The values of a mask by its claim alone: for each entry, the tokens, slots and experts that it runs over."""
    grid = indices if indices.dim() == 2 else indices[:, None]
    experts = value.shape[mask.axes.index("expert")] if "expert" in mask.axes else 0
    pairs = grid[..., None] == (torch.arange(experts) if mask.expert is None else torch.tensor([mask.expert]))
    axes = [axis for axis in ("token", "slot", "expert") if axis in mask.axes]
    for place, axis in reversed(list(enumerate(("token", "slot", "expert")))):
        if axis not in mask.axes:
            pairs = pairs.any(place)
    return pairs.permute([axes.index(axis) for axis in mask.axes if axis != "one"])


def test_claims_about_random_programs_are_true():
    """Most programs have claims: an analysis that claims nothing would pass otherwise."""
    assert sum(map(claims_of, range(QUICK))) > 3 * QUICK


def test_facts_of_random_programs_are_true():
    seen = sum(map(facts_of, range(QUICK)), Counter())
    assert min(seen[fact] for fact in ("one-hot", "support", "sign", "distinct", "range")) > 5, seen


@pytest.mark.slow
def test_claims_about_many_random_programs_are_true():
    seeds = range(QUICK, QUICK + MANY)
    ran = {node.target for seed in seeds for node in random_program(seed).graph.nodes}
    assert set(RULES) - ran == UNTESTED
    assert sum(map(claims_of, seeds)) > 3 * MANY
    assert sum(map(facts_of, seeds), Counter())["support"] > 0
