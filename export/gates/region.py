"""Parts of a traced graph: which nodes run in which module, what a part depends on, and what enters it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import fx

from moe_export.export.axes.shapes import shape_of
from moe_export.export.sizes import same_size
from moe_export.export.torch_compat.metadata import is_module_path
from moe_export.export.tracing.weight_inputs import is_weight


def scope_of(node: fx.Node) -> tuple[str, ...]:
    """Module paths that a node runs in, outermost first; a second call of one module gets `@1`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = []
    for key, (path, _) in stack.items():
        _, at, call = str(key).partition("@")
        if is_module_path(path):
            paths.append(f"{path}{at}{call}")
    return tuple(paths)


def is_within(node: fx.Node, scope: tuple[str, ...]) -> bool:
    """Whether a node runs inside a module. Sizes and weights belong to everyone."""
    if node.op == "placeholder":
        return is_weight(node)
    own = scope_of(node) if scope else ()
    return not own or own[: len(scope)] == scope


def inside(outputs: Iterable[fx.Node], scope: tuple[str, ...]) -> list[fx.Node]:
    """The nodes of a scope that outputs depend on, outputs included; no sizes, which are read off the tensors."""
    stack, seen = list(outputs), set(outputs)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen and is_within(source, scope) and not is_size(source):
                seen.add(source)
                stack.append(source)
    return list(seen)


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number of the shape arithmetic; also a float, as a capacity is rounded from a fraction."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt, torch.SymFloat, torch.SymBool))


def size_source(size: fx.Node, tensors: Iterable[fx.Node]) -> tuple[fx.Node, int] | None:
    """A tensor and one of its axes that has this size; None if no tensor has one."""
    wanted = size.meta["val"]
    for node in tensors:
        for axis, found in enumerate(shape_of(node)):
            if same_size(found, wanted):
                return node, axis
    return None


def frontier(outputs: list[fx.Node], scope: tuple[str, ...]) -> list[fx.Node]:
    """The tensors from outside a scope that its part of the computation uses, in graph order.

    A size that none of them has is traced back to the tensors that it was computed from.
    """
    within = set(inside(outputs, scope))
    sources = {source for node in within for source in node.all_input_nodes if source not in within}
    tensors = {node for node in sources if isinstance(node.meta.get("val"), torch.Tensor)}
    sizes = [node for node in sources if is_size(node)]
    while sizes:
        size = sizes.pop()
        if size_source(size, tensors) is None:
            sizes += [node for node in size.all_input_nodes if is_size(node)]
            tensors |= {node for node in size.all_input_nodes if not is_size(node)}
    return [node for node in outputs[0].graph.nodes if node in tensors]


def ancestors(nodes: Iterable[fx.Node], since: fx.Node | None = None) -> set[fx.Node]:
    """These nodes and everything that they depend on, except sizes and inputs of the model.

    Args:
        nodes: Of one graph.
        since: A node before which nothing is of interest: of a deep model, the layers before are not walked through.
    """
    if since is None:
        return set(inside(nodes, ()))
    stack = [node for node in nodes if not node < since]
    seen = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen and not source < since and is_within(source, ()) and not is_size(source):
                seen.add(source)
                stack.append(source)
    return seen


def descendants(nodes: Iterable[fx.Node], before: Collection[fx.Node] = ()) -> set[fx.Node]:
    """These nodes and everything that depends on them, but for what depends on them through the nodes `before`."""
    stack = list(nodes)
    seen = set(stack)
    while stack:
        new = [user for user in stack.pop().users if user not in seen and user not in before]
        seen.update(new)
        stack += new
    return seen


def needed(outputs: tuple[fx.Node, ...], inputs: set[fx.Node]) -> list[fx.Node]:
    """What outputs depend on, stopping at inputs and at sizes that can be read off the inputs; in graph order."""
    stack, seen = list(outputs), set(outputs) - inputs
    while stack:
        node = stack.pop()
        if is_size(node) and size_source(node, inputs) is not None:
            continue
        for source in node.all_input_nodes:
            if source not in seen and source not in inputs:
                seen.add(source)
                stack.append(source)
    return [node for node in outputs[0].graph.nodes if node in seen]


def is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
