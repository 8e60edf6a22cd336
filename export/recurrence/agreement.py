"""`Agreement`: a folded model compared with its model, both in float64, at any lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.lengths import Length, resized_together
from moe_export.export.tracing.trace import quiet
from moe_export.float64 import agree, double_module, doubled, in_float64

# A trace may keep a Python number as a float32 tensor, which is off by up to 6e-8 of it.
_NEAR = 1e-6
_NEAR_FLOAT32 = 1e-4  # for a model that cannot be run in float64


class Agreement:
    """Runs both models and compares their outputs.

    Args:
        subject: The model.
        folded: The same model with its loops folded.
        lengths: The lengths that were folded over.
    """

    def __init__(self, subject: Subject, folded: Subject, lengths: Sequence[Length]) -> None:
        self._subject, self._folded, self._lengths = subject, folded, lengths
        self._wide: tuple[Subject, Subject] | None = None

    def at(self, sizes: Sequence[int]) -> bool | None:
        """Whether both compute the same at these lengths; None if the model itself fails there.

        Raises:
            RuntimeError: Only the folded model fails there; the first line of its error.
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
        """Whether both have outputs of the same dtypes in the model's own precision, at lengths that it accepts."""
        example = resized_together(self._lengths, self._subject.inputs, sizes)
        with quiet(), torch.no_grad():
            kinds = [
                [value.dtype for value in _run(each, example) or ()] for each in (self._subject, self._folded)
            ]
        return kinds[0] == kinds[1]

    def _both(self) -> tuple[Subject, Subject]:
        if self._wide is None:
            both = (self._subject, self._folded)
            wide = [subject.of(double_module(subject.module)) for subject in both]
            self._wide = (wide[0], wide[1])
        return self._wide


def _run(subject: Subject, example: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    try:
        return subject.call_named({name: tensor.clone() for name, tensor in example.items()})
    except Exception:
        return None
