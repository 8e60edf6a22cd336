"""`fold_recurrences`: a model that loops over a length in Python becomes one that does not, for any length.

subject ─▶ lengths ─▶ trace at three lengths ─▶ canonicalize ─▶ loops ─▶ rolled graphs ─▶ folded module ─▶ subject
           (run it)                                                        │             │
                                                     integers as forms of the length     held against the model
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_export.domain import Condition
from moe_export.errors import NotExportableError, UsageError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.cumulative import cumulative_step_by_step
from moe_export.export.recurrence.delta_rule import delta_rules_step_by_step
from moe_export.export.recurrence.fold import folded_module
from moe_export.export.recurrence.generalised import UnlikeError
from moe_export.export.recurrence.in_common import NoLoopError, in_common, repeats_of
from moe_export.export.recurrence.prove import prove, wrong_at_one
from moe_export.export.recurrence.reach import Reach
from moe_export.export.recurrence.recurrent_layers import recurrent_layers_step_by_step
from moe_export.export.recurrence.rolled import Folded, LengthError, RolledGraph
from moe_export.export.recurrence.sizes import rows
from moe_export.export.recurrence.user_scans import scans_step_by_step
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.lengths import (
    Length,
    looped_apart,
    looped_lengths,
    operators,
    resized_together,
)
from moe_export.export.tracing.trace import SCOPE, Traced, quiet, trace
from moe_export.export.tracing.widen import widened

Mode = Literal["auto", "scan", "chunked", "contrib", "unrolled"]
_INSISTING = ("scan", "chunked", "contrib")

_LONG = 22  # a trace at lengths above is only made of a model that takes no shorter ones
_MOST_AGAIN = 1500  # operators of a trace at further lengths, where shorter ones showed no loop: 20 s


@dataclass(frozen=True)
class Recurrent:
    """What came of it.

    Attributes:
        subject: The folded model, or the given one.
        unrolled: The trace of the model at a short length, if it was folded.
        notes: For the report.
        lengths: What was folded over, if anything was.
        reached: For which sizes of each of them that is right.
        not_single: Axes of inputs, not folded over, at whose size 1 it is wrong.
    """

    subject: Subject
    unrolled: Traced | None = None
    notes: tuple[str, ...] = ()
    lengths: tuple[Length, ...] = ()
    reached: tuple[Reach, ...] = ()
    not_single: tuple[tuple[str, int], ...] = ()

    def conditions(self, folded: Traced) -> tuple[Condition, ...]:
        """What folding assumed of sizes, in the names of the folded model's dimensions."""
        single = [folded.inputs[name][axis] for name, axis in self.not_single]
        found = [Condition(f"{size} >= 2") for size in single if isinstance(size, str)]
        for length, reached in zip(self.lengths, self.reached, strict=True):
            name, axis = length.axes[0]
            if reached.least > 1:
                found.append(Condition(f"{folded.inputs[name][axis]} >= {reached.least}"))
            if reached.limit is not None:
                found.append(Condition(f"{folded.inputs[name][axis]} <= {reached.limit}"))
        return tuple(found)

    def dims(self, request: DimRequest) -> DimRequest:
        """What may be free: of the folded model, only what was free where it was traced for it, and the length.

        Another length that is looped over stands in it step by step, so that nothing in it depends on that size.
        """
        if self.unrolled is None:
            return request
        sizes = self.unrolled.inputs
        fixed = {(name, axis) for name, shape in sizes.items() for axis, size in enumerate(shape)
                 if isinstance(size, int)}  # fmt: skip
        return replace(request, fixed=frozenset(fixed - self.axes()))

    def axes(self) -> set[tuple[str, int]]:
        """The axes of inputs that were folded over."""
        return {place for length in self.lengths for place in length.axes}


def fold_recurrences(subject: Subject, request: DimRequest, mode: Mode = "auto") -> Recurrent:
    """Fold every loop over a length.

    Args:
        subject: The model.
        request: Which dimensions are to be free; a length that is not stays unrolled.
        mode: `unrolled` leaves the model as it is; `auto` too, with a note, where a loop cannot be folded.

    Raises:
        NotExportableError: A loop cannot be folded, and the mode is `scan`, `chunked` or `contrib`, or its length
            was asked for by name.
    """
    if mode == "unrolled":
        return Recurrent(subject)
    with (
        delta_rules_step_by_step(),
        scans_step_by_step(),
        cumulative_step_by_step(),
        recurrent_layers_step_by_step(),
    ):
        return _folded_if_it_can(subject, request, mode)


def left_if_fixed(recurrent: Recurrent, folded: Traced, subject: Subject, mode: Mode) -> Recurrent:
    """The model as it was given, where the tracer takes the length of the folded one for a number all the same.

    The folded model is traced at a length of ours, not at that of the example.

    Raises:
        NotExportableError: The mode is `scan`, `chunked` or `contrib`.
    """
    fixed = [
        length
        for length in recurrent.lengths
        if any(isinstance(folded.inputs[name][axis], int) for name, axis in length.axes)
    ]
    if not fixed:
        return recurrent
    message = (
        f"the loop over {_named(fixed[0])} cannot be folded: "
        "without it, the tracer still takes the length for a number"
    )
    if mode in _INSISTING:
        raise NotExportableError(
            message, where=str(subject.source), hint="fix the length: --recurrence unrolled"
        )
    return Recurrent(subject, notes=(message,))


def _folded_if_it_can(subject: Subject, request: DimRequest, mode: Mode) -> Recurrent:
    with quiet():
        lengths = looped_lengths(subject, request)
    if not lengths:
        return Recurrent(subject)
    try:
        if subject.weights is not None and subject.weights.absent:
            raise LengthError("that is proved by running the model, and its weights are not in memory", None)
        done, staying = _over_most(subject, request, lengths)
        return replace(done, notes=(*done.notes, *_staying(done, lengths, staying)))
    except LengthError as error:
        message = f"the loop over {_named(lengths[0])} cannot be folded: {error.reason}"
        if mode in _INSISTING or any(place in request.picked for place in lengths[0].axes):
            raise NotExportableError(
                message,
                where=error.where or str(subject.source),
                hint="rewrite the loop so that each step does the same, or fix the length: --recurrence unrolled",
            ) from error
        return Recurrent(subject, notes=(f"{message}{_at(error)}",))


def _over_most(
    subject: Subject, request: DimRequest, lengths: Sequence[Length]
) -> tuple[Recurrent, LengthError | None]:
    """Fold over the first length, and over one that is looped over apart from it; or why not over that one too."""
    with quiet():
        apart = next((other for other in lengths[1:] if looped_apart(subject, lengths[0], other)), None)
    staying: LengthError | None = None
    if apart is not None:
        try:
            return _folded(subject, request, (lengths[0], apart)), None
        except LengthError as error:
            staying = error
    try:
        return _folded(subject, request, lengths[:1]), staying
    except LengthError:
        if apart is None:
            raise
    return _folded(subject, request, (apart,)), staying


def _at(error: LengthError) -> str:
    return f" ({error.where})" if error.where else ""


def _staying(done: Recurrent, lengths: Sequence[Length], staying: LengthError | None) -> list[str]:
    """Notes on what else is fixed: lengths that are looped over, as the width of an image read by rows, and others."""
    if done.unrolled is None:
        return []
    looped = {place for length in lengths for place in length.axes} - done.axes()
    shapes = done.unrolled.inputs
    why = "the loop runs over it, too, and is folded over one length"
    if staying is not None:
        why = f"a loop over it cannot be folded: {staying.reason}{_at(staying)}"
    return [
        f"{name}: length {shapes[name][axis]} is fixed (dimension {axis}): {why}"
        for name, axis in sorted(looped)
        if isinstance(shapes[name][axis], int)
    ] + [
        str(fixed)
        for fixed in done.unrolled.fixed
        if fixed.model_takes_others and (fixed.input, fixed.axis) not in looped | done.axes()
    ]


def _named(length: Length) -> str:
    return " and ".join(f"{name}:{axis}" for name, axis in length.axes)


def _folded(subject: Subject, request: DimRequest, lengths: Sequence[Length]) -> Recurrent:
    refusal: LengthError | None = None
    in_chunks = False  # whether lengths were traced that are made for chunks; then no others show more
    for row, chunk in rows(subject, lengths):
        if in_chunks and chunk is None:
            break
        with quiet():
            examples = {sizes: resized_together(lengths, subject.inputs, sizes) for sizes in row}
            counts = [operators(subject, example) for example in examples.values()]
        if None in counts:
            continue
        if refusal is not None and max(count or 0 for count in counts) > _MOST_AGAIN:
            break
        try:
            return _folded_at(subject, request, lengths, examples, again=refusal is not None)
        except LengthError as error:
            if len(lengths) > 1:  # one of them alone may fold, which is tried next
                raise
            if chunk is not None:
                in_chunks, refusal = True, _of_chunks(error, chunk)
                if isinstance(error, UnlikeError) or isinstance(error.__cause__, UnlikeError):
                    continue
                break
            if not isinstance(error, NoLoopError) and refusal is not None:
                # Numbers without a formula may look alike at great lengths, and what is found there is no loop.
                raise (refusal if isinstance(refusal, NoLoopError) and refusal.of_number else error) from None
            refusal = refusal or error  # there may be too few iterations of it at such lengths
            if max(row)[0] > _LONG:
                break
    raise refusal or LengthError("the model takes none of the lengths that would be traced", None)


def _of_chunks(error: LengthError, chunk: int) -> LengthError:
    return LengthError(
        f"{error.reason}; it takes {chunk} places per iteration: where the last iteration has fewer, "
        "pad the input to a multiple in front of the loop, and cut off the result",
        error.where,
    )


def _folded_at(
    subject: Subject,
    request: DimRequest,
    lengths: Sequence[Length],
    examples: Mapping[tuple[int, ...], Mapping[str, torch.Tensor]],
    *,
    again: bool,
) -> Recurrent:
    axes = {place for length in lengths for place in length.axes}
    unpicked = replace(request, picked={})
    if request.static:
        unpicked = replace(
            request, picked={place: name for place, name in request.picked.items() if place not in axes}
        )
    first, *others = (
        replace(subject, inputs=example) for example in _same_elsewhere(subject, examples, unpicked)
    )
    if again:  # a trace with free sizes takes longest
        static = replace(unpicked, static=True, picked={})
        repeats_of([trace(other, static, as_called=True) for other in others[:2]])
    traced = trace(first, unpicked, as_called=True)
    fixed = [
        [(name, axis) for name, axis in length.axes if isinstance(traced.inputs[name][axis], int)]
        for length in lengths
    ]
    if not all(fixed):
        if len(lengths) > 1:
            raise LengthError("one of two lengths is not looped over", None)
        return Recurrent(subject)  # the tracer keeps this length free: no loop over it is unrolled
    whole = in_common(traced, others, tuple(examples), unpicked)
    placeholders = dict(zip(traced.inputs, _placeholders(traced), strict=True))
    places = [[(placeholders[name], axis) for name, axis in group] for group in fixed]
    with quiet():
        module = folded_module(whole, traced.program, places, f"{SCOPE}.")
        try:
            made = make_subject(
                module, tuple(traced.example.values()), {}, source=subject.source, how=subject.how
            )
        except UsageError as error:
            reason = str(error).splitlines()[0]
            raise LengthError(f"without the loop it fails: {reason}", None) from error
    folded = replace(
        made,
        inputs=dict(zip(subject.inputs, made.inputs.values(), strict=True)),
        constants=subject.constants,
        outputs=subject.outputs,
        dropped=subject.dropped,
    )
    reached = prove(subject, folded, lengths, tuple(examples), whole, rounded=again)
    notes = (*_notes(whole, lengths, subject), *_limits(lengths, reached))
    single = wrong_at_one(subject, folded, lengths, max(examples), traced.inputs)
    return Recurrent(folded, traced, notes, tuple(lengths), reached, single)


def _limits(lengths: Sequence[Length], reached: Sequence[Reach]) -> list[str]:
    return [
        f"{_named(length)}: the model does something else after length {each.limit}, and the graph ends there"
        for length, each in zip(lengths, reached, strict=True)
        if each.limit is not None
    ]


def _same_elsewhere(
    subject: Subject, examples: Mapping[tuple[int, ...], Mapping[str, torch.Tensor]], request: DimRequest
) -> list[Mapping[str, torch.Tensor]]:
    """The examples with other dimensions widened as the tracer widens them, so that all have the same."""
    with quiet():
        return [widened(replace(subject, inputs=example), request) for example in examples.values()]


def _placeholders(traced: Traced) -> list[str]:
    inputs = set(traced.program.graph_signature.user_inputs)
    return [
        node.name for node in traced.program.graph.nodes if node.op == "placeholder" and node.name in inputs
    ]


def _notes(whole: RolledGraph, lengths: Sequence[Length], subject: Subject) -> list[str]:
    return [
        f"loop at {_near(item.loop.line, subject)}: {len(item.loop.body)} operators a step, "
        f"{item.loop.iterations} steps for L = {_named(lengths[getattr(item.loop.iterations, 'of', 0)])}, "
        "folded into one Scan"
        for item in whole.items
        if isinstance(item, Folded)
    ]


def _near(line: str | None, subject: Subject) -> str:
    """A line as seen from the model's folder."""
    return os.path.relpath(line, subject.source.parent) if line else "?"
