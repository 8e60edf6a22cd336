"""What a picture of a graph shows, before layout: parts, the links between them, and their texts.

A part is a node (`nodes`) or a module (`blocks`) of the graph, or one of its inputs or outputs. Weights are not parts;
they are listed on the part that reads them. A link stands for all values from one part to another, and shows their
shapes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.onnx.bodies import reads, with_inner
from moe_export.export.onnx.provenance import BLOCK, EINSUM, SOURCE
from moe_export.pictures.groups import Group, groups_of, knows_modules, sizes_of
from moe_export.pictures.repeats import collapsed

_CONSTANT = re.compile(r"(^|\.)constant[._]-?\d")  # as `onnx/weight_names` and builders of nodes call them
_MADE = re.compile(r"(val|_v)_\d+|(new_)?(zeros|ones|full|empty)(_like)?(_\d+)?")
Level = Literal["blocks", "nodes"]
Kind = Literal["input", "output", "module", "experts", "recurrence", "loose"]
FEW = 60
"""The number of nodes up to which each node is drawn by default."""
MOST = 1500
"""The number of nodes above which drawing each node is refused."""
_TELLING = (
    "Einsum", "Scan", "Loop", "If", "MatMul", "Gemm", "Conv", "TopK", "Softmax", "ScatterND", "Gather", "Attention",
    "LayerNormalization", "RMSNormalization", "MoE", "TRT_MoE",
)  # fmt: skip
"""Operators that show what a module does; they are named first."""
_LONG = 30  # characters of the end of a title; with 8 more a text fits as it is


@dataclass(frozen=True)
class Part:
    """A box of the picture.

    Attributes:
        key: A key that is unique in the sketch.
        kind: The kind of box, which decides its style.
        title, lines: Its text.
        about: The text shown on hover.
        same: A key that the corresponding part of another graph has, too.
        operators: The number of nodes of each operator in it, bodies included.
    """

    key: str
    kind: Kind
    title: str
    lines: tuple[str, ...]
    about: str
    same: str
    operators: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Link:
    """A line of the picture, between two parts.

    Attributes:
        source, target: The parts' keys.
        label: The shape of the first value that no earlier link from `source` shows; "" if there is none.
        about: The text shown on hover: names, types and shapes of all values.
        sizes: Whether all values are sizes.
    """

    source: str
    target: str
    label: str
    about: str
    sizes: bool = False


@dataclass(frozen=True)
class Sketch:
    """What a picture of one graph shows.

    Attributes:
        title, subtitle: The two lines above the graph.
        parts: The boxes, in topological order.
        links: The lines between them.
        level: The level of detail.
    """

    title: str
    subtitle: str
    parts: tuple[Part, ...]
    links: tuple[Link, ...]
    level: Level


def sketch_of(
    model: ir.Model, title: str, level: Level | None = None, opened: Collection[tuple[str, ...]] | None = None
) -> Sketch:
    """The sketch of a model.

    Args:
        model: The model, with its functions inlined.
        title: The title of the picture.
        level: The default is nodes for a graph of at most `FEW` nodes or without modules, else blocks.
        opened: Modules that are opened at the level of blocks. The default is `opened_of(model.graph)`.

    Raises:
        UsageError: The graph has more than `MOST` nodes at the level of nodes.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type != "Constant"]
    if level is None:
        level = "nodes" if len(nodes) <= FEW or not knows_modules(graph) else "blocks"
    if level == "nodes" and len(nodes) > MOST:
        hint = (
            "--level blocks"
            if knows_modules(graph)
            else "its nodes name no modules that could be drawn instead"
        )
        raise UsageError(f"{title}: {len(nodes)} nodes are too many for a picture ({MOST})", hint=hint)
    groups = (
        [Group("", False, [node]) for node in nodes]
        if level == "nodes"
        else collapsed(groups_of(graph, opened))
    )
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    parts = [_input(number, value) for number, value in enumerate(inputs)]
    named = list(zip(groups, _parts(groups, level), strict=True))
    outputs = [_output(number, value) for number, value in enumerate(graph.outputs)]
    every = sum(1 for _ in graph.all_nodes())
    opset = model.opset_imports.get("", "?")
    weights = count_of(graph.initializers.values())
    shown = f"{len(groups)} blocks of {every} nodes" if level == "blocks" else f"{every} nodes"
    return Sketch(
        title,
        f"{shown} · {weights:,} parameters · opset {opset}",
        (*parts, *(part for _, part in named), *outputs),
        tuple(_links(graph, named, level)),
        level,
    )


def count_of(values: Iterable[ir.Value]) -> int:
    """The number of elements of all weights among `values`."""
    return sum(prod(_sizes(value)) for value in values if is_weight(value))


def is_weight(value: ir.Value) -> bool:
    """Whether an initializer is a weight, as torch counts parameters, as far as a graph tells.

    Weights are floats of one dimension or more, or integers of two or more; one-dimensional integers are sizes, axes
    and the like. Constants of the model's code are none: what is called so here, booleans, and what an exporter
    numbered, or named after the operator that filled it, and holds one value (the zeros that a loop starts from).
    """
    tensor, name = value.const_value, str(value.name)
    if tensor is None or tensor.dtype == ir.DataType.BOOL or _CONSTANT.search(name):
        return False
    if len(tensor.shape) < 2 and not (tensor.dtype.is_floating_point() and len(tensor.shape) == 1):
        return False
    return _MADE.fullmatch(name) is None or not _holds_one_value(tensor)


def _holds_one_value(tensor: ir.TensorProtocol) -> bool:
    array = tensor.numpy().ravel()
    return array.size > 1 and bool((array == array[0]).all())


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(size if isinstance(size, int) else 1 for size in value.const_value.shape)


def shape_text(value: ir.Value) -> str:
    """A shape as `batch × sequence × 32`; `scalar` for rank 0, "" for an unknown shape."""
    if value.shape is None:
        return ""
    sizes = [str(size) if isinstance(size, int) else size.value or "?" for size in value.shape]
    return " × ".join(sizes) or "scalar"


def _typed(value: ir.Value) -> str:
    kind = value.dtype.name.lower() if value.dtype is not None else ""
    return ": ".join(filter(None, (str(value.name), " ".join(filter(None, (kind, shape_text(value)))))))


def _input(number: int, value: ir.Value) -> Part:
    return Part(f"in {value.name}", "input", str(value.name), (), f"input {_typed(value)}", f"input {number}")


def _output(number: int, value: ir.Value) -> Part:
    return Part(f"out {number}", "output", str(value.name), (), f"output {_typed(value)}", f"output {number}")


def _parts(groups: Sequence[Group], level: Level) -> list[Part]:
    seen: Counter[str] = Counter()
    parts = []
    for number, group in enumerate(groups):
        operators = Counter(
            node.op_type for each in (*group.nodes, *group.sizes) for node in with_inner(each)
        )
        title = _title(group)
        same = f"{group.path} {group.whole} {'' if group.whole else title}"
        same += f" {group.nodes[0].outputs[0].name}" if level == "nodes" and group.nodes[0].outputs else ""
        seen[same] += 1
        lines = _node_lines(group.nodes[0]) if level == "nodes" else _block_lines(group, operators)
        parts.append(
            Part(
                f"part {number}",
                _kind(group, level),
                _short(title),
                tuple(line if len(line) <= _LONG + 8 else f"{line[: _LONG + 7]}…" for line in lines),
                _about(group, operators, title),
                f"{same} {seen[same]}",
                tuple(sorted(operators.items())),
            )
        )
    return parts


def _title(group: Group) -> str:
    times = f"{group.repeats} × " if group.repeats > 1 else ""
    if group.whole:
        return times + group.path
    kinds = list(dict.fromkeys(node.op_type for node in group.nodes))
    if len(kinds) <= 3:
        return times + ", ".join(kinds)
    telling = [kind for kind in _TELLING if kind in kinds][:2] or kinds[:2]
    return f"{times}{', '.join(telling)}, …"


def _kind(group: Group, level: Level) -> Kind:
    found = {node.metadata_props.get(BLOCK, "").partition(":")[0] for node in group.nodes}
    if "experts" in found:
        return "experts"
    if "recurrence" in found:
        return "recurrence"
    return "module" if group.whole or (level == "nodes" and _weights(group.nodes)) else "loose"


def _block_lines(group: Group, operators: Counter[str]) -> list[str]:
    total = operators.total()
    lines = []
    if group.whole:
        telling = [(kind, operators[kind]) for kind in _TELLING if kind in operators]
        telling = telling[:3] or operators.most_common(2)
        listed = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in telling)
        rest = ", …" if sum(count for _, count in telling) < total else ""
        lines.append(f"{total} node{'s' * (total > 1)}: {listed}{rest}")
    else:
        lines += [f"→ {value.name}" for value in _results(group)[:1]]
    weights = sum(prod(_sizes(value)) for value in _weights(group.nodes))
    return [*lines, f"{weights:,} parameters"] if weights else lines


def _results(group: Group) -> list[ir.Value]:
    """The values of a group that others read: those named by the model first, then those with generated names."""
    own = {inner for node in group.nodes for inner in with_inner(node)}
    found = [
        value
        for node in group.nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in own for use in value.uses())
    ]
    return sorted(
        found, key=lambda value: (str(value.name).startswith(("_", "val_")), not value.is_graph_output())
    )


def _node_lines(node: ir.Node) -> list[str]:
    lines = [str(node.outputs[0].name or node.name)] if node.outputs else []
    weights = _weights([node])
    return [*lines, *map(_weight_line, weights[:2])]


def _weight_line(value: ir.Value) -> str:
    name = str(value.name).rpartition(".")[2]
    return shape_text(value) if name[:1].isdigit() else f"{name} {shape_text(value)}"


def _weights(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    taken = dict.fromkeys(value for node in nodes for value in reads(node))
    return [value for value in taken if value.is_initializer() and is_weight(value)]


def _about(group: Group, operators: Counter[str], title: str) -> str:
    lines = [f"{group.path}: {title}" if group.path and not group.whole else title]
    facts = [node.metadata_props for node in group.nodes]
    source = next((fact[SOURCE] for fact in facts if SOURCE in fact), "")
    einsums = dict.fromkeys(fact[EINSUM] for fact in facts if EINSUM in fact)
    lines += [", ".join(f"{count} {kind}" for kind, count in operators.most_common())]
    lines += [source] if source else []
    lines += [f"einsum {equation}" for equation in einsums]
    return "\n".join(lines)


def _short(text: str) -> str:
    """A text shortened in the middle to fit a box: the end of a path says the most."""
    return text if len(text) <= _LONG + 8 else f"{text[:8]}…{text[-_LONG:]}"


def _links(graph: ir.Graph, named: Sequence[tuple[Group, Part]], level: Level) -> Iterable[Link]:
    """The links, one for each pair of parts."""
    home = {node: part.key for group, part in named for node in group.nodes}
    sizes = sizes_of(graph)
    given: dict[tuple[str, str], list[ir.Value]] = {}

    def add(value: ir.Value, target: str) -> None:
        maker = value.producer()
        source = home.get(maker) if maker is not None else None
        if maker is None and value.is_graph_input() and not value.is_initializer():
            source = f"in {value.name}"
        hidden = level == "blocks" and maker in sizes
        if source is not None and source != target and not hidden:
            values = given.setdefault((source, target), [])
            if value not in values:
                values.append(value)

    for group, part in named:
        for node in group.nodes:
            for value in reads(node):
                add(value, part.key)
    for number, value in enumerate(graph.outputs):
        add(value, f"out {number}")
    labelled: set[tuple[str, ir.Value]] = set()
    for (source, target), values in given.items():
        fresh = [
            value
            for value in values
            if (source, value) not in labelled and value.producer() not in sizes and shape_text(value)
        ]
        labelled.update((source, value) for value in fresh)
        label = shape_text(fresh[0]) if fresh else ""
        if len(fresh) > 1:
            label += f"  +{len(fresh) - 1}"
        about = "\n".join(map(_typed, values))
        yield Link(source, target, _short(label), about, all(value.producer() in sizes for value in values))
