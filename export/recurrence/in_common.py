"""`in_common`: the loops that traces of a model at several lengths have in common, or why there are none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from moe_export.export.frontend.source import line_of
from moe_export.export.frontend.subject import Subject
from moe_export.export.recurrence.canonicalize import canonicalize
from moe_export.export.recurrence.generalised import UnlikeError, generalised
from moe_export.export.recurrence.loops import Repeats, find_loops
from moe_export.export.recurrence.match_iterations import Refusal
from moe_export.export.recurrence.operand import operator_name
from moe_export.export.recurrence.period import LEAST_ITERATIONS
from moe_export.export.recurrence.rolled import LengthError, RolledGraph, roll
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.trace import Traced, trace


class NoLoopError(LengthError):
    """Nothing in the traces repeats as a loop does.

    Attributes:
        of_number: Whether the only obstacle is a number that the steps compute with.
    """

    def __init__(self, reason: str, where: str | None, *, of_number: bool = False) -> None:
        super().__init__(reason, where)
        self.of_number = of_number


def repeats_of(traces: Sequence[Traced]) -> list[Repeats]:
    """What repeats in each of the traces, with the loops that were found.

    Raises:
        NoLoopError: No loop was found.
    """
    repeats = [Repeats(canonicalize(traced.program)) for traced in traces]
    find_loops(repeats)
    if not repeats[0].loops:
        raise _no_loop(repeats)
    return repeats


def in_common(
    first: Traced,
    others: Sequence[Subject],
    sizes: Sequence[tuple[int, ...]],
    request: DimRequest,
    chunk: int | None = None,
) -> RolledGraph:
    """What the traces at all lengths have in common.

    Only the first trace has its other dimensions free, which takes the tracer ten times as long. Where the others then
    differ too much from it, they are traced again in the same way.

    Args:
        first: The first trace.
        others: The model with examples of the other lengths.
        sizes: The lengths of all traces, starting with that of `first`.
        request: What was free in the first trace.
        chunk: The places that an iteration takes, where that is known.

    Raises:
        NoLoopError: Nothing in them repeats as a loop does.
        LengthError: They differ in more than numbers that follow the length.
    """
    static = replace(request, static=True, picked={})
    try:
        return _common(sizes, chunk, [first, *(trace(other, static, as_called=True) for other in others)])
    except NoLoopError:
        raise
    except LengthError:
        if request == static:
            raise
    return _common(sizes, chunk, [first, *(trace(other, request, as_called=True) for other in others)])


def with_product(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the lengths; of several also their product: a loop runs over it if an image is one row of pixels."""
    return (*sizes, math.prod(sizes)) if len(sizes) > 1 else sizes


def _common(sizes: Sequence[tuple[int, ...]], chunk: int | None, traces: Sequence[Traced]) -> RolledGraph:
    """What the traces have in common."""
    if any(traced.program.graph_signature.buffers_to_mutate for traced in traces):
        raise LengthError("the model changes a buffer while it runs", None)
    repeats = repeats_of(traces)
    try:
        rolled = {with_product(size): roll(each) for size, each in zip(sizes, repeats, strict=True)}
        return generalised(rolled, chunk)
    except UnlikeError as error:
        nearest = _nearest(repeats[-1])
        if nearest is None or nearest.nodes <= getattr(_nearest(repeats[0]), "nodes", 0):
            raise
        raise LengthError(nearest.reason, line_of(nearest.node.meta.get("stack_trace"))) from error


def _no_loop(repeats: Sequence[Repeats]) -> NoLoopError:
    """The reason why the repetition that came closest to a loop is not one."""
    nearest = _nearest(repeats[-1])
    if nearest is None:
        return _unlike(repeats[0].nodes, repeats[-1].nodes)
    where = line_of(nearest.node.meta.get("stack_trace"))
    return NoLoopError(nearest.reason, where, of_number=nearest.of_number)


def _nearest(trace: Repeats) -> Refusal | None:
    """The refusal of the most repeated nodes outside of a trace's loops: they came closest to a loop."""
    outside = [refusal for refusal in trace.refusals if trace.locate(refusal.node) is None]
    return max(outside, key=lambda refusal: refusal.nodes, default=None)


def _unlike(fewer: Sequence[fx.Node], more: Sequence[fx.Node]) -> NoLoopError:
    """If nothing repeats: the line of the model that computes more at a greater length, and what it computes."""
    short, long = (
        Counter(line_of(node.meta.get("stack_trace")) for node in nodes) for nodes in (fewer, more)
    )
    lines = [line for line in long if line is not None and long[line] > short[line]]
    if not lines:
        return NoLoopError("its steps are not alike", None)
    most = max(lines, key=lambda line: long[line] - short[line])
    there = [node for node in more if line_of(node.meta.get("stack_trace")) == most]
    times = Counter(operator_name(node.target) for node in there)
    names = [name for name, count in times.items() if count >= LEAST_ITERATIONS][:4]
    return NoLoopError(
        f"its steps are not alike: in turns, they compute {', '.join(names) or 'other things'}", most
    )
