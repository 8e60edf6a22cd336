"""`Agreement`: a folded model held against the model, both in float64, at lengths of one's choice."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.lengths import Length, resized_together
from moe_export.export.tracing.trace import quiet
from moe_export.float64 import agree, doubled, in_float64

# A constant that the trace keeps as a float32 tensor is off by 6e-8 of what Python's number is.
_NEAR = 1e-6
_NEAR_FLOAT32 = 1e-4  # for a model that cannot be run in float64


class Agreement:
    """Runs both, and compares.

    Args:
        subject: The model.
        folded: The same without its loops.
        lengths: What was folded over.
    """

    def __init__(self, subject: Subject, folded: Subject, lengths: Sequence[Length]) -> None:
        self._subject, self._folded, self._lengths = subject, folded, lengths
        self._wide: tuple[Subject, Subject] | None = None

    def at(self, sizes: Sequence[int]) -> bool | None:
        """Whether both compute the same at these lengths; None where the model refuses them.

        Raises:
            RuntimeError: The folded model fails there, and why.
        """
        example = resized_together(self._lengths, self._subject.inputs, sizes)
        with quiet(), torch.no_grad():
            wide = {name: doubled(tensor) for name, tensor in example.items()}
            with in_float64():
                pair = [_run(subject, wide) for subject in self._both()]
            if pair[0] is not None and pair[1] is not None:
                return agree(pair[0], pair[1], _NEAR)
            wanted = _run(self._subject, example)
            if wanted is None:
                return None
            try:
                found = self._folded.call_named({name: tensor.clone() for name, tensor in example.items()})
            except Exception as error:
                raise RuntimeError(str(error).splitlines()[0]) from error
        return agree(wanted, found, _NEAR_FLOAT32)

    def same_types(self, sizes: Sequence[int]) -> bool:
        """Whether the outputs have the same types in the model's own precision, at lengths that it takes."""
        example = resized_together(self._lengths, self._subject.inputs, sizes)
        with quiet(), torch.no_grad():
            kinds = [
                [value.dtype for value in _run(each, example) or ()] for each in (self._subject, self._folded)
            ]
        return kinds[0] == kinds[1]

    def _both(self) -> tuple[Subject, Subject]:
        if self._wide is None:
            both = (self._subject, self._folded)
            wide = [subject.of(copy.deepcopy(subject.module).double()) for subject in both]
            self._wide = (wide[0], wide[1])
        return self._wide


def _run(subject: Subject, example: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    try:
        return subject.call_named({name: tensor.clone() for name, tensor in example.items()})
    except Exception:
        return None
