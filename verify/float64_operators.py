"""Operators for ONNX's reference implementation that support more of the standard than its own.

Its `Scan` ignores axes and directions; its `GatherElements` requires as many indices as the data has elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun


class Scan(OpRun):
    """`Scan` over any axes, in any directions."""

    op_domain = ""

    # What the base class finds in the node: attributes by their names, and how a body is run.
    body: Any
    num_scan_inputs: int
    scan_input_axes: Sequence[int] | None
    scan_input_directions: Sequence[int] | None
    scan_output_axes: Sequence[int] | None
    scan_output_directions: Sequence[int] | None
    _run_body: Any

    def need_context(self) -> bool:
        """Bodies capture values from the graph around them."""
        return True

    def _run(self, *args: Any, context: Any = None, bindings: Any = None, **_: Any) -> tuple[Any, ...]:
        count = self.num_scan_inputs
        states, streams = list(args[: len(args) - count]), args[len(args) - count :]
        axes, reverse = _filled(self.scan_input_axes, count), _filled(self.scan_input_directions, count)
        streams = tuple(
            np.flip(stream, axis) if back else stream
            for stream, axis, back in zip(streams, axes, reverse, strict=True)
        )
        names = list(self.body.input_names)
        length = min(stream.shape[axis] for stream, axis in zip(streams, axes, strict=True))
        rows: list[list[Any]] = []
        for iteration in range(length):
            elements = [np.take(stream, iteration, axis) for stream, axis in zip(streams, axes, strict=True)]
            given = {**(context or {}), **dict(zip(names, [*states, *elements], strict=True))}
            found = self._run_body(given, bindings=bindings)
            states = list(found[: len(states)])
            rows.append(list(found[len(states) :]))
        return (*states, *self._stacked(rows))

    def _stacked(self, rows: list[list[Any]]) -> list[Any]:
        columns = list(zip(*rows, strict=True))
        axes = _filled(self.scan_output_axes, len(columns))
        reverse = _filled(self.scan_output_directions, len(columns))
        return [
            np.stack(column[::-1] if back else column, axis)
            for column, axis, back in zip(columns, axes, reverse, strict=True)
        ]


class GatherElements(OpRun):
    """`GatherElements` whose indices may cover a part of the data."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int = 0, **_: Any) -> tuple[Any, ...]:
        axis = (axis or 0) % data.ndim
        covered = [slice(None) if place == axis else slice(size) for place, size in enumerate(indices.shape)]
        return (np.take_along_axis(data[tuple(covered)], indices, axis),)


def _filled(given: Sequence[int] | None, count: int) -> list[int]:
    return [0] * count if given is None else list(given)
