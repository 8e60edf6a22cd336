"""`read_dims`: the symbols among the shapes of a trace's inputs, with the names of their dimensions."""

from __future__ import annotations

import re
from collections.abc import Mapping

import sympy
import torch
from torch.export import ExportedProgram

from moe_export.export.frontend.pytree import identifier, unique
from moe_export.export.tracing.dims import Dim, DimRequest, default_name, twin_of

Shape = tuple[int | str, ...]


def read_dims(
    program: ExportedProgram, example: Mapping[str, torch.Tensor], request: DimRequest
) -> tuple[tuple[Dim, ...], dict[str, Shape]]:
    """The symbols among the input shapes, named; and each input's shape in those names."""
    user_inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user_inputs]
    shapes = {name: node.meta["val"].shape for name, node in zip(example, nodes, strict=True)}
    found: dict[str, tuple[str, int]] = {}  # symbol → its name, its traced size
    same: dict[str, str] = {}  # symbol of a further batch, or of a mask's length → symbol of the first
    where: dict[str, str] = {}  # symbol → the input that has it
    asked: dict[str, tuple[str, int]] = {}  # symbol → the name that the user gives it, its traced size
    for name, shape in shapes.items():
        free = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]
        for axis, size in enumerate(shape):
            symbol = str(size)
            if isinstance(size, torch.SymInt) and symbol.isidentifier():
                wanted = request.picked.get((name, axis))
                if (symbol not in found and symbol not in same) or wanted is not None:
                    label = wanted or default_name(example[name], axis, name, free)
                    traced = example[name].shape[axis]
                    if wanted is None:  # the model does not say so, and still means one batch
                        twin = twin_of(name, label, traced, found, where, example)
                    else:  # what the user gives one name is one dimension
                        twin = next(
                            (other for other, known in asked.items() if known == (label, traced)), None
                        )
                        asked.setdefault(symbol, (label, traced))
                    if twin is not None and symbol not in found:
                        same[symbol] = twin
                        continue
                    if wanted is None and any(label == other for other, _ in found.values()):
                        label = _of_input(label, identifier(name))
                    found[symbol], where[symbol] = (label, traced), name
    names = dict(zip(found, unique([label for label, _ in found.values()]), strict=True))
    names |= {symbol: names[twin] for symbol, twin in same.items()}
    limits = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    dims = tuple(
        Dim(
            names[symbol],
            symbol,
            size,
            *_bounds(limits.get(symbol)),
            also=tuple(key for key, twin in same.items() if twin == symbol),
        )
        for symbol, (_, size) in found.items()
    )
    inputs = {name: tuple(_readable(size, names) for size in shape) for name, shape in shapes.items()}
    return dims, inputs


def _of_input(label: str, name: str) -> str:
    """A dimension's name that says whose it is."""
    return label if label.startswith(name) else f"{name}_{label}"


def _readable(size: int | torch.SymInt, names: Mapping[str, str]) -> int | str:
    text = str(size)
    return int(text) if text.isdigit() else ordered_sum(rename(text, names))


def rename(expression: str, names: Mapping[str, str]) -> str:
    """Put names for the tracer's symbols into an expression: `2*s77` → `2*batch`."""
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), expression)


def ordered_sum(text: str) -> str:
    """A sum in one order, whichever of two equal symbols the tracer wrote.

    Example:
        >>> ordered_sum("sequence + past_sequence")
        'past_sequence + sequence'
    """
    terms = text.split(" + ")
    if any("(" in term or " " in term for term in terms):
        return text
    return " + ".join(sorted(terms, key=lambda term: (term.isdigit(), term)))


def _bounds(limits: object) -> tuple[int, int | None]:
    """Lower and upper bound as integers. The tracer's "at least 2" only means "not specialised": 1 is tried."""
    lower, upper = getattr(limits, "lower", None), getattr(limits, "upper", None)
    low = int(lower) if isinstance(lower, (int, sympy.Integer)) and lower >= 0 else 1
    high = int(upper) if isinstance(upper, (int, sympy.Integer)) and upper >= 0 else None
    return (1 if low == 2 else low), (None if high is not None and high > 2**40 else high)
