"""A script's own export call as the request: which model, on what, with which names and free dimensions.

    torch.onnx.export(model, (x,), "m.onnx", input_names=["hidden"], dynamic_axes={"hidden": {0: "batch"}})

says all that an export needs, and it counts whether or not that call would succeed. Where it names free dimensions,
they are the only ones.

The ways in which the exporters take the same thing:
    model         a module, a function, a program that another call made of one
    arguments     one tensor, a tuple, a tuple that ends in a dict of keyword arguments; kwargs beside it; TensorRT's
                  inputs, tensors or shapes: min_shape, opt_shape, max_shape
    free axes     dynamic_axes    {name: {axis: name}} or {name: [axis, ...]}, by `input_names`
                  dynamic_shapes  by parameter or in order, nested as the arguments are: {axis: Dim}, or one an axis
                  inputs          those in which min_shape and max_shape differ
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import Dim

from moe_export.export.frontend.functions import as_module, needs_arguments
from moe_export.export.torch_compat.export_calls import EXPORTERS, FORMER, STEPS, TENSORRT, is_door
from moe_export.export.torch_compat.nesting import pytree

ALL = frozenset((*EXPORTERS, *FORMER, *TENSORRT))
LAST = ALL - set(STEPS)
"""Exporters whose result is what the script is after."""

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


class Made:
    """What an exporter returns to a script that goes on: whatever is done with it gives this again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key:
            raise IndexError(key)
        return self


class Exported(Made):
    """The same of a program, which another exporter may be given."""

    def __init__(self, read: Read) -> None:
        self.read = read

    def module(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The model that it was made of."""
        return self.read[0]


Read: TypeAlias = "tuple[nn.Module, tuple[Any, ...], dict[str, Any], Asked]"


def read(given: Mapping[str, Any]) -> Read | None:
    """The model, its arguments by position and by name, and what else is asked for.

    Args:
        given: An exporter's arguments by their names.

    Returns:
        None if it is what another exporter made.
    """
    model: Any = next((given[name] for name in _MODELS if name in given), None)
    names, outputs = (tuple(given.get(key) or ()) for key in ("input_names", "output_names"))
    if isinstance(model, Exported):
        module, args, kwargs, asked = model.read
        return (
            module,
            args,
            kwargs,
            Asked(names or asked.input_names, outputs or asked.output_names, asked.free),
        )
    if needs_arguments(model):
        model = as_module(model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return None
    args, kwargs = _arguments(given, model)
    free = _free(given, model, args, kwargs)
    args, kwargs = pytree.tree_map(_example, (args, kwargs), is_leaf=_is_shape)
    return model, args, kwargs, Asked(names, outputs, free)


_MODELS = ("model", "mod", "func", "module", "exported_program")


def exports(source: str | bytes, names: Collection[str] = ALL) -> int:
    """How often a file calls one of these exporters, however it imports it."""
    tree = ast.parse(source)
    means: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            means |= {each.asname or each.name.split(".")[0]: each.name if each.asname else each.name.split(".")[0]
                      for each in node.names}  # fmt: skip
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            means |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return sum(_dotted(node.func, means) in names for node in ast.walk(tree) if isinstance(node, ast.Call))


def calls_a_door(function: Any) -> bool:
    """Whether the code of a function calls an exporter, by what its names mean where it is defined."""
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    found = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    inner = [
        getattr(value, name, None) for value in found if inspect.ismodule(value) for name in code.co_names
    ]
    deeper = [
        getattr(value, name, None) for value in inner if inspect.ismodule(value) for name in code.co_names
    ]
    return any(map(is_door, (*found, *inner, *deeper)))


def _dotted(node: ast.expr, means: Mapping[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return means.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, means)
        return owner and f"{owner}.{node.attr}"
    return None


def _arguments(given: Mapping[str, Any], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    places = ("args", "example_inputs", "arg_inputs", "inputs")
    args = next((given[name] for name in places if given.get(name) is not None), None)
    named = ("kwargs", "example_kwarg_inputs", "kwarg_inputs")
    kwargs = dict(next((given[name] for name in named if given.get(name)), {}))
    if "mod" in given and isinstance(args, Mapping):  # torch.jit.trace_module, by method
        args = args.get("forward")
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
    specs = [each for each in pytree.tree_leaves((args, kwargs), is_leaf=_is_shape) if _is_example(each)]
    if any(map(_is_range, specs)):
        return tuple(_between(each) for each in specs)
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


def _is_shape(value: Any) -> bool:
    """Whether it says how an input looks, as torch_tensorrt.Input does, or is the size of one."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(size) is int for size in value)
    return hasattr(value, "shape_mode") and hasattr(value, "shape")


def _is_range(value: Any) -> bool:
    return hasattr(value, "shape_mode") and isinstance(value.shape, Mapping)


def _is_example(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "shape_mode")


def _between(value: Any) -> Axes:
    """The axes whose least and greatest sizes differ, with their names where they are shared."""
    if not _is_range(value):
        return {}
    least, most = value.shape["min_shape"], value.shape["max_shape"]
    names = getattr(value, "shared_dims", None) or {}
    return {axis: names.get(axis) for axis, (a, b) in enumerate(zip(least, most, strict=True)) if a != b}


def _example(value: Any) -> Any:
    """A tensor of the shape that is described."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "shape_mode"):
        return value
    made = getattr(value, "torch_tensor", None)
    if isinstance(made, torch.Tensor):
        return made.cpu()
    return torch.rand(tuple(value.shape["opt_shape"] if _is_range(value) else value.shape))
