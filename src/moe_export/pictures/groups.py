"""Group the nodes of a graph into the boxes of a picture: a module of the model, or nodes between modules.

A node's module is read from its metadata (ours, or those of torch's exporter), or from a name with slashes. Modules are
opened from the outside in: containers first, then the largest module, repeatedly, as long as the picture stays small.
The nodes that belong directly to an opened module, or to none, get boxes of their own, shared by nodes that feed each
other.

The boxes form no cycle: a node that would close one begins another box of its module. Nodes that only compute sizes
(`Shape`, and what follows from it) get no box and no edges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from moe_export.export.onnx.bodies import reads
from moe_export.export.onnx.provenance import BLOCK, MODULE
from moe_export.export.torch_compat.metadata import module_of, scopes_of

MANY = 24
"""The number of boxes up to which modules are opened."""
_MOST, _SMALL = 40, 8  # boxes, if a pure container is opened; nodes up to which a module is never opened
_SIZES = {"Shape", "Size"}
_OF_SIZES = {
    "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Add", "Sub", "Mul", "Div", "Mod", "Cast", "Max", "Min",
    "Identity", "Reshape", "ReduceProd", "Floor", "Ceil",
}  # fmt: skip
_Key = tuple[str, bool]  # a path, and whether it is a whole module


@dataclass(eq=False)
class Group:
    """Nodes that are drawn as one box.

    Attributes:
        path: The path of the module; "" for nodes of none.
        whole: True for a closed module, or a part of one that was split to avoid a cycle; False for nodes directly in
            an opened module.
        nodes: Its nodes, in the graph's order.
        sizes: Nodes of the module that only compute sizes: counted, but not linked.
        repeats: How many boxes that repeat each other it stands for.
    """

    path: str
    whole: bool
    nodes: list[ir.Node] = field(default_factory=list)
    sizes: list[ir.Node] = field(default_factory=list)
    repeats: int = 1


def path_of(node: ir.Node) -> tuple[str, ...] | None:
    """The module path of a node, outermost name first; a block of experts or a recurrence counts as the innermost one.

    Returns:
        The path; () for a node of no module within the model; None if the node does not say.
    """
    facts = node.metadata_props
    kind, _, owner = facts.get(BLOCK, "").partition(":")
    path = owner if kind else facts.get(MODULE)
    if path is None and scopes_of(node) is not None:
        path = module_of(node)
    if path is None:  # as older exporters name nodes: `/layers.0/moe/gate/MatMul`
        path = ".".join(filter(None, str(node.name).split("/")[:-1])) or None
    if path is None:
        return None
    parts = () if path in ("", "model") else tuple(path.split("."))
    return (*parts, kind) if kind else parts


def paths_of(nodes: Sequence[ir.Node]) -> dict[ir.Node, tuple[str, ...]]:
    """The module of each node; a node that does not say belongs to the innermost module around all its neighbours."""
    stated = {node: path_of(node) for node in nodes}
    found: dict[ir.Node, tuple[str, ...]] = {}
    for node in nodes:
        own = stated[node]
        if own is None:
            makers = [found.get(maker) for maker in map(ir.Value.producer, reads(node)) if maker is not None]
            readers = [stated.get(use.node) for value in node.outputs for use in value.uses()]
            around = [path for path in (*makers, *readers) if path is not None]
            own = _common(around) if around else ()
        found[node] = own
    return found


def _common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The innermost module around all of these paths."""
    first, last = min(paths), max(paths)
    length = next(
        (n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last))
    )
    return first[:length]


def sizes_of(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that compute sizes, from sizes and constants only: `Shape`, `Size` and arithmetic on them."""
    found: set[ir.Node] = set()
    for node in graph:
        taken = [value.producer() for value in node.inputs if value is not None]
        makers = [maker for maker in taken if maker is not None and maker.op_type != "Constant"]
        follows = makers and all(maker in found for maker in makers) and not _reads_input(node)
        if node.op_type in _SIZES or (node.op_type in _OF_SIZES and follows):
            found.add(node)
    return found


def _reads_input(node: ir.Node) -> bool:
    return any(value is not None and value.is_graph_input() for value in node.inputs)


def knows_modules(graph: ir.Graph) -> bool:
    """Whether any node says which module it belongs to."""
    return any(path_of(node) for node in graph)


def groups_of(graph: ir.Graph, opened: Collection[tuple[str, ...]] | None = None) -> list[Group]:
    """The boxes of a graph at block level, in topological order.

    Args:
        graph: The graph.
        opened: Modules that are opened; all modules around them must be, too. The default is `opened_of(graph)`.
    """
    nodes = _drawn(graph)
    chosen = set(opened_of(graph) if opened is None else opened) | {()}
    groups = _grouped(nodes, paths_of(nodes), chosen)
    by_path = {group.path: group for group in groups if group.whole}
    for node in sizes_of(graph):
        path = path_of(node) or ()
        group = by_path.get(".".join(path[: len(_opened(path, chosen)) + 1]))
        if group is not None:
            group.sizes.append(node)
    return groups


def opened_of(graph: ir.Graph) -> set[tuple[str, ...]]:
    """The modules to open, so that about `MANY` boxes are shown."""
    nodes = _drawn(graph)
    paths = paths_of(nodes)
    sizes = Counter(path[:length] for path in paths.values() for length in range(1, len(path) + 1))
    own = Counter(paths.values())
    opened: set[tuple[str, ...]] = {()}
    closed: set[tuple[str, ...]] = set()
    while True:
        shown = [
            path
            for path in _shown(paths.values(), opened)
            if path not in closed and _SMALL < sizes[path] != own[path]
        ]
        if not shown:
            return opened
        path = max(shown, key=lambda each: (not own[each], sizes[each]))
        more = len(_grouped(nodes, paths, {*opened, path}))
        (opened if more <= (MANY if own[path] else _MOST) else closed).add(path)


def _drawn(graph: ir.Graph) -> list[ir.Node]:
    hidden = sizes_of(graph)
    return [node for node in graph if node not in hidden and node.op_type != "Constant"]


def _shown(paths: Iterable[tuple[str, ...]], opened: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The modules that are closed boxes if `opened` are opened."""
    return list(dict.fromkeys(path[: len(_opened(path, opened)) + 1] for path in paths if path not in opened))


def _opened(path: tuple[str, ...], opened: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The innermost opened module around a path."""
    length = 0
    while length < len(path) and path[: length + 1] in opened:
        length += 1
    return path[:length]


def _grouped(
    nodes: Sequence[ir.Node], paths: dict[ir.Node, tuple[str, ...]], opened: set[tuple[str, ...]]
) -> list[Group]:
    groups: list[Group] = []
    above: list[int] = []  # for each group the bit set of its ancestors, to find cycles
    last: dict[_Key, int] = {}
    home: dict[ir.Node, int] = {}
    for node in nodes:
        path = paths[node]
        outer = _opened(path, opened)
        whole = outer != path
        key = (".".join(path[: len(outer) + 1]), whole)
        makers = {home[maker] for maker in map(ir.Value.producer, reads(node)) if maker in home}
        leads = 0
        for maker in makers:
            leads |= above[maker] | 1 << maker
        chosen = last.get(key) if whole else max((m for m in makers if _key(groups[m]) == key), default=None)
        if chosen is not None and any(above[maker] >> chosen & 1 for maker in makers if maker != chosen):
            chosen = None
        if chosen is None:
            chosen = len(groups)
            groups.append(Group(*key))
            above.append(0)
        last[key] = home[node] = chosen
        groups[chosen].nodes.append(node)
        more = leads & ~(1 << chosen) & ~above[chosen]
        if more:
            above[chosen] |= more
            for other, bits in enumerate(above):
                if bits >> chosen & 1:
                    above[other] = bits | above[chosen]
    return [
        groups[place]
        for place in sorted(range(len(groups)), key=lambda place: (above[place].bit_count(), place))
    ]


def _key(group: Group) -> _Key:
    return group.path, group.whole
