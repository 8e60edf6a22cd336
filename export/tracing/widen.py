"""Example dimensions of size 1, which the tracer would take for constants, are made 2 where the model takes that."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.dims import DimRequest

AxisRef = tuple[str, int]  # an input, and an axis of it


def widened(subject: Subject, request: DimRequest) -> dict[str, torch.Tensor]:
    """The example inputs with dimensions of size 1 doubled, as far as the model takes that.

    What stands at the same axis of several inputs is likely the same thing, a batch or a length, and is widened
    together; what is left, one by one. The model must take 3 as well as 2: where it takes only one of them, the
    1 is broadcast over something of that size and must stay.
    """
    example = dict(subject.inputs)
    for group in _groups(example, request):
        if any(example[name].shape[axis] != 1 for name, axis in group):
            continue
        if all(accepts(subject, _repeated(example, group, count)) for count in (2, 3)):
            example = _repeated(example, group, 2)
    return example


def _groups(example: Mapping[str, torch.Tensor], request: DimRequest) -> list[list[AxisRef]]:
    """Sets of dimensions of size 1 to widen together, the likeliest first."""
    ones = [
        (name, axis)
        for name, tensor in example.items()
        for axis, size in enumerate(tensor.shape)
        if size == 1 and request.wants(name, axis)
    ]
    together = [[one for one in ones if one[1] == axis] for axis in sorted({axis for _, axis in ones})]
    return [group for group in together if len(group) > 1] + [[one] for one in ones]


def _repeated(
    example: Mapping[str, torch.Tensor], group: list[AxisRef], count: int
) -> dict[str, torch.Tensor]:
    trial = dict(example)
    for name, axis in group:
        trial[name] = trial[name].repeat_interleave(count, dim=axis)
    return trial


def accepts(subject: Subject, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model runs on these inputs."""
    try:
        with torch.no_grad():
            subject.call([tensor.clone() for tensor in tensors.values()])
    except Exception:
        return False
    return True
