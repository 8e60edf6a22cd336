"""Cut a gate out of a traced model: a module from what enters the gate to its indices and weights.

The cut is a `Subject` like any other and goes through the same stages: trace, rewrite, translate, verify. Its
reference is the cut itself, run by PyTorch as the model was traced, before anything was rewritten.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.pytree import identifier, unique
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.gates.region import is_size, needed, size_source
from moe_export.export.gates.routing import Routing
from moe_export.export.gates.values import values_of_shapes
from moe_export.export.sizes import fixed
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.tracing.trace import Traced, quiet
from moe_export.export.tracing.weight_inputs import attach, weights_by_input
from moe_export.export.weights.lazy import absent_among, lazy_weight_of

INDICES, WEIGHTS, SCORES = "topk_idx", "topk_weight", "scores"
_WEIGHTS = "weights"  # where a cut has the model's weights


class _Gate(nn.Module):
    """The nodes of a gate, run one by one, so that each keeps the source line that it was traced from."""

    def __init__(self, graph_module: fx.GraphModule, names: tuple[str, ...]) -> None:
        super().__init__()
        self.gate = graph_module
        self._names = names

    def forward(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with fx.traceback.preserve_node_meta():
            values = fx.Interpreter(self.gate).run(*inputs)
        return dict(zip(self._names, values, strict=True))


def gate_subject(
    traced: Traced,
    routing: Routing,
    subject: Subject,
    *,
    with_scores: bool = False,
    examples: Mapping[fx.Node, torch.Tensor] | None = None,
) -> Subject:
    """Cut one gate out.

    Args:
        traced: The whole model.
        routing: The gate in it.
        subject: Where the model came from; gives the names of the gate's inputs and the source.
        with_scores: Also return the `scores` (tokens, e) that the choice was made by, for judging ties.
        examples: What enters the gate on the example inputs (`entering`), where several are cut out of one model; by
            default the model runs for this one.

    Returns:
        A subject with outputs `topk_idx` (..., k) and `topk_weight` (..., k), where there are weights.
    """
    examples = entering(traced, (routing,)) if examples is None else examples
    graph_module, names = _cut(traced, routing, with_scores)
    gate = _Gate(graph_module, names)
    made = make_subject(
        gate,
        [examples[node] for node in routing.inputs],
        {},
        source=subject.source,
        how=f"the gate of {routing.path}, cut out of the model",
    )
    inputs = dict(zip(_input_names(routing, traced, subject), made.inputs.values(), strict=True))
    return dataclasses.replace(made, inputs=inputs, root=f"gate.{_WEIGHTS}")


def numbers_in(cut: Subject) -> set[int]:
    """The integers that stand in a cut as constants, as they are or as `1 / n`."""
    graph = cut.module.get_submodule("gate").graph
    assert isinstance(graph, fx.Graph)
    return {number for node in graph.nodes for number in numbers_of(node)}


def numbers_of(node: fx.Node) -> set[int]:
    """The integers among a node's constants, and the size of an axis that it takes apart."""
    constants = [
        float(value)
        for value in pytree.tree_leaves((node.args[1:], node.kwargs))
        if isinstance(value, (int, float)) and value and math.isfinite(value)
    ]
    # A mean over n is a product with the float nearest to 1 / n, whose inverse is n but for rounding.
    values = constants + [round(1 / value, 6) for value in constants]
    return {int(value) for value in values if value.is_integer()} | _taken_apart(node)


def _taken_apart(node: fx.Node) -> set[int]:
    """The size of an axis that a node unbinds, or selects from at an index that is neither the first nor the last."""
    if node.target not in (torch.ops.aten.unbind.int, torch.ops.aten.select.int):
        return set()
    source, axis = (*node.args, 0)[:2]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(axis, int):
        return set()
    if node.target is torch.ops.aten.unbind.int:
        return {len(node.meta["val"])}
    size = fixed(value.shape[axis])  # a size that the trace fixed may still be written as a symbol
    return {size} if size is not None and node.args[2] not in (0, -1) else set()


def entering(traced: Traced, routings: Sequence[Routing]) -> dict[fx.Node, torch.Tensor]:
    """What enters some gates on the example inputs.

    The model runs once for all of them: a run a gate would take as many runs as there are layers.
    """
    nodes = tuple(dict.fromkeys(node for routing in routings for node in routing.inputs))
    return dict(zip(nodes, values_of(traced, nodes), strict=True)) if nodes else {}


def values_of(traced: Traced, nodes: tuple[fx.Node, ...]) -> list[torch.Tensor]:
    """The values that some nodes have on the example inputs.

    Where weights are not in memory, values of the same shapes: random floats, zeros for integers. They suffice to ask
    whether a computation runs, and which of its rows depend on which.
    """
    if absent_among([*traced.program.state_dict.values(), *traced.program.constants.values()]):
        return values_of_shapes(traced, nodes)
    wanted = {node.name for node in nodes}
    found: dict[str, torch.Tensor] = {}
    program = traced.program

    class Tap(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in wanted:
                found[n.name] = result
            return result

    weights, inputs = weights_by_input(program), iter(traced.example.values())
    names = [spec.arg.name for spec in program.graph_signature.input_specs]
    arguments = [weights[name][1] if name in weights else next(inputs) for name in names]
    with torch.no_grad(), quiet():
        Tap(program.graph_module).run(*arguments)
    return [found[node.name] for node in nodes]


def _cut(traced: Traced, routing: Routing, with_scores: bool) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Copy what the gate's outputs depend on, back to its inputs, into a graph of its own; also the outputs' names."""
    weights = weights_by_input(traced.program)
    root = nn.Module()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in routing.inputs:
        copies[node] = graph.placeholder(identifier(node.name))
        copies[node].meta = dict(node.meta)
    scores = tuple(choice.scores for choice in routing.choices) if with_scores else ()
    for node in needed((*routing.outputs, *scores), set(routing.inputs)):
        size = size_source(node, routing.inputs) if is_size(node) else None
        if node.op == "placeholder":
            copies[node] = _constant(graph, root, node, traced, weights)
        elif node.op == "get_attr":  # the graphs of a loop
            name = identifier(str(node.target))
            setattr(root, name, attrgetter(str(node.target))(traced.program.graph_module))
            copies[node] = graph.get_attr(name)
        elif size is not None:
            copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (copies[size[0]], size[1]))
        else:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    outputs = {INDICES: [copies[choice.indices] for choice in routing.choices]}
    if routing.weights:
        outputs[WEIGHTS] = [copies[node] for node in routing.weights]
    if with_scores:
        outputs[SCORES] = [copies[scores[0]]]
    graph.output(tuple(_joined(graph, nodes, name, routing) for name, nodes in outputs.items()))
    graph.lint()
    return fx.GraphModule(root, graph), tuple(outputs)


def _joined(graph: fx.Graph, nodes: list[fx.Node], name: str, routing: Routing) -> fx.Node:
    """(..., k) of one `topk`, or of k choices of one expert each, stacked along a new last axis."""
    choice = routing.choices[0]
    if choice.tokens is not None:  # an expert's tokens go last, as a token's experts do
        return graph.call_function(torch.ops.aten.transpose.int, (nodes[0], choice.tokens, -1))
    if name == SCORES or choice.operator.target is torch.ops.aten.topk.default:
        return nodes[0]
    return graph.call_function(torch.ops.aten.stack.default, (nodes, -1))


def _constant(
    graph: fx.Graph,
    root: nn.Module,
    node: fx.Node,
    traced: Traced,
    weights: Mapping[str, tuple[str, torch.Tensor]],
) -> fx.Node:
    """A weight of the cut, under its path in the model."""
    if node.name not in weights:
        raise NotExportableError(
            f"the gate depends on the model's input {node.name} besides what enters its module",
            code=Code.GATE,
        )
    path, value = weights[node.name]
    value = value.detach()
    if lazy_weight_of(value) is None:
        value = value.clone()  # a call of the model may change its buffers, and must not change the gate's
    path = f"{_WEIGHTS}.{path.removeprefix(f'{traced.scope}.')}"
    attach(root, path, value)
    return graph.get_attr(path)


def _input_names(routing: Routing, traced: Traced, subject: Subject) -> list[str]:
    """Names that the user knows: those of the model's inputs, else the parameter of the gate module's `forward`."""
    given = set(traced.program.graph_signature.user_inputs)
    placeholders = traced.program.graph.find_nodes(op="placeholder")
    user_inputs = [node for node in placeholders if node.name in given]
    known = dict(zip(user_inputs, subject.inputs, strict=True))
    parameters = _forward_parameters(routing.path, subject)
    spare = iter(parameters if len(routing.inputs) == 1 else [])
    names = [
        known.get(node) or (not routing.inner and next(spare, None)) or identifier(node.name)
        for node in routing.inputs
    ]
    return unique(names, {INDICES, WEIGHTS, SCORES})


def _forward_parameters(path: str, subject: Subject) -> list[str]:
    try:
        module = subject.module.get_submodule(path.partition("@")[0])
    except AttributeError:
        module = subject.module
    return list(inspect.signature(module.forward).parameters)
