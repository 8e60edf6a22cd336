"""What each line of the user's model computes: the axes of its values, and what their numbers count.

model.py:81  weights, chosen = torch.topk(scores, 2)
    (token, slot)
    (token, slot): numbers of experts
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from moe_export.export.axes.chosen import choices_of, name_once
from moe_export.export.axes.extents import Axis, Extent
from moe_export.export.axes.meaning import Meaning, Meanings
from moe_export.export.axes.one_hot import OneHotMask, one_hot_mask_of
from moe_export.export.axes.shapes import rank_of, shape_of
from moe_export.export.axes.support import support_of
from moe_export.export.frontend.source import line_of
from moe_export.export.sizes import expression_of

_SYMBOL = re.compile(r"\b[su]\d+\b")
_PLURALS = {"batch": "batches", "pair in an order": "pairs in an order"}


@dataclass
class Line:
    """One line of the model.

    Attributes:
        place: `file:line`.
        text: What stands there.
        values: What is known of each value that the line gives to others, or to whoever called the model.
        lost: Names of operators on it without a rule, of whose results nothing is known.
    """

    place: str
    text: str
    values: dict[str, None] = field(default_factory=dict)
    lost: dict[str, None] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.place}  {self.text}", *(f"    {value}" for value in self.values)]
        lines += [f"    no rule for {name}: nothing is known of what its axes run over" for name in self.lost]
        return "\n".join(lines)


def lines_of(graph: fx.Graph, known: Meanings, names: Mapping[str, str] | None = None) -> tuple[Line, ...]:
    """Each line of the model, in the order in which the program first comes to it.

    Args:
        graph: The traced program.
        known: What its values mean.
        names: The names of free sizes, by their symbols in the trace.
    """
    lines: dict[str, Line] = {}
    for node in graph.nodes:
        place = line_of(node.meta.get("stack_trace")) if node.op == "call_function" else None
        if place is None or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            continue
        line = lines.get(place)
        if line is None:
            path, _, number = place.rpartition(":")
            line = lines[place] = Line(place, linecache.getline(path, int(number)).strip())
        if node in known.lost:
            line.lost[_name_of(node)] = None
        if known.of(node) is not None and _leaves(node, place):
            words = meaning_in_words(node, known)
            line.values[_SYMBOL.sub(lambda found: (names or {}).get(found[0], found[0]), words)] = None
    return tuple(line for line in lines.values() if line.values or line.lost)


def _leaves(node: fx.Node, place: str) -> bool:
    """Whether a value is used on another line, or returned."""
    return any(line_of(user.meta.get("stack_trace")) != place for user in node.users)


def _name_of(node: fx.Node) -> str:
    return f"`{getattr(getattr(node.target, 'overloadpacket', None), '__name__', None) or node.name}`"


def meaning_in_words(node: fx.Node, known: Meanings) -> str:
    """The meaning of one value: `(token, slot): numbers of experts, all different along the slots`."""
    found = known.of(node)
    assert found is not None
    axes = [_axis(axis, known) for axis in found.axes]
    words = ", ".join(_facts(node, found, known))
    text = f"({', '.join(axes)}{',' * (len(axes) == 1)})"
    return f"{text}: {words}" if words else text


def _facts(node: fx.Node, found: Meaning, known: Meanings) -> Iterator[str]:
    one_hot = one_hot_mask_of(node)
    if one_hot is not None and one_hot.expert is not None and not choices_of(one_hot.indices):
        one_hot = None  # numbers that are compared with one number
    if found.numbers is not None:
        none = ", below 0 for none" if found.partly else ""
        yield f"numbers of {_plural(_axis(found.numbers, known))}{none}"
        if rank_of(node) > 1 and shape_of(node)[-1] != 1 and name_once(node):
            yield "each expert once a token"
    if found.columns:
        yield f"numbers of {' and '.join(_plural(_axis(column, known)) for column in found.columns)} side by side"
    if one_hot is not None:
        yield f"set {_where(one_hot, found, known)}{'' if one_hot.exact else ', for some of the pairs'}"
    elif found.numbers is None and len(found.axes) == 2 and support_of(node) is not None:
        yield "0 where an expert was not chosen"
    if found.running and one_hot is None:
        yield "from a running count"


def _where(one_hot: OneHotMask, found: Meaning, known: Meanings) -> str:
    if one_hot.expert is not None:
        return f"where expert {one_hot.expert} was chosen"
    if "expert" not in one_hot.axes:
        return "where an expert was chosen"
    axis = _axis(found.axes[one_hot.axes.index("expert")], known)
    return f"at the chosen {axis}" if axis == "expert" else f"at its {axis}"


def _axis(axis: Axis, known: Meanings) -> str:
    """An axis in a word."""
    axis = known.extents.of(axis)
    if not axis:
        return "1"
    for tokens in known.tokens:
        each = [known.extents.of(one) for one in tokens]
        whole = tuple(extent for one in each for extent in one)
        if axis == whole:
            return "token"
        if axis[: len(whole)] == whole and [extent.role for extent in axis[len(whole) :]] == ["slot"]:
            return "pair"
    words = [_extent(extent) for extent in axis]
    if words == ["chunk", "step of a chunk"]:
        return "time step"
    return words[0] if len(set(words)) == 1 else "*".join(words)


def _extent(extent: Extent) -> str:
    if extent.role and extent.role != "token":
        return extent.role
    if extent.unknown and not extent.name:
        return "?"
    if extent.name:
        return extent.name
    size = expression_of(extent.size)
    if not isinstance(size, int):
        return str(size)
    return "token" if extent.role else "feature"


def _plural(word: str) -> str:
    return _PLURALS.get(word, "?" if word == "?" else f"{word}s")
