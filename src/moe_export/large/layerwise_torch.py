"""Run a model as its author wrote it, with the weights of one block at a time, and record each block's values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.pytree import leaves
from moe_export.export.frontend.subject import Subject
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.weights.lazy import LazyWeights, filled
from moe_export.large.layerwise_products import WideProducts
from moe_export.verify import Array, Choice
from moe_export.verify.inputs.torch_tables import IndexWatcher, integers_of
from moe_export.verify.runners.torch_modes import ChoiceWatcher
from moe_export.verify.runners.torch_runner import to_numpy, to_torch

_REPEATED = (nn.ModuleList, nn.Sequential)


@dataclass
class Seen:
    """The inputs, outputs and choices of experts of a block's last call, and the number of its calls."""

    took: list[Array] = field(default_factory=list)
    gave: list[Array] = field(default_factory=list)
    chose: tuple[Choice, ...] = ()
    calls: int = 0


@dataclass
class Ran:
    """The record of one run of a model.

    Attributes:
        blocks: The blocks by path, in the order in which they were called.
        outputs: The model's outputs by name.
        chose: All choices of experts, in or out of blocks, in the order of the run.
        tables: Of inputs that are ids: the least and the greatest that every table has a row for.
    """

    blocks: dict[str, Seen]
    outputs: dict[str, Array]
    chose: tuple[Choice, ...]
    tables: dict[str, tuple[int, int]]


def find_blocks(module: nn.Module) -> list[str]:
    """The paths of a model's layers: the members of its outermost lists of two or more modules of one class."""
    found: list[str] = []
    for path, child in module.named_modules():
        if any(path == outer or path.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(child, _REPEATED) and len(child) > 1 and len({type(one) for one in child}) == 1:
            found += [f"{path}.{name}" if path else name for name, _ in child.named_children()]
    return found


def called_once(subject: Subject, blocks: list[str]) -> list[str]:
    """The blocks of those lists whose members are all called exactly once, in the order of the calls.

    Args:
        subject: The model; its weights need not be in memory.
        blocks: Paths of blocks.
    """
    ran = _run(subject, subject.inputs, blocks, None)
    lists: dict[str, list[str]] = {}
    for block in blocks:
        lists.setdefault(re.sub(r"\.?[^.]+$", "", block), []).append(block)
    good = {
        block
        for members in lists.values()
        if all(member in ran.blocks and ran.blocks[member].calls == 1 for member in members)
        for block in members
    }
    return [block for block in ran.blocks if block in good]


def run_blocks(subject: Subject, inputs: Mapping[str, Array], blocks: list[str], memory: int) -> Ran:
    """Run a model on one case.

    Args:
        subject: The model; its weights may be in files.
        inputs: The inputs by name.
        blocks: Paths of blocks, each of which is called once.
        memory: The most bytes of weights of one block, and of the model outside its blocks.

    Raises:
        UsageError: A block, or the rest of the model, has more.
    """
    weights = subject.weights
    with _outside(weights, blocks, memory):
        return _run(subject, {name: to_torch(array) for name, array in inputs.items()}, blocks, weights)


@contextmanager
def _outside(weights: LazyWeights | None, blocks: list[str], memory: int) -> Iterator[None]:
    """Keep the weights that belong to no block in memory while the model runs."""
    if weights is None:
        yield
        return
    inside = {id(item) for block in blocks for item in weights.under(block)}
    items = [item for item in weights.items.values() if id(item) not in inside and not item.full]
    sizes = {block: sum(item.recipe.nbytes for item in weights.under(block)) for block in blocks}
    sizes["outside its blocks"] = sum(item.recipe.nbytes for item in items)
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > memory:
        raise UsageError(
            f"{sizes[largest] / 2**30:.1f} GiB of weights are {'in ' * (largest in blocks)}{largest}, more than "
            "fits in memory, so the graph cannot be verified block by block",
            hint="--no-verify writes it unverified",
        )
    with filled(item.tensor for item in items):
        yield


def _run(
    subject: Subject, inputs: Mapping[str, torch.Tensor], blocks: list[str], weights: LazyWeights | None
) -> Ran:
    seen: dict[str, Seen] = {}
    given = {name: inputs[name].clone() for name in subject.inputs}
    with ExitStack() as stack:
        watcher = stack.enter_context(ChoiceWatcher())
        indices = stack.enter_context(IndexWatcher(integers_of(given)))
        for path in blocks:
            for handle in _hooks(subject.module.get_submodule(path), path, seen, watcher, weights):
                stack.callback(handle.remove)
        stack.enter_context(WideProducts())
        with torch.no_grad():
            found = subject.call(list(given.values()))
    outputs = {name: to_numpy(out) for name, out in zip(subject.outputs, found, strict=True)}
    return Ran(seen, outputs, _choices(watcher, 0), indices.tables)


def _choices(watcher: ChoiceWatcher, first: int) -> tuple[Choice, ...]:
    """What was chosen, from the choice with this number on."""
    return tuple(Choice(to_numpy(ids), to_numpy(scores)) for ids, scores in watcher.found[first:])


def _hooks(
    module: nn.Module, path: str, seen: dict[str, Seen], watcher: ChoiceWatcher, weights: LazyWeights | None
) -> list[Any]:
    items = [item for item in weights.under(path) if not item.full] if weights is not None else []
    before = 0

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal before
        note = seen.setdefault(path, Seen())
        note.took = [to_numpy(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if _is_dense(leaf)]
        before = len(watcher.found)
        for item in items:
            item.fill()

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note = seen[path]
        note.calls += 1
        note.gave = [to_numpy(leaf.value) for leaf in leaves(output) if _is_dense(leaf.value)]
        note.chose = _choices(watcher, before)
        for item in items:
            item.free()

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_complex()
