"""What can be a model at all: wrappers are taken off, and what no graph can be made of is refused early.

A model comes as people have it: compiled, wrapped for several GPUs, on the meta device, as TorchScript. Each is
either brought to the plain module inside or refused with what to do, before the tracer fails on it obscurely.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.torch_compat.modules import compiled_inside, uncompile
from moe_export.export.torch_compat.nesting import pytree


def plain_module(module: nn.Module, source: Path) -> nn.Module:
    """The module itself, without `torch.compile`, `DataParallel` and the like around it or inside it.

    Raises:
        NotExportableError: It is TorchScript, or quantized in PyTorch's own packed format.
        UsageError: Its weights are on the meta device, so there are none.
    """
    module = _unwrapped(module)
    for parent in module.modules():
        uncompile(parent)
        for name, child in parent.named_children():
            if isinstance(child, nn.Module) and _unwrapped(child) is not child:
                setattr(parent, name, _unwrapped(child))
    _refuse_kinds(module, source)
    return module


def plain_weights(module: nn.Module) -> tuple[str, ...]:
    """Make floats of weights that are quantized tensors, as torchao's are: of a class that has several inside.

    Returns:
        Notes on what was found. The module has the floats from now on.
    """
    made: dict[int, nn.Parameter] = {}
    kinds: Counter[str] = Counter()
    for owner in module.modules():
        for key, weight in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            kind: Any = type(weight)
            if not hasattr(kind, "__tensor_flatten__") or kind.dequantize is torch.Tensor.dequantize:
                continue
            if id(weight) not in made:
                kinds[kind.__name__] += 1
                made[id(weight)] = nn.Parameter(weight.detach().dequantize(), requires_grad=False)
            setattr(owner, key, made[id(weight)])
    return tuple(
        f"{count} weight{'s' * (count > 1)} of {name}, as floats: --weights-dtype finds the grid that they lie on"
        for name, count in kinds.items()
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        inner: Any = compiled_inside(module)
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _refuse_kinds(module: nn.Module, source: Path) -> None:
    name = type(module).__name__
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise NotExportableError(
                f"{path or name} is TorchScript, which has its own graph already",
                code=Code.FROZEN_MODULE,
                where=str(source),
                hint="export the module that torch.jit.script or torch.jit.trace was given",
            )
        if type(child).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise NotExportableError(
                f"{path or name} is a quantized {type(child).__name__}, whose packed weights have no ONNX form",
                code=Code.FROZEN_MODULE,
                where=str(source),
                hint="export the model before it is quantized, and quantize the graph",
            )
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise UsageError(
                f"the weights of {name} are on the meta device, so they have no values ({path})",
                where=str(source),
                hint='name their file beside it, weights = "model.safetensors", '
                "or load them: model.to_empty(device='cpu'), then load_state_dict",
            )


def check_inputs(tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Refuse example tensors that no graph can take.

    Raises:
        UsageError: One has no values (meta device).
        NotExportableError: One is sparse or nested.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UsageError(
                f"the example input {name} is on the meta device",
                where=str(source),
                hint="make it on the CPU",
            )
        reason = _unlike_onnx(tensor)
        if reason:
            raise NotExportableError(
                f"the example input {name} is {reason[0]}, which no ONNX input can be",
                code=Code.UNLIKE_ONNX,
                where=str(source),
                hint=reason[1],
            )


def check_constants(constants: Mapping[str, Any], source: Path) -> None:
    """Refuse arguments that are fixed in the graph, and hold tensors, which would be fixed with them.

    Raises:
        NotExportableError: One does.
    """
    for name, value in constants.items():
        path = tensor_inside(value)
        if path is not None:
            kind = type(value).__name__
            raise NotExportableError(
                f"the example input {name} is a {kind}, whose tensor {name}.{path} would be a constant in the graph",
                code=Code.UNLIKE_ONNX,
                where=str(source),
                hint=f"make {kind} a dataclass, register it (torch.utils._pytree.register_pytree_node), "
                "or let forward take its tensors",
            )


def tensor_inside(value: Any, depth: int = 4) -> str | None:
    """The path to a tensor that an object holds in attributes and containers; None if it holds none.

    A module's own weights are constants wherever it stands.
    """
    if isinstance(value, (type, nn.Module)) or depth == 0:
        return None
    if isinstance(value, Mapping):
        held = {str(key): each for key, each in value.items()}
    elif isinstance(value, (tuple, list)):
        held = {str(index): each for index, each in enumerate(value)}
    else:
        held = getattr(value, "__dict__", {})
    for name, each in held.items():
        if isinstance(each, torch.Tensor):
            return name
        if (path := tensor_inside(each, depth - 1)) is not None:
            return f"{name}.{path}"
    return None


def check_outputs(tensors: Mapping[str, torch.Tensor], where: str | None) -> None:
    """Refuse outputs that no graph can give.

    Raises:
        NotExportableError: One is sparse or nested.
    """
    for name, tensor in tensors.items():
        reason = _unlike_onnx(tensor)
        if reason:
            raise NotExportableError(
                f"output {name} is {reason[0]}, which no ONNX output can be",
                code=Code.UNLIKE_ONNX,
                where=where,
                hint=reason[1],
            )


def _unlike_onnx(tensor: torch.Tensor) -> tuple[str, str] | None:
    """What a tensor is that ONNX does not have, and what to do about it."""
    if tensor.is_nested:
        return "a nested tensor", "give a padded tensor and a mask"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})", "give it dense: tensor.to_dense()"
    return None


def register_dataclasses(value: Any) -> None:
    """Let the tracer look into the dataclasses among the arguments, which it otherwise takes for constants."""
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
