"""Which inputs of a traced graph are the model's own: parameters, buffers and constants, and where they stand in it.

In the graph of an `ExportedProgram` they are placeholders, as the inputs of the user's are. The program's signature
tells them apart, and so that a node alone does, they are marked by it once the program is made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

_WEIGHT = "moe_export.weight"
_KINDS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def with_weights_marked(program: ExportedProgram) -> ExportedProgram:
    """The program, whose placeholders of weights are marked in its graph; copies of the graph keep that."""
    own = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind in _KINDS}
    for node in program.graph.find_nodes(op="placeholder"):
        node.meta[_WEIGHT] = node.name in own
    return program


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a parameter, a buffer or a constant of the model."""
    return node.op == "get_attr" or (node.op == "placeholder" and bool(node.meta.get(_WEIGHT)))


def weights_by_input(program: ExportedProgram) -> Mapping[str, tuple[str, torch.Tensor]]:
    """The name of the placeholder of each weight → its path in the module, and the tensor."""
    signature = program.graph_signature
    paths = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    return {name: (path, tensors[path]) for name, path in paths.items()}


def attach(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put a weight into a module under its path; the modules on its way are made."""
    *parts, name = path.split(".")
    for part in parts:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(name, tensor)
    else:
        root.register_buffer(name, tensor.detach())
