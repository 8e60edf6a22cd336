"""`with_module`: a traced program with a changed copy of its graph; the program itself stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch.export import ExportedProgram, ExportGraphSignature


def copied_module(program: ExportedProgram) -> fx.GraphModule:
    """A copy of a program's graph, to be changed and handed to `with_module`."""
    with warnings.catch_warnings():
        # Copying a tree spec of torch trips over torch's own deprecation.
        warnings.simplefilter("ignore", FutureWarning)
        module: fx.GraphModule = copy.deepcopy(program.graph_module)
    return module


def _is_interface(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def with_module(
    program: ExportedProgram,
    module: fx.GraphModule,
    *,
    keeps: Callable[[fx.Node], bool] = _is_interface,
    signature: ExportGraphSignature | None = None,
    state_dict: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> ExportedProgram:
    """The program with a changed copy of its module, in which nothing is left that nobody uses.

    Args:
        program: It stays as it is.
        module: The copy.
        keeps: Whether a node stays that nobody uses.
        signature: What it says of its inputs and outputs, if that is something else.
        state_dict: The weights, if they are others.
        constants: Likewise.
    """
    signature = signature or copy.deepcopy(program.graph_signature)
    name_outputs(signature, module.graph)
    module.graph.eliminate_dead_code(is_impure_node=keeps)
    module.graph.lint()
    module.recompile()
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict if state_dict is None else dict(state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants if constants is None else dict(constants),
        verifiers=program.verifiers,
    )


def without_unread_constants(program: ExportedProgram) -> ExportedProgram:
    """The program without the constants that no result depends on; the program itself if there are none.

    Why: what a function under a nested `torch.vmap` makes can stay behind in a trace as a constant, read by operators
    that nobody reads. It escaped from the function, so nothing can compute with it any more.
    """
    graph = program.graph
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node.op == "call_function" and node.is_impure()) or node in read:
            read.update(node.all_input_nodes)
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    unread = {node.name for node in graph.nodes if node.name in constants and node not in read}
    if not unread:
        return program
    module = copied_module(program)
    dead: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.name in unread or not dead.isdisjoint(node.all_input_nodes):
            dead.add(node)
    for node in reversed(list(module.graph.nodes)):
        if node in dead:
            module.graph.erase_node(node)
    signature = copy.deepcopy(program.graph_signature)
    signature.input_specs = [
        spec for spec in signature.input_specs if getattr(spec.arg, "name", None) not in unread
    ]
    targets = {constants[name] for name in unread}
    kept = {target: value for target, value in program.constants.items() if target not in targets}
    return with_module(program, module, keeps=lambda _: True, signature=signature, constants=kept)


def name_outputs(signature: ExportGraphSignature, graph: fx.Graph) -> None:
    """Let a signature, which knows outputs by the names of their nodes, say which nodes a graph returns."""
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    for spec, node in zip(signature.output_specs, outputs, strict=True):
        spec.arg = dataclasses.replace(spec.arg, name=node.name)
