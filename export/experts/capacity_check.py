"""Whether the extracted computation of one expert is what the code does for each of them.

Both are run on random rows and with random weights, expert by expert and with another number of slots, in float64
whatever the model's type: in float16 a difference of one in twenty would pass for rounding. If they agree, the code
does not mix experts, and the axes of each weight are what they were taken for. That rows do not mix is checked for
every block, however it was written (`experts.mixing.check_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from moe_export.errors import RefusedError
from moe_export.export.axes.shapes import shape_of
from moe_export.export.experts.canonical import Walk
from moe_export.export.experts.capacity_experts import (
    Core,
    sizes_of,
    walk_between,
    write_core,
)
from moe_export.export.experts.capacity_views import Labels, View
from moe_export.export.experts.notes import named
from moe_export.export.gates.region import descendants, is_size
from moe_export.export.sizes import expression_of, fixed
from moe_export.float64 import agree, doubled, in_float64

_ROWS = 3
"""How many slots the code is run with if their number is free; other free axes get one more, so that they differ."""
_EXACT = 1e-9  # of the largest value: float64 rounds at 1e-16, and a real difference is far larger


def check_core(core: Core, slots: View, outputs: View, labels: Labels) -> None:
    """Run the code and the computation of one expert on random rows, and compare them.

    Args:
        core: What one expert computes.
        slots: (e, g, c, m), in any order: the rows that the experts are given.
        outputs: (e, g, c, h), in any order: what the code computes from them.
        labels: The labels of the block.

    Raises:
        RefusedError: They differ, or the code cannot be run on such rows.
    """
    generator = torch.Generator().manual_seed(0)
    trial = {
        label: number if (number := fixed(size)) is not None else _ROWS + (label != "c")
        for label, size in labels.sizes.items()
    }

    def random(sizes: Sequence[Any], like: fx.Node) -> torch.Tensor:
        numbers = [number for size in sizes if (number := fixed(size)) is not None]
        if len(numbers) < len(sizes):
            raise RefusedError(f"the experts read {like.name}, whose size is free")
        value = torch.randn(numbers, generator=generator)
        return value.to(like.meta["val"].dtype)

    sizes = [_product(trial[label] for label in axis) for axis in slots.axes]
    whole = walk_between(outputs.node, {slots.node}, descendants([slots.node]), lambda node: False)
    leaves = {leaf: random(shape_of(leaf), leaf) for leaf in whole.leaves}
    given = random(sizes, slots.node)

    def alike(wide: bool) -> bool:
        here = {node: doubled(value) if wide else value for node, value in leaves.items()}
        start = doubled(given) if wide else given
        expected = _run(whole, {**here, slots.node: start}, outputs.node, labels, trial)
        rows, wanted = (
            _by_expert(value, view, last, labels, trial)
            for value, view, last in ((start, slots, "m"), (expected, outputs, "h"))
        )
        module, inputs = _alone(core, labels)
        found = [
            module(rows[number], *(_value(node, core, number, here, whole) for node in inputs))
            for number in range(trial["e"])
        ]
        rounded = 1e-3 if expected.dtype == torch.float32 else 5e-2  # half precision has two to three digits
        return agree(list(wanted), found, _EXACT if wide else rounded)

    with torch.no_grad():
        try:
            with in_float64():
                same = alike(True)
        except Exception:  # an operator does not support float64
            same = _as_it_is(alike)
    if not same:
        raise RefusedError("the experts mix their rows, or differ in more than their weights")


def _as_it_is(alike: Callable[[bool], bool]) -> bool:
    try:
        return alike(False)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        why = str(error).strip().split("\n", 1)[0]
        raise RefusedError(f"the experts cannot be run on other rows: {why}") from error


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _run(
    walk: Walk, values: dict[fx.Node, Any], result: fx.Node, labels: Labels, trial: Mapping[str, int]
) -> torch.Tensor:
    free = {key: _product(trial[label] for label in mine) for key, mine in sizes_of(labels).items()}

    def known(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        if is_size(node) and (size := expression_of(node.meta["val"])) in free:
            return free[size]
        raise RefusedError(f"the experts use a size of a value outside them, {named(node)}")

    for node in walk.nodes:
        values[node] = node.target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))  # type: ignore[operator]
    found: torch.Tensor = values[result]
    return found


def _by_expert(
    value: torch.Tensor, view: View, last: str, labels: Labels, trial: Mapping[str, int]
) -> torch.Tensor:
    """A value as (E, R, `last`), its rows in the order of groups and slots."""
    flat = [label for axis in view.axes for label in axis]
    value = value.reshape([trial[label] for label in flat])
    groups = sorted(label for label in flat if label.startswith("g"))
    value = value.permute([flat.index(label) for label in ("e", *groups, "c", last)])
    return value.reshape(trial["e"], -1, value.shape[-1])


def _alone(core: Core, labels: Labels) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The computation of one expert, `(rows, *shared, *weights) → rows`, and the nodes of its inputs after `rows`."""
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    inputs = [*core.shared, *core.weights]
    known = {node: graph.placeholder(f"input_{place}") for place, node in enumerate(inputs)}
    graph.output(write_core(graph, core, rows, known, labels))
    return fx.GraphModule(nn.Module(), graph), inputs


def _value(
    node: fx.Node, core: Core, number: int, leaves: Mapping[fx.Node, torch.Tensor], whole: Walk
) -> torch.Tensor:
    weight = core.weights.get(node)
    if weight is None:
        return leaves[node]
    if weight.separate:
        return leaves[weight.separate[number]]
    assert weight.stack is not None
    return leaves[weight.stack][number]
