"""A script's own export call as the request: which model, on what, with which names and free dimensions.

    torch.onnx.export(model, (x,), "m.onnx", input_names=["hidden"], dynamic_axes={"hidden": {0: "batch"}})

says all that an export needs, and it counts whether or not that call would succeed. Where it names free dimensions,
they are the only ones.

The ways in which the exporters take the same thing:
    arguments     one tensor, a tuple, a tuple that ends in a dict of keyword arguments; kwargs beside it
    free axes     dynamic_axes    {name: {axis: name}} or {name: [axis, ...]}, by `input_names`
                  dynamic_shapes  by parameter or in order, nested as the arguments are: {axis: Dim}, or one an axis
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import Dim

from moe_export.export.frontend.functions import as_module, needs_arguments
from moe_export.export.torch_compat.export_calls import EXPORTERS

Axes: TypeAlias = Mapping[int, str | None]
"""The free axes of a tensor, and their names; None for whatever name is usual."""


@dataclass(frozen=True)
class Asked:
    """What a call asks for beside the model and its arguments.

    Attributes:
        input_names, output_names: Of the tensors, in order; as many as are given.
        free: For each tensor of the arguments, in order, its free axes; None if the call does not say.
    """

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    free: tuple[Axes, ...] | None = None


NOTHING = Asked()


def read(given: Mapping[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Asked] | None:
    """The model, its arguments by position and by name, and what else is asked for.

    Args:
        given: An exporter's arguments by their names.

    Returns:
        None if it is what another exporter made.
    """
    model: Any = next((given[name] for name in ("model", "mod", "func") if name in given), None)
    if needs_arguments(model):
        model = as_module(model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return None
    args, kwargs = _arguments(given, model)
    names = tuple(given.get("input_names") or ())
    return (
        model,
        args,
        kwargs,
        Asked(names, tuple(given.get("output_names") or ()), _free(given, model, args, kwargs)),
    )


def exports(source: str | bytes) -> bool:
    """Whether a file calls an exporter, however it imports it."""
    tree = ast.parse(source)
    means: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            means |= {each.asname or each.name.split(".")[0]: each.name if each.asname else each.name.split(".")[0]
                      for each in node.names}  # fmt: skip
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            means |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(_dotted(function, means) in EXPORTERS for function in calls)


def _dotted(node: ast.expr, means: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return means.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, means)
        return owner and f"{owner}.{node.attr}"
    return None


def _arguments(given: Mapping[str, Any], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = given.get("args", given.get("example_inputs"))
    kwargs = dict(given.get("kwargs") or given.get("example_kwarg_inputs") or {})
    args = () if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,)
    if args and isinstance(args[-1], dict) and not kwargs and "f" in given:
        try:  # torch.onnx.export takes it for keyword arguments
            inspect.signature(model.forward).bind(*args[:-1], **args[-1])
        except (TypeError, ValueError):
            return args, kwargs
        return args[:-1], dict(args[-1])
    return args, kwargs


def _free(
    given: Mapping[str, Any], model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Axes, ...] | None:
    shapes, axes = given.get("dynamic_shapes"), given.get("dynamic_axes")
    if shapes:
        return tuple(_of_arguments(shapes, model, args, kwargs))
    if not axes:
        return None
    named = given.get("input_names") or _parameters(model)
    count = sum(1 for _ in _tensors((*args, *kwargs.values())))
    return tuple(_by_name(axes.get(named[place])) if place < len(named) else {} for place in range(count))


def _by_name(axes: Any) -> Axes:
    if isinstance(axes, Mapping):
        return {int(axis): name if isinstance(name, str) else None for axis, name in axes.items()}
    return dict.fromkeys(axes or ())


def _of_arguments(
    shapes: Any, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Axes]:
    names = _parameters(model)
    named = [*zip_longest(names[: len(args)], args), *kwargs.items()]
    for place, (name, value) in enumerate(named):
        yield from _walk(shapes.get(name) if isinstance(shapes, Mapping) else _at(shapes, place), value)


def _parameters(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def _walk(spec: Any, value: Any) -> Iterator[Axes]:
    """The free axes of each tensor in an argument, beside what the call says of that argument."""
    if isinstance(value, torch.Tensor):
        items = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
        yield {int(axis): _name(each) for axis, each in items if _is_free(each)}
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _walk(spec.get(key) if isinstance(spec, Mapping) else None, each)
    elif isinstance(value, (tuple, list)):
        for place, each in enumerate(value):
            yield from _walk(_at(spec, place), each)


def _at(spec: Any, place: int) -> Any:
    return spec[place] if isinstance(spec, (tuple, list)) and place < len(spec) else None


def _is_free(each: Any) -> bool:
    return each is not None and not isinstance(each, int) and each is not Dim.STATIC


def _name(each: Any) -> str | None:
    if each in (Dim.AUTO, Dim.DYNAMIC):
        return None
    name = each if isinstance(each, str) else getattr(each, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for each in values:
            yield from _tensors(each)
