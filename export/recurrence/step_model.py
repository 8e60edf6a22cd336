"""`StepModel`: the model of one step, and the proof that N of its steps are one run of the model on N.

They are compared in float64, whatever the model's type: a convolution over all steps and one for each step round
differently in float16, and by how much depends on the processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.dims import BATCH, PAST, DimRequest
from moe_export.export.tracing.lengths import Length
from moe_export.float64 import agree, double_module, doubled, in_float64

PROVED = 7
"""How many steps are compared by default."""
_NEAR = 1e-6  # of the largest value: a trace may keep Python numbers as float32 tensors
_NEAR_FLOAT32 = 1e-4  # if an operator does not support float64


@dataclass(frozen=True)
class StepModel:
    """The model of a step.

    Attributes:
        subject: The step: its inputs are the model's, one step long, then `past_*`; its outputs end in `present*`.
        pasts: The names of the states, in order.
        batch: The (input or state, axis) pairs that are the batch.
        past: The (state, axis) pairs that have one entry for each step so far.
    """

    subject: Subject
    pasts: tuple[str, ...]
    batch: tuple[tuple[str, int], ...]
    past: tuple[tuple[str, int], ...] = ()

    def dims(self, request: DimRequest) -> DimRequest:
        """What is free in the step: the number of steps so far, and the batch if that was requested; nothing else."""
        wanted = all(request.wants(*place) for place in self.batch if place[0] not in self.pasts)
        free = dict.fromkeys(self.batch, BATCH) if wanted else {}
        return DimRequest(True, {**free, **dict.fromkeys(self.past, PAST)})


def present_of(past: str) -> str:
    """What a state is called after the step.

    Example:
        >>> present_of("past_state_0"), present_of("past_key_values.0.key")
        ('present_state_0', 'present.0.key')
    """
    _, inside, path = past.partition(".")
    return f"present.{path}" if inside else past.replace("past_", "present_", 1)


def prove_steps(
    subject: Subject, step: Subject, firsts: Mapping[str, Tensor], length: Length, count: int = PROVED
) -> None:
    """Compare steps run one by one with the model run on all of them.

    Before each step, the step is run on other inputs: state that a module keeps between calls is not in a graph, so it
    must not matter.

    Args:
        subject: The model.
        step: Its step.
        firsts: The states before the first step, by name.
        length: The axes of the model's inputs that are the length.
        count: How many steps.

    Raises:
        NotExportableError: They give different values.
    """
    wide = [each.of(double_module(each.module)) for each in (subject, step)]
    wide = [replace(each, inputs={name: doubled(x) for name, x in each.inputs.items()}) for each in wide]
    try:
        with in_float64():
            pairs = _steps(wide[0], wide[1], {name: doubled(x) for name, x in firsts.items()}, length, count)
    except Exception:  # an operator does not support float64
        prove_as_given(subject, step, firsts, length, count)
    else:
        _held(pairs, _NEAR, subject, count)


def prove_as_given(
    subject: Subject, step: Subject, firsts: Mapping[str, Tensor], length: Length, count: int
) -> None:
    """The same in the model's own types; arguments and errors as in `prove_steps`."""
    pairs = _steps(subject, step, firsts, length, count)
    exact = all(tensor.dtype is torch.float64 for tensor in firsts.values() if tensor.is_floating_point())
    _held(pairs, _NEAR if exact else _NEAR_FLOAT32, subject, count)


def _held(pairs: Mapping[str, tuple[Tensor, Tensor]], near: float, subject: Subject, count: int) -> None:
    for name, (whole, steps) in pairs.items():
        if not agree([whole], [steps], near):
            raise NotExportableError(
                f"{name} has no model of a step: {count} steps one by one give something else than all at once",
                code=Code.NO_STEP,
                where=str(subject.source),
                hint="its steps may read each other only through a loop, a causal convolution or a cache; "
                "a mask of all tokens has to be left out of the inputs",
            )


def _steps(
    subject: Subject, step: Subject, firsts: Mapping[str, Tensor], length: Length, count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each output: the model's on all steps, and that of the steps one by one, joined."""
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
        pasts = {past: found[present_of(past)] for past in pasts}
        rows.append(found)
    pairs = {}
    for name, whole in wanted.items():
        last = rows[-1][name]
        axes = [axis for axis in range(whole.dim()) if whole.shape[axis] == count != last.shape[axis]]
        pairs[name] = whole, (torch.cat([row[name] for row in rows], axes[0]) if axes else last)
    return pairs
