"""Dynamic dimensions: which ones the user asks for, what the trace leaves free, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moe_export.domain import Condition
from moe_export.errors import UsageError
from moe_export.export.frontend.pytree import KEY, VALUE, identifier
from moe_export.export.frontend.subject import Subject

BATCH = "batch"
SEQUENCE = "sequence"
PAST = "past_sequence"
TOTAL = "total_sequence"
"""Earlier and new tokens, where a trace does not say that it is a sum: the mask of a decoder."""
_CACHES = {"past", "cache", "caches", "kv"}
_MASKS = {"mask", "bias"}
_REQUEST = re.compile(r"(?P<input>[^:=]+(?::[^:=]+)*):(?P<axis>\d+)(?:=(?P<name>[A-Za-z_]\w*))?$", re.ASCII)


@dataclass(frozen=True)
class DimRequest:
    """What the user says of dimensions.

    Attributes:
        static: Fix every dimension that is not picked.
        picked: `(input, axis)` → the name, or None for the default name.
        fixed: `(input, axis)` that must not be free, since an earlier trace took its size for a number.
    """

    static: bool = False
    picked: Mapping[tuple[str, int], str | None] = field(default_factory=dict)
    fixed: frozenset[tuple[str, int]] = frozenset()

    def wants(self, name: str, axis: int) -> bool:
        return (name, axis) not in self.fixed and (not self.static or (name, axis) in self.picked)


def parse_dynamic(items: Sequence[str], static: bool, inputs: Mapping[str, torch.Tensor]) -> DimRequest:
    """`--dynamic x:1=sequence` (repeatable, or separated by commas) and `--static`.

    Raises:
        UsageError: No such input or axis, or the text is not `input:axis=name`.
    """
    picked: dict[tuple[str, int], str | None] = {}
    for item in (part for text in items for part in text.split(",")):
        match = _REQUEST.match(item.strip())
        if match is None:
            raise UsageError(
                f"--dynamic {item!r} is not input:axis=name", hint="for example: --dynamic x:1=sequence"
            )
        name, axis = match["input"], int(match["axis"])
        if name not in inputs:
            raise UsageError(
                f"--dynamic {item!r}: no input {name!r}", hint=f"the inputs: {', '.join(inputs)}"
            )
        if axis >= inputs[name].dim():
            raise UsageError(
                f"--dynamic {item!r}: {name} has {inputs[name].dim()} dimensions, counted from 0",
                hint=f"its shape is {tuple(inputs[name].shape)}",
            )
        picked[name, axis] = match["name"]
    return DimRequest(static, picked)


def requested(subject: Subject, items: Sequence[str], static: bool) -> DimRequest:
    """What the command says of a model's dimensions, or else the user's own export call; errors as `parse_dynamic`."""
    if subject.free is not None and not items and not static:
        return DimRequest(static=True, picked=subject.free)
    return parse_dynamic(items, static, subject.inputs)


@dataclass(frozen=True)
class Dim:
    """A dimension that may change at run time.

    Attributes:
        name: As it stands in the graph, `batch`.
        symbol: The tracer's name for it, `s77`.
        traced: Its size in the trace.
        minimum, maximum: The sizes that the trace is valid for; None is no limit.
        also: Further symbols for the same dimension: the batch of other inputs, the length of a mask or of further
            layers of a cache, of the same example size.
    """

    name: str
    symbol: str
    traced: int
    minimum: int
    maximum: int | None
    also: tuple[str, ...] = ()


def limits_of(dims: Sequence[Dim], conditions: Sequence[Condition]) -> list[str]:
    """What a graph does not hold for, in words: `sequence 1..64`, `batch*sequence <= 256`; nothing for what is free.

    Example:
        >>> batch, sequence = Dim("batch", "s0", 2, 1, None), Dim("sequence", "s1", 10, 1, 64)
        >>> limits_of([batch, sequence], [Condition("batch*sequence <= 256")])
        ['sequence 1..64', 'batch*sequence <= 256']
    """
    bounds = [
        f"{dim.name} {dim.minimum}..{'' if dim.maximum is None else dim.maximum}"
        for dim in dims
        if dim.minimum > 1 or dim.maximum is not None
    ]
    return [*bounds, *map(str, conditions)]


def default_name(
    tensor: torch.Tensor, axis: int, input_name: str, free: Collection[int] | None = None
) -> str:
    """The field's word for a dimension: batch, sequence, past_sequence, height, width; else the input and the axis.

    Args:
        tensor: The input.
        axis: Of it.
        input_name: Its name, which says whether it is a cache or a mask.
        free: The axes that may change, among which a cache has one that grows, and a picture two; default: all.

    Example:
        >>> default_name(torch.zeros(2, 10, 512), 1, "x")
        'sequence'
        >>> default_name(torch.zeros(2, 8, 10, 64), 2, "past_key_values.0.key")
        'past_sequence'
    """
    rank = tensor.dim()
    if axis == 0:
        return BATCH
    axes = set(range(rank)) if free is None else set(free)
    other = f"{identifier(input_name)}_dim{axis}"
    if is_cache_name(input_name, rank):
        return PAST if axis == _growing(axes - {0}) else other
    words = set(re.split(r"[._]", input_name))
    if rank == 4 and axis >= 2 and {2, 3} <= axes and tensor.is_floating_point() and not words & _MASKS:
        return ("height", "width")[axis - 2]
    if axis == 1 and (rank == 3 or (rank == 2 and not tensor.is_floating_point())):
        return SEQUENCE
    return other


def is_cache_name(name: str, rank: int) -> bool:
    """Whether an input holds what earlier steps left behind, by what it is called."""
    *_, last = name.split(".")
    return bool(_CACHES & set(re.split(r"[._]", name))) or (rank == 4 and last in (KEY, VALUE))


def _growing(free: Collection[int]) -> int | None:
    """The axis along which a cache grows: the third of (batch, heads, length, width), if it may change."""
    return 2 if 2 in free else min(free, default=None)


def is_mask(tensor: torch.Tensor) -> bool:
    """Whether an input says which tokens count: (batch, sequence) of bool, or of integers that are 0 or 1."""
    if tensor.dim() != 2 or tensor.is_floating_point() or tensor.is_complex():
        return False
    return tensor.dtype is torch.bool or bool(((tensor == 0) | (tensor == 1)).all())


def twin_of(
    name: str,
    label: str,
    traced: int,
    found: dict[str, tuple[str, int]],
    where: Mapping[str, str],
    example: Mapping[str, torch.Tensor],
) -> str | None:
    """The symbol that a dimension is meant to equal: the batch, the length of a cache, or of what a mask is for."""
    if label in (BATCH, PAST):
        return next((symbol for symbol, known in found.items() if known == (label, traced)), None)
    if label != SEQUENCE:
        return None
    return next(
        (
            symbol
            for symbol, (other, size) in reversed(found.items())
            if size == traced
            and other in (SEQUENCE, f"{where[symbol]}_{SEQUENCE}")
            and (is_mask(example[name]) or is_mask(example[where[symbol]]))
        ),
        None,
    )
