"""`StepModel`: the model of one step, and the proof that N of its steps are one run of the model on N."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_export.errors import NotExportableError
from moe_export.export.dims import DimRequest
from moe_export.export.recurrence.lengths import Length
from moe_export.export.subject import Subject

PROVED = 7  # steps


@dataclass(frozen=True)
class StepModel:
    """The model of a step.

    Attributes:
        subject: Its inputs are those of the model, one step long, then `past_*`; its outputs end in `present_*`.
        pasts: The names of the states, in order.
        batch: The axes of inputs and states that are the batch.
        past: The axes of states that have an entry a step so far.
    """

    subject: Subject
    pasts: tuple[str, ...]
    batch: tuple[tuple[str, int], ...]
    past: tuple[tuple[str, int], ...] = ()

    def dims(self, request: DimRequest) -> DimRequest:
        """The batch free, if it is to be, and how many steps there were; everything else is as long as a step."""
        wanted = all(request.wants(*place) for place in self.batch if place[0] not in self.pasts)
        free = dict.fromkeys(self.batch, "batch") if wanted else {}
        return DimRequest(True, {**free, **dict.fromkeys(self.past, "past")})


def prove_steps(
    subject: Subject, step: Subject, firsts: Mapping[str, Tensor], length: Length, count: int = PROVED
) -> None:
    """Run the steps one by one, against the model on all of them.

    Before each one the step is run on other inputs: what a module keeps to itself between calls is not in a graph.

    Args:
        subject: The model.
        step: Its step.
        firsts: What the states are before the first step, by name.
        length: The axes of the model's inputs that are the length.
        count: How many steps.

    Raises:
        NotExportableError: They give something else.
    """
    example = length.resized(subject.inputs, count)
    wanted = dict(zip(subject.outputs, subject.call_named(example), strict=True))
    pasts = {name: first.clone() for name, first in firsts.items()}
    rows: list[dict[str, Tensor]] = []
    for place in range(count):
        now = dict(example)
        for name, axis in length.axes:
            now[name] = example[name].narrow(axis, place, 1)
        step.call_named({name: tensor.flip(0).roll(1, -1) for name, tensor in {**now, **pasts}.items()})
        found = dict(zip(step.outputs, step.call_named({**now, **pasts}), strict=True))
        pasts = {past: found[past.replace("past_", "present_", 1)] for past in pasts}
        rows.append(found)
    for name, whole in wanted.items():
        last = rows[-1][name]
        axes = [axis for axis in range(whole.dim()) if whole.shape[axis] == count != last.shape[axis]]
        steps = torch.cat([row[name] for row in rows], axes[0]) if axes else last
        if steps.shape != whole.shape or not torch.allclose(steps, whole, rtol=1e-4, atol=1e-5):
            raise NotExportableError(
                f"{name} has no model of a step: {count} steps one by one give something else than all at once",
                where=str(subject.source),
                hint="it reads other steps than through a loop, a causal convolution or a cache, "
                "or takes a mask of all tokens, which is no input of one: leave that out",
            )
