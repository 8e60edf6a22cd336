"""Which dimensions a model loops over in Python, found by running it: more length, more operators.

Nothing is traced for this, so it costs little however long the example is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_export.export.frontend.subject import Subject
from moe_export.export.torch_compat.dispatch import OperatorMode
from moe_export.export.tracing.dims import DimRequest

Example = Mapping[str, torch.Tensor]

# Evenly apart, and multiples of the usual strides and chunks, so that every loop over the length takes as many more
# iterations from the first to the second as from the second to the third.
_TRIALS = ((12, 24, 36), (64, 128, 192))

_APART = (6, 12)

_LONGEST_LOOK = 200  # three chunks of 64
_ITERATIONS_OF_ONE = 6  # more operators at each of so many sizes are those of a loop place by place

_SHORT = (16, 64)  # what a long example is cut down to: the first that the model takes


@dataclass(frozen=True)
class Length:
    """A length that a model loops over: axes of inputs that have it together."""

    axes: tuple[tuple[str, int], ...]

    def resized(self, example: Example, size: int) -> dict[str, torch.Tensor]:
        """The example at another length: cut off, or repeated from the start."""
        result = dict(example)
        for name, axis in self.axes:
            tensor = result[name]
            index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
            result[name] = tensor.index_select(axis, index)
        return result

    def of(self, example: Example) -> int:
        """Its size in an example."""
        name, axis = self.axes[0]
        return example[name].shape[axis]


def resized_together(
    lengths: Sequence[Length], example: Example, sizes: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The example at other lengths, one size for each."""
    for length, size in zip(lengths, sizes, strict=True):
        example = length.resized(example, size)
    return dict(example)


class OperatorCount(OperatorMode):
    """Counts the operators that run while it is entered, as `operators`."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: int = 0

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        self.operators += 1
        return result


def operators(subject: Subject, example: Example) -> int | None:
    """How many operators the model runs on an example; None if it refuses it."""
    count = OperatorCount()
    with torch.no_grad(), count:
        try:
            subject.call([example[name].clone() for name in subject.inputs])
        except Exception:
            return None
    return count.operators


def looped_lengths(subject: Subject, request: DimRequest) -> list[Length]:
    """The lengths for which the model runs more operators the longer they are, evenly."""
    subject = replace(subject, inputs=_shortened(subject))
    found: list[Length] = []
    seen: set[tuple[str, int]] = set()
    for name, tensor in subject.inputs.items():
        for axis in range(tensor.dim()):
            if (name, axis) in seen or not tensor.shape[axis]:
                continue
            length, grows = _of_axis(subject, request, name, axis)
            if length is not None:
                seen |= set(length.axes)
                if grows:
                    found.append(length)
    return found


def looped_apart(subject: Subject, first: Length, second: Length) -> bool:
    """Whether no loop runs over both: more of the one costs the same whatever the other is, as in a decoder."""
    example = _shortened(subject)
    counts = [
        operators(subject, resized_together((first, second), example, sizes))
        for sizes in itertools.product(_APART, repeat=2)
    ]
    if None in counts:
        return False
    both_short, long_second, long_first, both_long = (count or 0 for count in counts)
    return both_long - long_first == long_second - both_short


def chunk_of(subject: Subject, length: Length) -> int | None:
    """How many places per iteration of the loop takes, if more than one: after as many, operators are added again."""
    added = list[bool]()  # from the first size on at which there are more than at the one before
    before: int | None = None
    for size in range(1, _LONGEST_LOOK):
        count = operators(subject, length.resized(subject.inputs, size))
        if added or (count is not None and before is not None and count > before):
            added.append(count is not None and before is not None and count > before)
        before = before if count is None else count
        if all(added) and len(added) >= _ITERATIONS_OF_ONE:
            return None
        # What is added first may be no iteration: a single place needs no copy, so that two run more than one.
        later = added.index(True, 1) if True in added[1:] else 0
        for one in (added, added[later:]):
            for chunk in range(2, (len(one) + 1) // 2):
                if one[chunk:] == one[:-chunk] and not all(one):
                    return chunk
    return None


def _shortened(subject: Subject) -> Example:
    """The example with every long length cut down, so that looking at the other axes takes no longer for it."""
    example = subject.inputs
    for name, axis in [(key, at) for key, tensor in example.items() for at in range(tensor.dim())]:
        for size in _SHORT:
            if example[name].shape[axis] <= size:
                break
            lengths = reversed(list(_together(example, name, axis)))
            shorter = [length.resized(example, size) for length in lengths]
            taken = next((one for one in shorter if operators(subject, one) is not None), None)
            if taken is not None:
                example = taken
                break
    return example


def _of_axis(subject: Subject, request: DimRequest, name: str, axis: int) -> tuple[Length | None, bool]:
    """The length that an axis is part of, and whether the operators grow with it; None if it can only be as it is.

    Axes that the model takes shorter, but not longer, are part of a length that others have too: a loop over one of
    them reads a part of the others.
    """
    first: tuple[Length | None, bool] = (None, False)
    for length in _together(subject.inputs, name, axis):
        if not all(request.wants(*place) for place in length.axes):
            continue
        grows = _grows(subject, length)
        if grows is None:
            continue
        size = length.of(subject.inputs)
        longer = length.resized(subject.inputs, 2 * size)
        if operators(subject, longer) is not None:
            return length, grows
        first = first if first[0] is not None else (length, grows)
    return first


def _together(example: Example, name: str, axis: int) -> Iterator[Length]:
    """An axis alone, with the same axis of all inputs that share its size, and with all axes of its size."""
    size = example[name].shape[axis]
    places = [(key, at) for key, tensor in example.items() for at in range(tensor.dim())]
    same = [(key, at) for key, at in places if example[key].shape[at] == size]
    options: Sequence[list[tuple[str, int]]] = (
        [(name, axis)], [place for place in same if place[1] == axis], same
    )  # fmt: skip
    for option in dict.fromkeys(tuple(option) for option in options):
        yield Length(option)


def _grows(subject: Subject, length: Length) -> bool | None:
    """Whether the operators grow with this length; None if the model takes no other."""
    taken = False
    for sizes in _TRIALS:
        counts = [operators(subject, length.resized(subject.inputs, size)) for size in sizes]
        if None in counts:
            continue
        taken = True
        first, second, third = (count or 0 for count in counts)
        if third - second == second - first > 0:
            return True
        if sizes[0] > length.of(subject.inputs):
            break  # a model that is shown at 10 is not looked at in chunks of 64
    return False if taken else None
