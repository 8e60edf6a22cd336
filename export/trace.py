"""`trace`: a `Subject` becomes a `Traced`, an `ExportedProgram` whose free dimensions are symbols.

Every dimension is offered to `torch.export` as free (`Dim.AUTO`); what it fixes, the model's code fixes, and the
report says so. An example of size 1 would be taken for a constant, so it is widened to 2 first where the model
takes that.

Source: https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import Dim as TorchDim
from torch.export import ExportedProgram

from moe_export.errors import NotExportableError
from moe_export.export.dims import Dim, DimRequest, default_name
from moe_export.export.idioms import traceable_idioms, user_lines
from moe_export.export.leaves import unique
from moe_export.export.source import last_user_line
from moe_export.export.subject import Subject

Shape = tuple[int | str, ...]
SCOPE = "model"  # the attribute of `_Flat` that holds the user's module: the root of every module path


@dataclass(frozen=True)
class Fixed:
    """A dimension that the trace fixed, although it was offered as free.

    Attributes:
        model_takes_others: The model itself runs at another size; only the trace depends on this one.
    """

    input: str
    axis: int
    size: int
    model_takes_others: bool

    def __str__(self) -> str:
        why = (
            "the trace depends on it: a loop over it was unrolled, or its size became a constant"
            if self.model_takes_others
            else "the model takes no other size"
        )
        return f"{self.input}: length {self.size} is fixed (dimension {self.axis}): {why}"


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        program: Inputs are flat, in the order of `inputs`; so are the outputs, in the order of `outputs`.
        inputs: Shape of each input: sizes, names of dynamic dimensions, or expressions of them (`2*batch`).
        dims: The dynamic dimensions.
        fixed: Dimensions that were offered as free and came back fixed.
        scope: Module path of the model inside the program, which every module path begins with.
    """

    program: ExportedProgram
    inputs: Mapping[str, Shape]
    example: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    dims: tuple[Dim, ...]
    fixed: tuple[Fixed, ...]
    scope: str = SCOPE

    def dim_names(self) -> dict[str, str]:
        """The tracer's symbol → the dimension's name."""
        return {dim.symbol: dim.name for dim in self.dims}


class _Flat(nn.Module):
    """The subject with tensors in and tensors out, so that the program has neither constants nor nesting."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model = subject.module
        self._call = subject.call

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._call(inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's and the exporter's notices to themselves: what matters is raised or checked."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(subject: Subject, request: DimRequest | None = None) -> Traced:
    """Trace the subject with every wanted dimension free.

    Args:
        subject: The model and its example inputs.
        request: Which dimensions to leave free, and their names; default: all of them.

    Raises:
        NotExportableError: `torch.export` cannot trace the model at all, or a dimension that the user picked by
            name cannot be free.
    """
    request = request or DimRequest()
    example = _widened(subject, request)
    program, offered = _export(subject, example, request)
    dims, inputs = _read_dims(program, example, request)
    traced = Traced(
        program, inputs, example, subject.outputs, dims, _fixed(subject, example, inputs, request)
    )
    _require_picked(traced, request, offered)
    return traced


def _export(
    subject: Subject, example: Mapping[str, torch.Tensor], request: DimRequest
) -> tuple[ExportedProgram, str | None]:
    """Export with as many free dimensions as the tracer takes; the second value says why it took fewer."""
    first: Exception | None = None
    for limit in (None, 2, 1, 0):
        spec = tuple(
            tuple(
                TorchDim.AUTO if request.wants(name, axis) and (limit is None or axis < limit) else None
                for axis in range(tensor.dim())
            )
            for name, tensor in example.items()
        )
        try:
            # With opt_einsum, torch.einsum compares sizes to choose a path, which would fix them; the path is
            # chosen later, by the einsum rewriting.
            with (
                quiet(),
                torch.no_grad(),
                torch.backends.opt_einsum.flags(enabled=False),
                traceable_idioms(),
                user_lines(),
            ):
                program = torch.export.export(
                    _Flat(subject).eval(),
                    tuple(tensor.clone() for tensor in example.values()),
                    dynamic_shapes={"inputs": spec},
                    strict=False,
                ).run_decompositions({})  # in-place operators become functional ones; nothing else changes
        except Exception as error:
            first = first or error
            continue
        return program, _first_line(first) if first else None
    assert first is not None
    raise NotExportableError(
        f"torch.export cannot trace {type(subject.module).__name__}: {_first_line(first)}",
        where=last_user_line(first) or str(subject.source),
        hint="control flow that depends on the values of tensors cannot be traced; "
        "write it with torch.where, masks, or a loop over all experts",
    ) from first


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _widened(subject: Subject, request: DimRequest) -> dict[str, torch.Tensor]:
    """The example inputs with dimensions of size 1 doubled, as far as the model takes that.

    The first dimensions of all inputs are the likely batch, and are widened together; the others one by one.
    """
    example = dict(subject.inputs)
    ones = [
        (name, axis)
        for name, tensor in example.items()
        for axis, size in enumerate(tensor.shape)
        if size == 1 and request.wants(name, axis)
    ]
    batch = [key for key in ones if key[1] == 0]
    groups = ([batch] if len(batch) > 1 else []) + [[key] for key in ones]
    done: set[tuple[str, int]] = set()
    for group in groups:
        if done.issuperset(group):
            continue
        trial = dict(example)
        for name, axis in group:
            trial[name] = trial[name].repeat_interleave(2, dim=axis)
        if _accepts(subject, trial):
            example = trial
            done |= set(group)
    return example


def _accepts(subject: Subject, tensors: Mapping[str, torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            subject.call([tensor.clone() for tensor in tensors.values()])
    except Exception:
        return False
    return True


def _read_dims(
    program: ExportedProgram, example: Mapping[str, torch.Tensor], request: DimRequest
) -> tuple[tuple[Dim, ...], dict[str, Shape]]:
    """The symbols among the input shapes, named; and each input's shape in those names."""
    user_inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user_inputs]
    shapes = {name: node.meta["val"].shape for name, node in zip(example, nodes, strict=True)}
    found: dict[str, tuple[str, int]] = {}  # symbol → its name, its traced size
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            symbol = str(size)
            if isinstance(size, torch.SymInt) and symbol.isidentifier():
                wanted = request.picked.get((name, axis))
                if symbol not in found or wanted is not None:
                    label = wanted or default_name(example[name], axis, name)
                    if wanted is None and any(label == other for other, _ in found.values()):
                        label = f"{name}_{label}" if not label.startswith(name) else label
                    found[symbol] = (label, example[name].shape[axis])
    names = dict(zip(found, unique([label for label, _ in found.values()]), strict=True))
    limits = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    dims = tuple(
        Dim(names[symbol], symbol, size, *_bounds(limits.get(symbol))) for symbol, (_, size) in found.items()
    )
    inputs = {name: tuple(_readable(size, names) for size in shape) for name, shape in shapes.items()}
    return dims, inputs


def _readable(size: int | torch.SymInt, names: Mapping[str, str]) -> int | str:
    text = str(size)
    return int(text) if text.isdigit() else rename(text, names)


def rename(expression: str, names: Mapping[str, str]) -> str:
    """Put names for the tracer's symbols into an expression: `2*s77` → `2*batch`."""
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), expression)


def _bounds(limits: object) -> tuple[int, int | None]:
    """Lower and upper bound as integers. The tracer's "at least 2" only means "not specialised": 1 is tried."""
    lower, upper = getattr(limits, "lower", None), getattr(limits, "upper", None)
    low = int(lower) if lower is not None and str(lower).isdigit() else 1
    high = int(upper) if upper is not None and str(upper).isdigit() else None
    return (1 if low == 2 else low), (None if high is not None and high > 2**40 else high)


def _fixed(
    subject: Subject, example: Mapping[str, torch.Tensor], inputs: Mapping[str, Shape], request: DimRequest
) -> tuple[Fixed, ...]:
    """What was offered and came back fixed; the model itself is asked whether it takes another size there."""
    result = []
    for name, shape in inputs.items():
        for axis, size in enumerate(shape):
            if isinstance(size, int) and request.wants(name, axis):
                result.append(Fixed(name, axis, size, _takes_other_size(subject, example, name, axis)))
    return tuple(result)


def _takes_other_size(subject: Subject, example: Mapping[str, torch.Tensor], name: str, axis: int) -> bool:
    """Whether the model runs with one more along this axis, in this input alone or in all that share the size."""
    size = example[name].shape[axis]
    for names in ([name], list(example)):
        trial = {
            key: torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
            if key in names and tensor.dim() > axis and tensor.shape[axis] == size and size
            else tensor
            for key, tensor in example.items()
        }
        if _accepts(subject, trial):
            return True
    return False


def _require_picked(traced: Traced, request: DimRequest, reason: str | None) -> None:
    for name, axis in request.picked:
        size = traced.inputs[name][axis]
        if isinstance(size, int):
            raise NotExportableError(
                f"dimension {axis} of {name} cannot be dynamic: it is fixed at {size} by the model"
                + (f" ({reason})" if reason else ""),
                hint="a Python loop over it, or a size that became a constant, fixes a dimension; "
                f"leave --dynamic {name}:{axis} away to export it fixed",
            )
