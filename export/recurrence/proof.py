"""`prove`: a folded model against the model, in PyTorch, before any ONNX is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_export.export.recurrence.lengths import Length, resized_together
from moe_export.export.recurrence.skeleton import LengthError
from moe_export.export.subject import Subject
from moe_export.export.tracing import quiet

_PROVED = (1, 2, 3, 5, 13)


def prove(
    subject: Subject,
    folded: Subject,
    lengths: Sequence[Length],
    traced: Sequence[tuple[int, ...]],
    *,
    rounded: bool,
) -> None:
    """Hold the folded model against the model, in PyTorch, at lengths that were not traced too.

    Where a turn takes several places, what is left over behind whole turns is `rounded` away or filled up: there it
    is looked at with up to eight places left.

    Raises:
        LengthError: It fails, or gives other values.
    """
    longest = max(traced)
    further = [tuple(size + more for size in longest) for more in (range(9, 17) if rounded else (9,))]
    for sizes in (*_proved(len(lengths)), *traced, *further):
        example = resized_together(lengths, subject.inputs, sizes)
        shown = "x".join(map(str, sizes))
        with quiet(), torch.no_grad():
            try:
                wanted = subject.call_named({name: tensor.clone() for name, tensor in example.items()})
            except Exception:
                continue
            try:
                found = folded.call_named(example)
            except Exception as error:
                reason = str(error).splitlines()[0]
                raise LengthError(f"without the loop it fails at length {shown}: {reason}", None) from error
        if not all(_close(a, b) for a, b in zip(wanted, found, strict=True)):
            raise LengthError(
                f"what it computes depends on the length in another way at length {shown}", None
            )


def _proved(count: int) -> list[tuple[int, ...]]:
    """Sizes of each length, the second of two growing while the first gets shorter."""
    if count == 1:
        return [(size,) for size in _PROVED]
    return [(1, 1), *zip(_PROVED, reversed(_PROVED), strict=True)]


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.allclose(left, right, rtol=1e-4, atol=1e-5, equal_nan=True)
