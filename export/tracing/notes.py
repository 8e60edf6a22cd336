"""What a reader of the report should know about a graph: everything in which it is less than the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from typing import Any

from moe_export.errors import Code
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.trace import Traced

_PLAIN = (bool, int, float, complex, str)


def notes_on(
    subject: Subject,
    traced: Traced,
    unrolled: Traced | None = None,
    seen: Mapping[str, Set[bool]] | None = None,
) -> list[str]:
    """One line each: fixed dimensions, dropped outputs, fixed arguments, changed state, checks, unused inputs.

    Args:
        subject: The model.
        traced: The trace of it, or of what it is with loops folded.
        unrolled: The trace of the model itself, if loops were folded: what its Python asked is known there.
        seen: Which way inputs went at each decision.
    """
    asked = traced if unrolled is None else unrolled
    return [
        *(str(fixed) for fixed in traced.fixed if fixed.model_takes_others),
        *(_on_dropped(name, value, traced) for name, value in subject.dropped.items()),
        *(f"argument {name} is fixed at {_short(value)}" for name, value in subject.constants.items()),
        *subject.notes,
        *_on_state(subject),
        *(
            f"the check at {place} is taken as passed; the graph goes on where it fails"
            for place in asked.checks
        ),
        *(
            f"the number of steps of the loop at {os.path.basename(place)} depends on values: it is a Loop in the graph"
            for place in asked.open_loops
        ),
        *map(lookup_note, asked.lookups),
        *_on_decisions(asked.decisions, seen or {}),
        *(f"input {name} has no influence on the outputs" for name in _unused(traced)),
    ]


def lookup_note(place: str) -> str:
    """What is said of a line, `file:line`, that looks up a module; not where the line is known as experts."""
    return (
        f"all modules that are looked up at {os.path.basename(place)} are computed, and one result is taken"
    )


def _on_decisions(places: Sequence[str], seen: Mapping[str, Set[bool]]) -> list[str]:
    """A graph computes what either side needs, and takes one; what no input was seen to take is unproven."""
    return [
        f"decision on values at {os.path.basename(place)}: both sides are in the graph, which takes one"
        + _UNPROVEN[len(seen.get(place, ()))]
        for place in places
    ]


_UNPROVEN = ("; no input that was tried reaches it", "; no input that was tried goes the other way", "")


def _on_state(subject: Subject) -> list[str]:
    """A graph has no memory: what is kept from call to call in the model, it does not have."""
    notes = [
        Code.STATE.mark(
            f"{what} changes with every call of the model; the graph always starts from its first value"
        )
        for what in sorted(subject.changed - subject.unread)
    ]
    if subject.unread:
        notes.append(
            f"set by each call, and not seen in the outputs of the next one: {_named(subject.unread)}; "
            "the graph does not have it: return it from forward to keep it"
        )
    if subject.cached:
        found = _named(subject.cached)
        notes.append(f"set by the model's first call, and left out here before each call: {found}")
    return notes


def _named(state: Set[str]) -> str:
    named = ", ".join(sorted(state)[:4])
    return f"{named} and {len(state) - 4} more" if len(state) > 4 else named


def _on_dropped(name: str, value: Any, traced: Traced) -> str:
    if name in traced.computed:
        return (
            f"output {name} is a Python number that the model computes, and is dropped; "
            "return it as a tensor to keep it"
        )
    if isinstance(value, _PLAIN):
        return f"output {name} is the constant {_short(value)} and is dropped"
    return f"output {name} is a {type(value).__name__}, not a tensor, and is dropped"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unused(traced: Traced) -> list[str]:
    """Inputs that nothing in the trace reads, not even their sizes."""
    given = set(traced.program.graph_signature.user_inputs)
    inputs = [node for node in traced.program.graph.nodes if node.op == "placeholder" and node.name in given]
    return [name for name, node in zip(traced.inputs, inputs, strict=True) if not node.users]
