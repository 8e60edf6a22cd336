"""A folded loop between its opaque nodes: states, the elements of each step, and what is collected over all steps.

The body stands between them as the operators of one step, so that its values have meanings like any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from moe_export.export.axes.extents import Axis
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.shapes import arguments
from moe_export.export.torch_compat.opaque import opaque_attributes, opaque_operator

TIME = "time step"


def loop_part(known: Meanings, node: fx.Node) -> Meaning | tuple[Meaning, ...] | None:
    """The meaning of a node at the boundary of a loop; None for any other opaque node."""
    operator = opaque_operator(node)
    given: Sequence[fx.Node] = arguments(node)[0]
    found = [known.of(each) for each in given]
    if operator is None or not found or None in found:
        return None
    meanings = [each for each in found if each is not None]
    for each in given:
        known.computed_with(each, node)
    if operator[1] == "State":
        return Meaning(meanings[0].axes)
    if operator[1] == "Element":
        return _element(known, node, meanings[0])
    return _end(known, node, given, meanings) if operator[1] == "End" else None


def _element(known: Meanings, node: fx.Node, sequence: Meaning) -> Meaning:
    """One step of a sequence."""
    place = opaque_attributes(node)["axis"]
    known.extents.call(sequence.axes[place], TIME)
    known.extents.mark([sequence.axes[place]], node)
    return Meaning(sequence.axes[:place] + sequence.axes[place + 1 :])


def _end(
    known: Meanings, node: fx.Node, given: Sequence[fx.Node], found: Sequence[Meaning]
) -> tuple[Meaning, ...] | None:
    """The last states, and what each step gives, along an axis of steps."""
    said: dict[str, Any] = opaque_attributes(node)
    count, elements = said["states"], said["elements"]
    states, following = found[:count], found[count + elements : 2 * count + elements]
    for before, after in zip(states, following, strict=True):
        for one, other in zip(before.axes, after.axes, strict=True):
            known.extents.match(one, other, node)
    steps: Axis = ()
    if elements:
        first = given[count]
        sequence = known.of(arguments(first)[0][0])
        steps = sequence.axes[opaque_attributes(first)["axis"]] if sequence is not None else ()
    collected = []
    for each, place in zip(found[2 * count + elements :], said.get("axes", ()), strict=False):
        collected.append(Meaning((*each.axes[:place], steps, *each.axes[place:])))
    return (*(Meaning(each.axes) for each in states), *collected)
