"""A model without its weights: loaded and traced on the meta device, where tensors have shapes but no data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from moe_export.errors import Code, MoeExportError, NotExportableError, UsageError
from moe_export.export.frontend.arguments import parse_init, parse_input
from moe_export.export.frontend.load import split_spec
from moe_export.export.frontend.script import picked_call, run_file
from moe_export.export.frontend.source import last_model_line, last_user_line
from moe_export.export.torch_compat.caches import cache_patches
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.tracing.every_expert_hit import every_expert_hit
from moe_export.export.tracing.idioms import traceable_idioms, user_lines
from moe_export.export.tracing.idioms_numbers import symbolic_numbers
from moe_export.export.tracing.trace import quiet
from moe_export.export.tracing.weight_inputs import with_weights_marked


@dataclass(frozen=True)
class Weightless:
    """A model on the meta device, and the arguments that it is called with.

    Attributes:
        module: The model in eval mode.
        args, kwargs: The arguments of its call, on the meta device, too.
        source: The model's file.
        made: Whether its weights were created on the way: a file that needs values while it runs is run with them.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: Path
    made: bool


def load_weightless(spec: str, init: Sequence[str] = (), inputs: Sequence[str] = ()) -> Weightless:
    """Load the model that `spec` names, as `load_subject` does, without creating its weights if possible.

    Args:
        spec: A file, or `file.py:CLASS`.
        init: Arguments of the class, as `name=value`.
        inputs: Example inputs of the class, as `name=2x10x512:float32`.

    Raises:
        UsageError: There is no such file, it cannot be run, or it has no model.
    """
    path, name = split_spec(spec)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        with quiet(), torch.device("meta"):
            found = _model_and_call(path, name, init, inputs)
        made = False
    except Exception:  # the file may need values; if anything else is wrong, the run with weights reports it
        found, made = _with_weights(path, name, init, inputs), True
    module, args, kwargs = found
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.detach().to("meta") if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs)
    )
    return Weightless(module.to("meta").eval(), tuple(args), kwargs, path, made)


def _with_weights(
    path: Path, name: str | None, init: Sequence[str], inputs: Sequence[str]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    try:
        return _model_and_call(path, name, init, inputs)
    except MoeExportError:
        raise
    except Exception as error:
        raise UsageError(
            f"the model in {path.name} raised {type(error).__name__}: {error}",
            where=last_user_line(error) or str(path),
        ) from error


def _model_and_call(
    path: Path, name: str | None, init: Sequence[str], inputs: Sequence[str]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if name is not None and name.isdecimal():
        picked = picked_call(path, int(name))
        return picked.module, picked.args, picked.kwargs
    module, call = run_file(path, as_script=False, stop_at_call=False)
    if name is not None:
        assert module is not None
        return _of_class(module, name, path, init, inputs)
    model, example = (getattr(module, key, None) for key in ("model", "example_inputs"))
    if model is not None and example is not None:
        model = model if isinstance(model, nn.Module) else model()
        example = example() if callable(example) else example
        if not isinstance(model, nn.Module):
            raise UsageError(f"`model` in {path.name} is a {type(model).__name__}, not an nn.Module")
        if isinstance(example, Mapping):
            return model, (), dict(example)
        return model, tuple(example) if isinstance(example, (tuple, list)) else (example,), {}
    if call is None:
        _, call = run_file(path, as_script=True, stop_at_call=True)
    if call is None:
        raise UsageError(
            f"no model in {path.name}: it defines no `model` and `example_inputs`, and calls no module",
            hint="or name a class: moe-export plan model.py:CLASS --init ... --input x=2x10x512",
        )
    return call.module, call.args, call.kwargs


def _of_class(
    module: ModuleType, name: str, path: Path, init: Sequence[str], inputs: Sequence[str]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made = getattr(module, name, None)
    if not callable(made):
        raise UsageError(f"{path.name} has no class {name}")
    model = made if isinstance(made, nn.Module) else made(**dict(parse_init(item) for item in init))
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} in {path.name} is not an nn.Module")
    if not inputs:
        raise UsageError(
            f"{name} needs example inputs: {name}.forward{inspect.signature(model.forward)}",
            hint="give each tensor: --input name=2x10x512:float32",
        )
    with torch.device("cpu"):
        return model, (), dict(parse_input(item, model) for item in inputs)


class _Flat(nn.Module):
    """A model as a module that takes only the tensors among its arguments, and returns its output tensors flat."""

    def __init__(self, model: nn.Module, template: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model = model
        self._template, self._spec = tuple(template), spec

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queue = iter(tensors)
        filled = [next(queue) if isinstance(item, torch.Tensor) else item for item in self._template]
        args, kwargs = pytree.tree_unflatten(filled, self._spec)
        found = pytree.tree_leaves(self.model(*args, **kwargs))
        return tuple(leaf for leaf in found if isinstance(leaf, torch.Tensor))


def trace_weightless(model: Weightless) -> ExportedProgram:
    """The traced program of a model, with free dimensions where tracing succeeds that way, else all fixed.

    Raises:
        NotExportableError: The model cannot be traced without values.
    """
    flat, spec = pytree.tree_flatten((model.args, dict(model.kwargs)))
    tensors = tuple(leaf for leaf in flat if isinstance(leaf, torch.Tensor))
    first: Exception | None = None
    for free in (True, False):
        sizes = tuple((Dim.AUTO if free else Dim.STATIC,) * tensor.dim() for tensor in tensors)
        try:
            with (
                quiet(),
                torch.no_grad(),
                cache_patches(),
                torch.backends.opt_einsum.flags(enabled=False),
                traceable_idioms(),
                symbolic_numbers(model.module),
                every_expert_hit(),
                user_lines(),
            ):
                program: ExportedProgram = torch.export.export(
                    _Flat(model.module, flat, spec).eval(),
                    tensors,
                    dynamic_shapes={"tensors": sizes},
                    strict=False,
                ).run_decompositions({})
            return with_weights_marked(program)
        except Exception as error:
            first = first or error
    assert first is not None
    raise NotExportableError(
        f"the model cannot be traced without its weights: {str(first).strip().splitlines()[0]}",
        code=Code.NOT_TRACEABLE,
        where=last_model_line(first) or str(model.source),
    ) from first
