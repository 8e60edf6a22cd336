"""Blocks as ONNX functions: the top level of a graph shows the model's modules, and each opens as a graph of its own.

A module becomes a function if at least `_LEAST` nodes run in it and nothing outside it stands between them; modules
within it become functions of the function. What a block of experts was written as is one, too. Weights are the
function's inputs, as functions have none of their own. Nodes of no module go with the one that they stand between.

    graph ─▶ tree of module paths ─▶ deepest first: take its nodes out ─▶ a call in their place
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from moe_export.export.onnx.bodies import reads, with_inner
from moe_export.export.onnx.provenance import BLOCK, MODULE, SOURCE

DOMAIN = "moe_export.blocks"
_LEAST = 4
_SMALL = 16
_OF_ENGINES = {"trt"}
"""Domains of operators that an engine knows by name: their functions only say what they mean to others."""


@dataclass
class _Place:
    """A module path with the paths right below it."""

    path: str
    nodes: list[ir.Node] = field(default_factory=list)
    inner: dict[str, _Place] = field(default_factory=dict)


def as_functions(model: ir.Model) -> tuple[str, ...]:
    """Turn the blocks of a model into functions, in place.

    Args:
        model: With the metadata of `provenance`.

    Returns:
        Notes for the report: modules that stay as they are, and why.
    """
    notes: list[str] = []
    root = _tree(model.graph)
    for place in list(_deepest_first(root)):
        if place is not root:
            _take_out(model, place, notes)
    if model.functions:
        model.opset_imports[DOMAIN] = 1
    return tuple(notes)


def without_functions(model: ir.Model) -> ir.Model:
    """The same model with every function written out where it is called; names and metadata of nodes stay.

    A function that states what an engine's own operator means stays: written out, the engine would not know it.

    Args:
        model: Changed in place where its functions are those of `as_functions`; copied where there are others.
    """
    while calls := [node for node in model.graph if node.domain == DOMAIN]:
        for call in calls:
            _write_out(model, call)
    if any(_is_a_block(function) for function in model.functions.values()):
        return InlinePass(criteria=_is_a_block)(model).model
    return model


def _is_a_block(function: ir.Function) -> bool:
    return function.domain not in _OF_ENGINES


def _write_out(model: ir.Model, call: ir.Node) -> None:
    function = model.functions.pop(call.op_identifier())
    for parameter, value in zip(function.inputs, call.inputs, strict=True):
        assert value is not None
        parameter.replace_all_uses_with(value)
    results = list(function.outputs)
    for node in [node for node in function if node.op_type == "Constant"]:
        _hold_outside(model.graph, function, node)
    nodes = list(function)
    for result in results:
        function.outputs.remove(result)
    function.remove(nodes)
    model.graph.insert_before(call, nodes)
    for made, result in zip(call.outputs, results, strict=True):
        made.replace_all_uses_with(result, replace_graph_outputs=True)
        result.name, made.name = made.name, None
    model.graph.remove(call)
    if not any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports.pop(DOMAIN, None)


def _hold_outside(graph: ir.Graph, function: ir.Function, node: ir.Node) -> None:
    """Make a constant of a function an initializer again."""
    constant = node.outputs[0]
    value = graph.initializers.get(str(constant.name))
    if value is None:
        tensor = node.attributes["value"].as_tensor()
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(
            name=constant.name, shape=ir.Shape(tensor.numpy().shape), type=kind, const_value=tensor
        )
        graph.register_initializer(value)
    constant.replace_all_uses_with(value)
    function.remove(node)


def _tree(graph: ir.Graph) -> _Place:
    root = _Place("")
    for node in graph:
        place = root
        place.nodes.append(node)
        for path in _paths(node):
            place = place.inner.setdefault(path, _Place(path))
            place.nodes.append(node)
    return root


def _paths(node: ir.Node) -> Iterator[str]:
    """The paths of the places that a node is in, outermost first."""
    facts = node.metadata_props
    block, _, owner = facts.get(BLOCK, "").partition(":")
    module = owner if block == "experts" else facts.get(MODULE, "")
    parts = [] if module in ("", "model") else module.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])
    if block == "experts":
        yield ".".join([*parts, block])


def _deepest_first(place: _Place) -> Iterator[_Place]:
    for inner in place.inner.values():
        yield from _deepest_first(inner)
    yield place


def _take_out(model: ir.Model, place: _Place, notes: list[str]) -> None:
    """One place becomes a function, unless it is small, only a shell around another one, or not in one piece."""
    graph = model.graph
    nodes = [node for node in place.nodes if node.graph is graph]
    calls = [node for node in graph if node.domain == DOMAIN]
    nodes += [call for call in calls if call.metadata_props[MODULE].startswith(f"{place.path}.")]
    if len(nodes) < _LEAST or not any(node.domain != DOMAIN for node in nodes):
        return
    order = {node: index for index, node in enumerate(graph)}
    members = {*nodes, *_between(nodes, order)}
    strangers = [node for node in members if node not in set(nodes) and _paths_of(node)]
    if strangers:
        notes.append(f"{place.path} is no function: {strangers[0].name} stands between its nodes")
        return
    _replace(model, place, sorted(members, key=order.__getitem__))
    graph.sort()  # what the function reads may be made behind its first node


def _paths_of(node: ir.Node) -> list[str]:
    return list(_paths(node)) if node.domain != DOMAIN else [node.metadata_props.get(MODULE, "")]


def _between(nodes: Sequence[ir.Node], order: dict[ir.Node, int]) -> set[ir.Node]:
    """Other nodes that lie on a way from one of the nodes to another."""
    own = set(nodes)
    first, last = min(map(order.__getitem__, nodes)), max(map(order.__getitem__, nodes))
    window = [node for node, index in order.items() if first <= index <= last]
    below: set[ir.Node] = set()
    for node in window:
        if any(maker in own or maker in below for maker in _makers(node)):
            below.add(node)
    holder = {inner: node for node in window for inner in with_inner(node)}
    above: set[ir.Node] = set()
    for node in reversed(window):
        readers = (holder.get(use.node) for value in node.outputs for use in value.uses())
        if any(reader in own or reader in above for reader in readers):
            above.add(node)
    return (below & above) - own


def _makers(node: ir.Node) -> Iterator[ir.Node]:
    for value in reads(node):
        maker = value.producer()
        if maker is not None:
            yield maker


def _replace(model: ir.Model, place: _Place, nodes: Sequence[ir.Node]) -> None:
    graph = model.graph
    every = {inner for node in nodes for inner in with_inner(node)}
    made = {value for node in nodes for value in node.outputs}
    taken = _unique(value for node in nodes for value in reads(node) if value not in made)
    constants = [value for value in taken if _is_small(value)]
    inputs = [value for value in taken if value not in constants]
    outputs = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in every for use in value.uses())
    ]
    call = ir.Node(
        DOMAIN, _function_name(model, place.path), inputs, num_outputs=len(outputs), name=place.path
    )
    call.metadata_props[MODULE] = place.path
    first = next((node for node in nodes if SOURCE in node.metadata_props), None)
    if first is not None:
        call.metadata_props[SOURCE] = first.metadata_props[SOURCE]
    graph.insert_before(nodes[0], call)
    for value, new in zip(outputs, call.outputs, strict=True):
        new.name, new.shape, new.type = value.name, value.shape, value.type
        for use in list(value.uses()):
            if use.node not in every:
                use.node.replace_input_with(use.idx, new)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = new
    parameters = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in inputs]
    held = [_held(value) for value in constants]
    own = [*parameters, *(node.outputs[0] for node in held)]
    for value, parameter in zip([*inputs, *constants], own, strict=True):
        for use in list(value.uses()):
            if use.node in every:
                use.node.replace_input_with(use.idx, parameter)
    graph.remove(nodes)
    for value in constants:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(str(value.name))
    body = ir.Graph(
        parameters,
        outputs,
        nodes=[*held, *nodes],
        opset_imports={**model.opset_imports, DOMAIN: 1},
        name=place.path,
    )
    function = ir.Function(DOMAIN, call.op_type, graph=body, attributes=[])
    function.doc_string = _documentation(place.path, nodes, inputs, outputs)
    model.functions[function.identifier()] = function


def _is_small(value: ir.Value) -> bool:
    """Whether a value is a constant that a reader wants to see where it is used."""
    return value.is_initializer() and value.const_value is not None and value.const_value.size <= _SMALL


def _held(value: ir.Value) -> ir.Node:
    """A constant as a node: functions have no initializers."""
    assert value.const_value is not None
    node = ir.node("Constant", [], {"value": value.const_value}, name=value.name)
    made = node.outputs[0]
    made.name, made.shape, made.type = value.name, value.shape, value.type
    return node


def _unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _function_name(model: ir.Model, path: str) -> str:
    taken = {name for _, name, _ in model.functions}
    name, count = path, 1
    while name in taken:
        name, count = f"{path}_{count}", count + 1
    return name


def _documentation(
    path: str, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> str:
    """What a function computes, with its shapes and lines."""
    sources = [source for node in nodes if (source := node.metadata_props.get(SOURCE))]
    tensors = [value for value in inputs if not value.is_initializer()]
    weights = [value for value in inputs if value.is_initializer()]
    lines = [f"Module {path}" + (f", {sources[0]} and on." if sources else ".")]
    lines += described(tensors, outputs)
    lines += [f"{len(weights)} weights"] if weights else []
    return "\n".join(lines)


def described(inputs: Iterable[ir.Value], outputs: Iterable[ir.Value]) -> Iterator[str]:
    """Names, types and sizes, a line a value, for a doc string."""
    for word, values in (("in ", inputs), ("out", outputs)):
        for value in values:
            kind = value.dtype.name.lower() if value.dtype is not None else "?"
            sizes = ", ".join(map(str, value.shape)) if value.shape is not None else "?"
            yield f"{word}  {value.name}: {kind}[{sizes}]"
