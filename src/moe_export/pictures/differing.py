"""The differences between two graphs: nodes of each operator, weights, FLOPs, memory, inputs and outputs, value names.

Both are measured at the same sizes: where one leaves a size free that the other fixes, the fixed size is used. Inputs
are matched by name, or by position where the names differ. Graphs are counted with their functions inlined; a node in
the body of a loop counts once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import onnx
import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.engines.graph_file import read_graph
from moe_export.export.engines.profiles import complete_ranges, free_dims, input_shapes
from moe_export.pictures.sketch import Sketch, count_of, shape_text
from moe_export.running.inputs import inputs_at
from moe_export.verify.cost.graph_cost import Cost, cost_of

ONLY, DIFFERS = "only here", "differs"
FIGURES = ("nodes", "parameters", "weight_bytes", "flops", "activation_bytes")


class SideEntry(TypedDict):
    """One of two graphs, and its counts; null for one that could not be counted, for the `reason` there."""

    graph: str
    sizes: dict[str, int]
    opset: dict[str, int]
    nodes: int | None
    parameters: int | None
    weight_bytes: int | None
    flops: int | None
    activation_bytes: int | None
    reason: str
    uncounted: list[str]


class CountEntry(TypedDict):
    """The nodes of one operator."""

    before: int
    after: int
    difference: int


class PortEntry(TypedDict):
    """The type of an input or output; null where a graph lacks it."""

    before: str | None
    after: str | None


class Only(TypedDict, total=False):
    """Names of values that only one graph has; left out if the two share none."""

    only_before: list[str]
    only_after: list[str]


class ValuesEntry(Only):
    """Values by their names, and how many both graphs have."""

    both: int


class DifferenceEntry(TypedDict):
    """What differs between two graphs."""

    before: SideEntry
    after: SideEntry
    operators: dict[str, CountEntry]
    ports: dict[str, PortEntry]
    values: ValuesEntry


@dataclass(frozen=True)
class MeasuredGraph:
    """One of two graphs, and its counts.

    Attributes:
        name: The name of its file.
        model: The graph, with its functions inlined.
        operators: The number of nodes of each operator; `domain::Name` outside ONNX's own domain.
        figures: The numbers in `FIGURES` by name; None for one that could not be counted.
        sizes: The sizes of its free dimensions at which it was counted.
        reason: Why FLOPs and memory are unknown; empty if they are known.
        uncounted: Operators whose FLOPs are unknown.
    """

    name: str
    model: ir.Model
    operators: Counter[str]
    figures: Mapping[str, int | None]
    sizes: Mapping[str, int]
    reason: str = ""
    uncounted: tuple[str, ...] = ()

    @property
    def opsets(self) -> dict[str, int]:
        """The versions of its operator sets by domain; `onnx` is ONNX's own."""
        return {domain or "onnx": version for domain, version in sorted(self.model.opset_imports.items())}

    @property
    def values(self) -> set[str]:
        """The names of its nodes' values, except the graph's outputs."""
        return {
            value.name
            for node in self.model.graph
            for value in node.outputs
            if value.name and not value.is_graph_output()
        }

    def to_dict(self) -> SideEntry:
        """Plain data."""
        return {
            "graph": self.name,
            "sizes": dict(self.sizes),
            "opset": self.opsets,
            "nodes": self.figures["nodes"],
            "parameters": self.figures["parameters"],
            "weight_bytes": self.figures["weight_bytes"],
            "flops": self.figures["flops"],
            "activation_bytes": self.figures["activation_bytes"],
            "reason": self.reason,
            "uncounted": list(self.uncounted),
        }

    @property
    def ports(self) -> dict[str, str]:
        """Its inputs and outputs: `input x` → `float [batch × sequence]`."""
        graph = self.model.graph
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        named = [*(("input", value) for value in inputs), *(("output", value) for value in graph.outputs)]
        return {f"{word} {value.name}": _type_text(value) for word, value in named}


@dataclass(frozen=True)
class Difference:
    """Two graphs, and what differs between them."""

    before: MeasuredGraph
    after: MeasuredGraph
    operators: Mapping[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        names = sorted({*self.before.operators, *self.after.operators})
        counts = {name: (self.before.operators[name], self.after.operators[name]) for name in names}
        object.__setattr__(self, "operators", counts)

    @property
    def ports(self) -> dict[str, tuple[str | None, str | None]]:
        """Inputs and outputs that differ, by name: their types before and after, None where a graph lacks it."""
        before, after = self.before.ports, self.after.ports
        renamed = _renamed(list(before), list(after))
        pairs = {
            f"{old} → {new.partition(' ')[2]}": (before[old], after[new]) for old, new in renamed.items()
        }
        rest = dict.fromkeys(
            name for name in (*before, *after) if name not in renamed and name not in renamed.values()
        )
        return pairs | {n: (before.get(n), after.get(n)) for n in rest if before.get(n) != after.get(n)}

    @property
    def values(self) -> dict[str, list[str]]:
        """Names of values that only one graph has, and that both have; empty if they share none."""
        before, after = self.before.values, self.after.values
        if not before & after:
            return {}
        return {
            "only_before": sorted(before - after),
            "only_after": sorted(after - before),
            "both": sorted(before & after),
        }

    def to_dict(self) -> DifferenceEntry:
        """Plain data."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "operators": {
                name: {"before": before, "after": after, "difference": after - before}
                for name, (before, after) in self.operators.items()
            },
            "ports": {name: {"before": old, "after": new} for name, (old, new) in self.ports.items()},
            "values": {**self._only, "both": len(self.values.get("both", ()))},
        }

    @property
    def _only(self) -> Only:
        found = self.values
        return {"only_before": found["only_before"], "only_after": found["only_after"]} if found else {}


def difference(before: Path, after: Path, sizes: Mapping[str, int]) -> Difference:
    """Compare two graphs.

    Args:
        before: An ONNX file.
        after: Another.
        sizes: Sizes of free dimensions of either graph, by name. The default is 1 for `batch`, else 128.

    Raises:
        UsageError: A file is not an ONNX model, or neither graph has a dimension of that name.
    """
    old, new = read_graph(before)[0], read_graph(after)[0]
    known = {dim.name for model in (old, new) for dim in free_dims(model)}
    for name in sizes:
        if name not in known:
            hint = (
                f"theirs are: {', '.join(sorted(known))}" if known else "every size of their inputs is fixed"
            )
            raise UsageError(f"no dynamic dimension {name!r} in either graph", hint=hint)
    after_sizes = _sizes(new, old, sizes, {})
    before_sizes = _sizes(old, new, sizes, after_sizes)
    return Difference(_measured(before, old, before_sizes), _measured(after, new, after_sizes))


def _sizes(
    model: ir.Model, other: ir.Model, asked: Mapping[str, int], others: Mapping[str, int]
) -> dict[str, int]:
    """The sizes of a graph's free dimensions: the user's, else the other graph's at the same place, else the defaults.

    Args:
        model: The graph.
        other: The other graph, which may fix a size, or leave it free under another name.
        asked: The user's.
        others: Those of the other graph's free dimensions, as far as they are known.
    """
    free = {dim.name for dim in free_dims(model)}
    wanted = {name: size for name, size in asked.items() if name in free}
    own, partners = input_shapes(model), input_shapes(other)
    by_place = dict(zip(own, partners, strict=False))
    for name, shape in own.items():
        partner = partners.get(name, partners.get(by_place.get(name, ""), ()))
        for size, there in zip(shape, partner, strict=False):
            known = there if isinstance(there, int) else asked.get(there, others.get(there))
            if isinstance(size, str) and size in free and known is not None:
                wanted.setdefault(size, known)
    return usual_sizes(model, wanted)


def usual_sizes(model: ir.Model, wanted: Mapping[str, int] | None = None) -> dict[str, int]:
    """A size for each free dimension: the wanted one, else 1 for `batch` and 128 for others, within the graph's bounds.

    Raises:
        UsageError: The graph has no such dimension, or is not right at a wanted size.
    """
    asked = {name: (size, size, size) for name, size in (wanted or {}).items()}
    return {name: found.best for name, found in complete_ranges(free_dims(model), asked).items()}


def _measured(path: Path, model: ir.Model, sizes: Mapping[str, int]) -> MeasuredGraph:
    nodes = list(model.graph.all_nodes())
    initializers = list(model.graph.initializers.values())
    figures: dict[str, int | None] = {
        "nodes": len(nodes),
        "parameters": count_of(initializers),
        "weight_bytes": sum(
            value.const_value.nbytes for value in initializers if value.const_value is not None
        ),
        "flops": None,
        "activation_bytes": None,
    }
    operators = Counter("::".join(filter(None, (node.domain, node.op_type))) for node in nodes)
    cost, reason = _cost(path, model, sizes)
    if cost is not None:
        figures |= {"flops": cost.total.flops, "activation_bytes": cost.total.activation_bytes}
    return MeasuredGraph(
        path.name, model, operators, figures, sizes, reason, cost.uncounted if cost is not None else ()
    )


def _cost(path: Path, model: ir.Model, sizes: Mapping[str, int]) -> tuple[Cost | None, str]:
    try:
        return cost_of(onnx.load(path), inputs_at(model, sizes)), ""
    except Exception as error:  # ONNX Runtime may refuse the graph; its other counts are still shown
        return None, str(error).strip().splitlines()[0]


def _type_text(value: ir.Value) -> str:
    kind = value.dtype.name.lower() if value.dtype is not None else "?"
    return f"{kind} [{shape_text(value) or '?'}]"


def _renamed(before: Sequence[str], after: Sequence[str]) -> dict[str, str]:
    """Old name → new name of renamed inputs and outputs, by position; empty if there are not as many of each."""
    if [name.partition(" ")[0] for name in before] != [name.partition(" ")[0] for name in after]:
        return {}
    return {
        old: new for old, new in zip(before, after, strict=True) if old not in after and new not in before
    }


def marks_of(own: Sketch, other: Sketch) -> dict[str, str]:
    """The marks of a graph's parts beside another graph, by key: `ONLY` if only this graph has it, else `DIFFERS`."""
    theirs = {part.same: part for part in other.parts}
    marks = {}
    for part in own.parts:
        if part.same not in theirs:
            marks[part.key] = ONLY
        elif theirs[part.same].operators != part.operators:
            marks[part.key] = DIFFERS
    return marks


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first `most` names, and the number of further ones: `a, b and 3 more`."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
