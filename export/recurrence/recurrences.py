"""`fold_recurrences`: a model that loops over a length in Python becomes one that does not, for any length.

subject ─▶ lengths ─▶ trace at three lengths ─▶ canonicalize ─▶ loops ─▶ rolled graphs ─▶ folded module ─▶ subject
           (run it)                                                        │             │
                                                     integers as forms of the length     compared with the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_export.domain import Condition, Domain
from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.cumulative import cumulative_step_by_step
from moe_export.export.recurrence.delta_rule import delta_rules_step_by_step
from moe_export.export.recurrence.fold import folded_module
from moe_export.export.recurrence.generalised import UnlikeError
from moe_export.export.recurrence.in_common import NoLoopError, in_common, repeats_of
from moe_export.export.recurrence.notes import at, folded_loops, left_fixed, limits, named
from moe_export.export.recurrence.prove import prove, wrong_at_one
from moe_export.export.recurrence.reach import Reach
from moe_export.export.recurrence.recurrent_layers import recurrent_layers_step_by_step
from moe_export.export.recurrence.rolled import LengthError
from moe_export.export.recurrence.sizes import rows
from moe_export.export.recurrence.user_scans import scans_step_by_step
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.guards import conditions_of
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
_INSISTING = ("scan", "chunked", "contrib")  # modes in which a loop that cannot be folded is an error

_LONG = 22  # above it, a model is only traced if it accepts no shorter lengths
_MOST_AGAIN = 1500  # operators of a trace at further lengths, after shorter ones showed no loop: 20 s


@dataclass(frozen=True)
class Recurrent:
    """The result of folding a model's loops.

    Attributes:
        subject: The folded model; the given one if nothing was folded.
        unrolled: The trace of the model at a short length, if it was folded.
        notes: Notes for the report.
        lengths: The lengths that were folded over; empty if there are none.
        reached: For which sizes of each of them the fold is right.
        not_single: (input, axis) pairs, not folded over, for which the fold is wrong at size 1.
    """

    subject: Subject
    unrolled: Traced | None = None
    notes: tuple[str, ...] = ()
    lengths: tuple[Length, ...] = ()
    reached: tuple[Reach, ...] = ()
    not_single: tuple[tuple[str, int], ...] = ()

    def conditions(self, folded: Traced) -> tuple[Condition, ...]:
        """The conditions on sizes that the fold needs, in the names of the folded model's dimensions."""
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
        """What may be free in the folded model: what was free in the trace that it was made from, and the lengths.

        Any other length that the model loops over is unrolled in it, so nothing in it depends on that size any more.
        """
        if self.unrolled is None:
            return request
        sizes = self.unrolled.inputs
        fixed = {(name, axis) for name, shape in sizes.items() for axis, size in enumerate(shape)
                 if isinstance(size, int)}  # fmt: skip
        return replace(request, fixed=frozenset(fixed - self.axes()))

    def axes(self) -> set[tuple[str, int]]:
        """The (input, axis) pairs that were folded over."""
        return {place for length in self.lengths for place in length.axes}


def fold_recurrences(subject: Subject, request: DimRequest, mode: Mode = "auto") -> Recurrent:
    """Fold every loop over a length.

    Args:
        subject: The model.
        request: Which dimensions are to be free; a loop over a length that is not stays unrolled.
        mode: `unrolled` leaves the model unchanged; so does `auto`, with a note, if a loop cannot be folded.

    Raises:
        NotExportableError: A loop cannot be folded, and the mode is `scan`, `chunked` or `contrib`, or its length
            was asked for by name.
    """
    if mode == "unrolled":
        return Recurrent(subject)
    with (
        delta_rules_step_by_step(),
        scans_step_by_step(subject.module),
        cumulative_step_by_step(),
        recurrent_layers_step_by_step(),
    ):
        return _folded_if_it_can(subject, request, mode)


def left_if_fixed(recurrent: Recurrent, folded: Traced, subject: Subject, mode: Mode) -> Recurrent:
    """The given model instead of the folded one, if the tracer still fixes a length of the folded one.

    Such a trace would be of no use: it is made at a length that we chose, not at that of the example.

    Raises:
        NotExportableError: That is so, and the mode is `scan`, `chunked` or `contrib`.
    """
    fixed = [
        length
        for length in recurrent.lengths
        if any(isinstance(folded.inputs[name][axis], int) for name, axis in length.axes)
    ]
    if not fixed:
        return recurrent
    message = (
        f"the loop over {named(fixed[0])} cannot be folded: "
        "the tracer fixes the length of the folded model, too"
    )
    if mode in _INSISTING:
        raise NotExportableError(
            message, code=Code.LOOP, where=str(subject.source), hint="fix the length: --recurrence unrolled"
        )
    return Recurrent(subject, notes=(Code.LOOP.mark(message),))


def _folded_if_it_can(subject: Subject, request: DimRequest, mode: Mode) -> Recurrent:
    with quiet():
        lengths = looped_lengths(subject, request)
    if not lengths:
        return Recurrent(subject)
    try:
        if subject.weights is not None and subject.weights.absent:
            raise LengthError(
                "a fold is proved by running the model, and its weights are not in memory", None
            )
        done, staying = _over_most(subject, request, lengths)
        return replace(done, notes=(*done.notes, *_left_fixed(done, lengths, staying)))
    except LengthError as error:
        message = f"the loop over {named(lengths[0])} cannot be folded: {error.reason}"
        if mode in _INSISTING or any(place in request.picked for place in lengths[0].axes):
            raise NotExportableError(
                message,
                code=Code.LOOP,
                where=error.where or str(subject.source),
                hint="rewrite the loop so that each step does the same, or fix the length: --recurrence unrolled",
            ) from error
        return Recurrent(subject, notes=(Code.LOOP.mark(f"{message}{at(error)}"),))


def _over_most(
    subject: Subject, request: DimRequest, lengths: Sequence[Length]
) -> tuple[Recurrent, LengthError | None]:
    """Fold over the first length and over one with loops of its own; also the reason if that one cannot be folded."""
    with quiet():
        apart = next((other for other in lengths[1:] if looped_apart(subject, lengths[0], other)), None)
    staying: LengthError | None = None
    if len(lengths) > 1:
        try:
            return _folded(subject, request, (lengths[0], apart or lengths[1])), None
        except LengthError as error:
            staying = None if apart is None else error
    try:
        return _folded(subject, request, lengths[:1]), staying
    except LengthError:
        if apart is None:
            raise
    return _folded(subject, request, (apart,)), staying


def _left_fixed(done: Recurrent, lengths: Sequence[Length], staying: LengthError | None) -> list[str]:
    return [] if done.unrolled is None else left_fixed(done.unrolled, lengths, done.axes(), staying)


def _folded(subject: Subject, request: DimRequest, lengths: Sequence[Length]) -> Recurrent:
    refusal: LengthError | None = None
    in_chunks = False  # whether lengths for chunks were traced; if they were, others show nothing more
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
            return _folded_at(subject, request, lengths, examples, chunk, again=refusal is not None)
        except LengthError as error:
            if len(lengths) > 1:  # the caller tries each of them alone next
                raise
            if chunk is not None:
                in_chunks, refusal = True, _of_chunks(error, chunk)
                if isinstance(error, UnlikeError) or isinstance(error.__cause__, UnlikeError):
                    continue
                break
            if not isinstance(error, NoLoopError) and refusal is not None:
                # Numbers without a formula may look alike at great lengths, and what is found there is no loop.
                raise (refusal if isinstance(refusal, NoLoopError) and refusal.of_number else error) from None
            refusal = refusal or error  # a loop may have too few iterations at these lengths
            if max(row)[0] > _LONG:
                break
    raise refusal or LengthError("the model takes none of the lengths that would be traced", None)


def _of_chunks(error: LengthError, chunk: int) -> LengthError:
    return LengthError(
        f"{error.reason}; it takes {chunk} places per iteration: if the last iteration has fewer, "
        "pad the input to a multiple before the loop, and cut off the result",
        error.where,
    )


def _folded_at(
    subject: Subject,
    request: DimRequest,
    lengths: Sequence[Length],
    examples: Mapping[tuple[int, ...], Mapping[str, torch.Tensor]],
    chunk: int | None,
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
    if again:  # see whether there is a loop at all before the trace with free sizes, which takes longest
        static = replace(unpicked, static=True, picked={})
        repeats_of([trace(other, static, as_called=True) for other in others[:2]])
    traced = trace(first, unpicked, as_called=True)
    tied = replace(unpicked, fixed=unpicked.fixed | axes)
    if not _holds_at(traced, lengths, examples):
        unpicked, traced = tied, trace(first, tied, as_called=True)
    fixed = _fixed(traced, lengths)
    if not all(fixed):
        if len(lengths) > 1:
            raise LengthError("one of two lengths is not looped over", None)
        return Recurrent(subject)  # the tracer keeps this length free: no loop over it is unrolled
    try:
        whole = in_common(traced, others, tuple(examples), unpicked, chunk)
    except LengthError:
        if set().union(*fixed) == axes:
            raise
        # The trace has a length of its own for inputs whose length is not what the model loops over.
        traced = trace(first, tied, as_called=True)
        whole, fixed = in_common(traced, others, tuple(examples), tied, chunk), _fixed(traced, lengths)
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
            raise LengthError(f"folded, it fails: {reason}", None) from error
    folded = replace(
        made,
        inputs=dict(zip(subject.inputs, made.inputs.values(), strict=True)),
        constants=subject.constants,
        outputs=subject.outputs,
        dropped=subject.dropped,
    )
    reached = prove(subject, folded, lengths, tuple(examples), whole, rounded=again)
    notes = (*folded_loops(whole, module, lengths, subject), *limits(lengths, reached))
    single = wrong_at_one(subject, folded, lengths, max(examples), traced.inputs)
    return Recurrent(folded, traced, notes, tuple(lengths), reached, single)


def _fixed(traced: Traced, lengths: Sequence[Length]) -> list[list[tuple[str, int]]]:
    """Of each length the axes whose size is a number in the trace."""
    return [
        [(name, axis) for name, axis in length.axes if isinstance(traced.inputs[name][axis], int)]
        for length in lengths
    ]


def _holds_at(
    traced: Traced, lengths: Sequence[Length], examples: Mapping[tuple[int, ...], Mapping[str, torch.Tensor]]
) -> bool:
    """Whether lengths that are free in a trace are so at all sizes: of a loop over chunks, it may keep their number."""
    sizes = {dim.name: dim.traced for dim in traced.dims}
    free = {
        str(traced.inputs[name][axis]): (name, axis)
        for length in lengths
        for name, axis in length.axes
        if traced.inputs[name][axis] in sizes
    }
    domain = (
        replace(traced, conditions=conditions_of(traced.program, traced.dims)).domain if free else Domain(())
    )
    return all(
        domain.holds(sizes | {dim: example[name].shape[axis] for dim, (name, axis) in free.items()})
        for example in examples.values()
    )


def _same_elsewhere(
    subject: Subject, examples: Mapping[tuple[int, ...], Mapping[str, torch.Tensor]], request: DimRequest
) -> list[Mapping[str, torch.Tensor]]:
    """The examples with their other dimensions widened as the tracer widens them, so that they agree in these."""
    with quiet():
        return [widened(replace(subject, inputs=example), request) for example in examples.values()]


def _placeholders(traced: Traced) -> list[str]:
    inputs = set(traced.program.graph_signature.user_inputs)
    return [
        node.name for node in traced.program.graph.nodes if node.op == "placeholder" and node.name in inputs
    ]
