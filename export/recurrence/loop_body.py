"""`LoopBody`: one iteration of a folded loop as a callable, run iteration by iteration in PyTorch, or once between
boundary nodes in a trace.

A trace of it holds the body once, between opaque boundary nodes that carry the shapes of its inputs and outputs
(`tracing.traced_loops`); the ONNX side cuts this loop region out and makes it the body of a `Scan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.onnx.ops
from torch import Tensor, fx

from moe_export.export.recurrence.all_at_once import AllAtOnce, NotAlikeError, Rows, goes_at_once
from moe_export.export.tracing.traced_loops import DOMAIN, ELEMENT, END, STATE


@dataclass(frozen=True)
class Along:
    """The axis of time, and whether it runs from the last iteration to the first."""

    axis: int
    backwards: bool = False


class LoopBody:
    """A callable `(states, sequences, captured, iterations) → states after the last iteration, then collected values`.

    Args:
        number: Different for each loop of a model, so that boundary nodes of two loops are never merged into one.
        graph: Inputs: states, elements, captured values; outputs: next states, then collected values.
        states: How many states there are.
        elements: The axis of time of each sequence.
        collected: Where the axis of time of each collected output goes.
        least: How many iterations there are at length 1. Runtimes fail on a `Scan` without an iteration, so if there
            may be none, one iteration on zeros takes its place, and its results are dropped.
    """

    def __init__(
        self,
        number: int,
        graph: fx.Graph,
        states: int,
        elements: Sequence[Along],
        collected: Sequence[Along],
        least: int,
    ) -> None:
        self.__name__ = f"loop_{number}"
        self.number = number
        self.graph = graph
        self.states = states
        self.elements = tuple(elements)
        self.collected = tuple(collected)
        self.least = least
        self._module = fx.GraphModule(torch.nn.Module(), graph)
        self.at_once = not states and goes_at_once(graph, len(elements))

    def __call__(
        self, states: Sequence[Tensor], sequences: Sequence[Tensor], captured: Sequence[Any], iterations: Any
    ) -> list[Tensor]:
        run = self._one_by_one
        if torch.compiler.is_exporting():
            if self.at_once:
                with suppress(NotAlikeError):
                    return self._all_at_once(list(sequences), list(captured))
            run = self._as_region if self.least > 0 else self._as_region_with_an_iteration
        return run(list(states), list(sequences), list(captured), iterations)

    def once(self, values: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """One iteration: the next states and what is collected, from states, elements and captured values."""
        results = list(fx.Interpreter(self._module).run(*values))
        return results[: self.states], results[self.states :]

    def _one_by_one(
        self, states: list[Tensor], sequences: list[Tensor], captured: list[Any], iterations: int
    ) -> list[Tensor]:
        rows: list[list[Tensor]] = []
        for iteration in range(iterations):
            elements = [
                sequence.select(along.axis, iterations - 1 - iteration if along.backwards else iteration)
                for sequence, along in zip(sequences, self.elements, strict=True)
            ]
            states, values = self.once([*states, *elements, *captured])
            rows.append(values)
        if not rows:
            return [*states, *self._empty(states, sequences, captured)]
        return [
            *states,
            *(
                torch.stack(column[::-1] if along.backwards else column, dim=along.axis)
                for column, along in zip(zip(*rows, strict=True), self.collected, strict=True)
            ),
        ]

    def _all_at_once(self, sequences: list[Tensor], captured: list[Any]) -> list[Tensor]:
        """The collected values, computed for all iterations together."""
        rows = [
            Rows((sequence.flip(along.axis) if along.backwards else sequence).movedim(along.axis, 0))
            for sequence, along in zip(sequences, self.elements, strict=True)
        ]
        found = AllAtOnce(self._module).run(*rows, *captured)
        if not all(isinstance(each, Rows) for each in found):
            raise NotAlikeError("a result is the same for all iterations")
        return [
            (value.value.flip(0) if along.backwards else value.value).movedim(0, along.axis)
            for value, along in zip(found, self.collected, strict=True)
        ]

    def _empty(self, states: list[Tensor], sequences: list[Tensor], captured: list[Any]) -> list[Tensor]:
        """The collected values of no iteration: the body is run once on zeros to get their shapes."""
        elements = [
            sequence.new_zeros([size for axis, size in enumerate(sequence.shape) if axis != along.axis])
            for sequence, along in zip(sequences, self.elements, strict=True)
        ]
        _, values = self.once([*states, *elements, *captured])
        return [
            value.unsqueeze(along.axis).narrow(along.axis, 0, 0)
            for value, along in zip(values, self.collected, strict=True)
        ]

    def _as_region_with_an_iteration(
        self, states: list[Tensor], sequences: list[Tensor], captured: list[Any], iterations: Any
    ) -> list[Tensor]:
        """The loop region with at least one iteration; if there is none, states are kept and nothing is collected."""
        some = torch.sym_max(iterations, 1)  # type: ignore[no-untyped-call]
        longer = [
            torch.cat([sequence, sequence.new_zeros(_with(_without(sequence.shape, along.axis), along.axis, 1))],
                      along.axis).narrow(along.axis, 0, some)
            for sequence, along in zip(sequences, self.elements, strict=True)
        ]  # fmt: skip
        results = self._as_region(states, longer, captured, some)
        any_iteration = torch.scalar_tensor(iterations, dtype=torch.int64) > 0
        last = [torch.where(any_iteration, new, old) for new, old in zip(results, states, strict=False)]
        columns = results[self.states :]
        return [
            *last,
            *(
                column.narrow(along.axis, 0, iterations)
                for column, along in zip(columns, self.collected, strict=True)
            ),
        ]

    def _as_region(
        self, states: list[Tensor], sequences: list[Tensor], captured: list[Any], iterations: Any
    ) -> list[Tensor]:
        if not sequences:  # a `Scan` takes its number of iterations from its sequences
            sequences = [torch.zeros(iterations)]
        alongs = self.elements or (Along(0),)
        inner = [self._mark(STATE, place, state, state.shape) for place, state in enumerate(states)]
        elements = [
            self._mark(ELEMENT, place, sequence, _without(sequence.shape, along.axis), along)
            for place, (sequence, along) in enumerate(zip(sequences, alongs, strict=True))
        ]
        following, values = self.once([*inner, *(elements if self.elements else []), *captured])
        shapes = [
            *(value.shape for value in states),
            *(
                _with(value.shape, along.axis, iterations)
                for value, along in zip(values, self.collected, strict=True)
            ),
        ]
        return torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{END}",
            (*inner, *elements, *following, *values),
            {
                "states": len(inner),
                "elements": len(elements),
                "axes": [along.axis for along in self.collected] or [0],
                "backwards": [int(along.backwards) for along in self.collected] or [0],
                "loop": self.number,
            },
            dtypes=[value.dtype for value in (*states, *values)],
            shapes=shapes,
            version=1,
        )  # type: ignore[return-value]

    def _mark(
        self, kind: str, place: int, value: Tensor, shape: Sequence[Any], along: Along | None = None
    ) -> Tensor:
        along = along or Along(0)
        attributes: dict[str, Any] = {
            "loop": self.number, "place": place, "axis": along.axis, "backwards": int(along.backwards)
        }  # fmt: skip
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{kind}", (value,), attributes, dtype=value.dtype, shape=tuple(shape), version=1
        )


def _without(shape: Sequence[Any], axis: int) -> list[Any]:
    return [size for place, size in enumerate(shape) if place != axis]


def _with(shape: Sequence[Any], axis: int, size: Any) -> list[Any]:
    return [*shape[:axis], size, *shape[axis:]]
