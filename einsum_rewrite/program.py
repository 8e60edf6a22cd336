"""The pass over an ExportedProgram: every einsum, whoever called it, becomes the steps of its plan.

    before   einsum: f32[s0, s1, 64, 16] = aten.einsum.default('abc,cd->abcd', [x, a])
    after    unsqueeze: f32[s0, s1, 64, 1] = aten.unsqueeze.default(x, 3)
             mul: f32[s0, s1, 64, 16] = aten.mul.Tensor(unsqueeze, a)

New nodes carry the stack trace and the module path of the einsum, so that later stages can name the user's
line. Bodies of control flow (`cond`, `scan`, `while_loop`) are graph modules of their own and are rewritten
too.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch.export import ExportedProgram, ModuleCallEntry
from torch.fx import Graph, GraphModule, Node

from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import make_plan
from moe_export.einsum_rewrite.proof import prove_torch
from moe_export.einsum_rewrite.sites import Site, site_of
from moe_export.einsum_rewrite.torch_ops import guesses, known_shape, run

aten = torch.ops.aten

KEPT_META = ("nn_module_stack", "stack_trace", "from_node", "custom")
"""What a new node inherits from the einsum that it stands for."""


def rewrite_program(
    program: ExportedProgram, target: str = "onnx", laid_out_later: Collection[str] = ()
) -> tuple[ExportedProgram, list[Site]]:
    """Replace every einsum of a program.

    Args:
        program: Stays as it is.
        target: The engine that its graph is for (see `targets`).
        laid_out_later: Names of nodes whose axes get their order from what reads them. Einsums among these are planned
            for "onnx", by fewest nodes: a permute that is fast here might be in the way there.

    Returns:
        A program without `aten.einsum`, and one `Site` for each einsum, in the order of the graph.

    Raises:
        ProofError: The new steps do not compute what the einsum did.
    """
    with warnings.catch_warnings():
        # Copying a tree spec of torch trips over torch's own deprecation.
        warnings.simplefilter("ignore", FutureWarning)
        module = copy.deepcopy(program.graph_module)
    signature = copy.deepcopy(program.graph_signature)
    calls = [_copied(entry) for entry in program.module_call_graph]
    fixed = _constants(program)
    sites: list[Site] = []
    for path, body in module.named_modules():
        if not isinstance(body, GraphModule):
            continue
        for node in body.graph.find_nodes(op="call_function", target=aten.einsum.default):
            before = node.meta["val"]
            chosen = "onnx" if node.name in laid_out_later else target
            site, result = _replace(body.graph, node, fixed if path == "" else frozenset(), chosen)
            sites.append(site)
            if not _same_layout(before, result.meta["val"]):
                _settle_views(result)
            if path == "":
                signature.replace_all_uses(node.name, result.name)
                _rename(calls, node.name, result.name)
        body.graph.lint()
        body.recompile()
    return _with_graph(program, module, signature, calls), sites


def _copied(entry: ModuleCallEntry) -> ModuleCallEntry:
    """A copy whose names can be changed; the tree specs are shared, nobody changes them."""
    if entry.signature is None:
        return copy.copy(entry)
    inputs, outputs = copy.deepcopy((entry.signature.inputs, entry.signature.outputs))
    signature = dataclasses.replace(entry.signature, inputs=inputs, outputs=outputs)
    return dataclasses.replace(entry, signature=signature)


def _rename(calls: Sequence[ModuleCallEntry], old: str, new: str) -> None:
    """Programs that keep the signatures of their modules name nodes there too."""
    for entry in calls:
        if entry.signature is not None:
            for argument in (*entry.signature.inputs, *entry.signature.outputs):
                if getattr(argument, "name", None) == old:
                    argument.name = new


def _with_graph(
    program: ExportedProgram, module: GraphModule, signature: Any, calls: list[ModuleCallEntry]
) -> ExportedProgram:
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _constants(program: ExportedProgram) -> frozenset[str]:
    """The inputs of the graph that no run changes: parameters, constants, and buffers that are only read."""
    signature = program.graph_signature
    changed = set(signature.buffers_to_mutate.values())
    buffers = {name for name, buffer in signature.inputs_to_buffers.items() if buffer not in changed}
    return frozenset(
        buffers | set(signature.inputs_to_parameters) | set(signature.inputs_to_lifted_tensor_constants)
    )


def _replace(graph: Graph, node: Node, fixed: frozenset[str], target: str) -> tuple[Site, Node]:
    equation = Equation.parse(str(node.args[0]), "torch")
    operands: list[Node] = list(cast("Sequence[Node]", node.args[1]))
    tensors = [operand.meta["val"] for operand in operands]
    plan = make_plan(
        equation,
        [known_shape(tensor) for tensor in tensors],
        guesses=guesses(tensors),
        constants=[k for k, operand in enumerate(operands) if operand.name in fixed],
        target=target,
    )
    site = site_of(node.meta, equation, plan)
    prove_torch(plan, site.where)
    result = write(plan, graph, node, operands)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return site, result


def _same_layout(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two values are laid out alike; strides that are symbols are compared as they are written."""
    return [str(stride) for stride in before.stride()] == [str(stride) for stride in after.stride()]


def _settle_views(result: Node) -> None:
    """Behind a value with another layout: `view`, for which that may not do, becomes `reshape`."""
    stack, seen = [result], {result}
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
            if user.target is aten.view.default:
                user.target = aten.reshape.default


def write(plan: Plan, graph: Graph, node: Node, operands: Sequence[Node]) -> Node:
    """Write the steps of a plan into a graph in front of `node`; returns the node of the result."""
    writer = GraphWriter(graph, node)
    with graph.inserting_before(node), _quietly(operands):
        result: Node = run(plan, operands, writer)
        if result.op != "call_function":
            # A plan without steps hands its operand back; an output of the program must not be its input.
            result = writer.call(aten.alias.default, result)
    return result


class GraphWriter:
    """An engine that writes nodes; each gets its `val` by running the operator on fake tensors."""

    def __init__(self, graph: Graph, origin: Node) -> None:
        self._graph = graph
        self._meta = {key: origin.meta[key] for key in KEPT_META if key in origin.meta}
        if origin.target is aten.einsum.default:
            trace = self._meta.get("stack_trace") or ""
            self._meta["stack_trace"] = f"{trace}\n{_frame(str(origin.args[0]))}"

    def call(self, target: Any, *args: Any) -> Node:
        """Write the call of an operator."""
        node = self._graph.call_function(target, args)
        node.meta = dict(self._meta)
        values = torch.fx.map_arg(args, lambda argument: argument.meta["val"])
        node.meta["val"] = target(*values)
        return node

    def size(self, value: Node, axis: int) -> Any:
        """The size of an axis: a number, or a node."""
        size = value.meta["val"].shape[axis]
        return self.call(aten.sym_size.int, value, axis) if isinstance(size, torch.SymInt) else size

    def product(self, sizes: Sequence[Any]) -> Any:
        """The product of numbers and nodes."""
        total: Any = None
        for size in sizes:
            if total is None:
                total = size
            elif isinstance(total, int) and isinstance(size, int):
                total = total * size
            else:
                total = self.call(operator.mul, total, size)
        return 1 if total is None else total

    def dtype(self, value: Node) -> torch.dtype:
        """The dtype of a value."""
        dtype: torch.dtype = value.meta["val"].dtype
        return dtype


def _frame(equation: str) -> str:
    """An equation as the innermost frame of a stack trace: what torch hands on of a node when it decomposes it."""
    return f'  File "<einsum {equation}>", line 1, in einsum'


def _quietly(operands: Sequence[Node]) -> AbstractContextManager[None]:
    """Let no guard come from computing the metadata of new nodes."""
    for operand in operands:
        mode = getattr(operand.meta["val"], "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            quiet: AbstractContextManager[None] = mode.shape_env.suppress_guards()
            return quiet
    return nullcontext()
