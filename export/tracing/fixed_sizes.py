"""What a trace fixed, although it was offered as free: which line did, and whether the model takes other sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import sympy
import torch

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import running_line
from moe_export.export.frontend.subject import Subject
from moe_export.export.torch_compat.sizes import conditions_noted, sizes_fixed
from moe_export.export.tracing.dims import DimRequest, default_name
from moe_export.export.tracing.traced_dims import Shape
from moe_export.export.tracing.widen import accepts


@dataclass(frozen=True)
class Fixed:
    """A dimension that the trace fixed, although it was offered as free.

    Attributes:
        model_takes_others: The model itself runs at another size; only the trace depends on this one.
        name: What the dimension would be called if it were free.
        line: `file:line` of what fixed it, if that is known.
    """

    input: str
    axis: int
    size: int
    model_takes_others: bool

    name: str = ""
    line: str = ""

    def __str__(self) -> str:
        why = "the model takes no other size"
        if self.model_takes_others:
            why = "the trace depends on it: a loop over it was unrolled, or its size became a constant"
            if self.size == 1:
                why = "a size of 1 is broadcast, and was not widened"
        name = f"{self.name}, " if self.name else ""
        by = f" by {self.line}" if self.line else ""
        said = f"{self.input}: length {self.size} is fixed{by} ({name}dimension {self.axis}): {why}"
        return Code.FIXED_SIZE.mark(said) if self.model_takes_others else said


@contextmanager
def lines_noted(fixing: dict[tuple[int, int], str], reasons: dict[sympy.Basic, str]) -> Iterator[None]:
    """While a trace runs, note the line of the model that is running; the first one that did it is the reason.

    Args:
        fixing: Is given what fixed a size, by the number of the input and the axis.
        reasons: Is given what a condition on sizes comes from, by condition.
    """

    def note_fixed(place: int, axis: int) -> None:
        line = running_line()
        if line is not None:
            fixing.setdefault((place, axis), line)

    def note_condition(condition: sympy.Basic) -> None:
        if condition not in reasons:
            reasons[condition] = running_line() or ""

    with sizes_fixed(note_fixed), conditions_noted(note_condition):
        yield


def fixed_sizes(
    subject: Subject,
    example: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Shape],
    request: DimRequest,
    fixing: Mapping[tuple[int, int], str],
) -> tuple[Fixed, ...]:
    """What was offered and came back fixed; the model itself is asked whether it takes another size there."""
    result = []
    for place, (name, shape) in enumerate(inputs.items()):
        for axis, size in enumerate(shape):
            if isinstance(size, int) and request.wants(name, axis):
                others = _takes_other_size(subject, example, name, axis)
                called, line = default_name(example[name], axis, name), fixing.get((place, axis), "")
                result.append(Fixed(name, axis, size, others, called, line))
    return tuple(result)


def _takes_other_size(subject: Subject, example: Mapping[str, torch.Tensor], name: str, axis: int) -> bool:
    """Whether the model runs with one more along this axis, or with twice as many, where it takes whole chunks.

    In this input alone, or in all that share the size. Twice the width of a row says nothing: `x.view(-1, 32)` makes
    two rows of it.
    """
    size = example[name].shape[axis]
    is_width = axis >= 2 and default_name(example[name], axis, name) == f"{name}_dim{axis}"
    for other in (size + 1,) if is_width else (size + 1, 2 * size):
        for names in ([name], list(example)):
            alike = [key for key in names if example[key].dim() > axis and example[key].shape[axis] == size]
            if size and accepts(
                subject, resized(example, dict.fromkeys(((key, axis) for key in alike), other))
            ):
                return True
    return False


def resized(
    example: Mapping[str, torch.Tensor], sizes: Mapping[tuple[str, int], int]
) -> dict[str, torch.Tensor]:
    """The example with other sizes: cut off, or repeated from the start."""
    result = dict(example)
    for (name, axis), size in sizes.items():
        index = torch.arange(size, device=result[name].device) % result[name].shape[axis]
        result[name] = result[name].index_select(axis, index)
    return result


def require_picked(
    inputs: Mapping[str, Shape],
    request: DimRequest,
    fixing: Mapping[tuple[int, int], str],
    reason: str | None,
) -> None:
    """Refuse a trace that fixed a dimension which the user picked by name.

    Args:
        inputs: The traced shapes.
        request: What the user picked.
        fixing: The lines that fixed sizes, by the number of the input and the axis.
        reason: Why fewer dimensions are free than were asked for.

    Raises:
        NotExportableError: It did.
    """
    for name, axis in request.picked:
        size = inputs[name][axis]
        if isinstance(size, int):
            raise NotExportableError(
                f"dimension {axis} of {name} cannot be dynamic: it is fixed at {size} by the model"
                + (f" ({reason})" if reason else ""),
                code=Code.FIXED_SIZE,
                where=fixing.get((list(inputs).index(name), axis)),
                hint=_partners(inputs, request, name, axis)
                or "a Python loop over it, or a size that became a constant, fixes a dimension; "
                f"leave --dynamic {name}:{axis} away to export it fixed",
            )


def _partners(inputs: Mapping[str, Shape], request: DimRequest, name: str, axis: int) -> str | None:
    """What to ask for, if others of the same size are fixed because nobody named them: they may have to be equal."""
    size = inputs[name][axis]
    alike = [
        f"{other}:{place}"
        for other, shape in inputs.items()
        for place, each in enumerate(shape)
        if each == size and other != name and not request.wants(other, place)
    ]
    if not alike:
        return None
    wanted = " ".join(f"--dynamic {each}=n" for each in (f"{name}:{axis}", *alike))
    return f"{' and '.join(alike)} of the same size {'is' if len(alike) == 1 else 'are'} fixed, too; try {wanted}"
