"""What a graph's inputs and outputs are called: as the model's own code calls them, or else as the field does.

    forward(input_ids, past_key_values)            input_ids, past_key_values.0.key, past_key_values.0.value
    return self.head(x), new                       logits, present.0.key, present.0.value
    return {"hidden": h, "aux": {"loss": loss}}    hidden, aux.loss
    return h, x.sum()                              h, output_1

What is nested is called by its path, joined by `.`. A list of (keys, values), one pair for each layer, is a cache; a
cache that comes out is called `present`, as in ONNX files of language models elsewhere, unless the model has a name
for it. An output without a name that has one value for each token id is `logits`.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.pytree import (
    KEY,
    STATE,
    VALUE,
    WINDOW,
    Leaf,
    children,
    is_cache,
    path_word,
    unique,
)
from moe_export.export.frontend.source import forward_line
from moe_export.export.torch_compat.nesting import pytree

_CACHED = re.compile(rf"(?P<cache>.*?)\.?(?P<place>\d+\.({KEY}|{VALUE}|{WINDOW}|{STATE})(\.\d+)?)")
_PAST, _PRESENT = "past", "present"


def argument_names(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], source: Path, flat: Sequence[Any]
) -> list[str]:
    """One name for each leaf of `(args, kwargs)`: forward's parameter, then the path inside the argument.

    Args:
        module: The model.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        source: Its file, for errors.
        flat: All leaves, as torch flattens them.

    Raises:
        UsageError: The arguments do not fit `forward`.
    """
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(module).__name__}.forward{signature}: {error}",
            where=forward_line(module) or str(source),
            hint="name inputs as forward's parameters are named, and give every one without a default",
        ) from None
    positional = _positional_names(signature, len(args))
    named = list(zip(positional, args, strict=True)) + list(kwargs.items())
    names = [path for name, value in named for path in _paths(value, name)]
    if len(names) != len(flat):
        raise UsageError("the example inputs cannot be flattened in a fixed order", where=str(source))
    return names


def _paths(value: Any, name: str) -> Iterator[str]:
    """The path of each leaf, in torch's order."""
    if pytree.tree_structure(value).is_leaf():
        yield name
        return
    for key, child in children(value):
        path = f"{name}.{path_word(key)}"
        if is_cache(value):
            yield from (f"{path}.{part}" for part in (KEY, VALUE))
        else:
            yield from _paths(child, path)


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{index}" for index in range(count - len(names))]
        elif parameter.kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            names.append(parameter.name)
    return names[:count]


def output_names(
    module: nn.Module, found: Sequence[Leaf], inputs: Mapping[str, torch.Tensor]
) -> tuple[list[str], dict[str, Any]]:
    """Names for what a model returns: its keys and fields, else the variables that it returns, else what it is.

    Args:
        module: The model.
        found: What a call returned.
        inputs: The example, by names that are taken.

    Returns:
        The names of the tensors, in order; and by name what is no tensor.
    """
    names = [leaf.name for leaf in found]
    if all(name.partition(".")[0].isdigit() or not name for name in names):
        names = _names_of_places(module, found, inputs)
    else:
        names = [_as_present(name, inputs) for name in names]
    if len(found) == 1 and names[0] in inputs:
        names = ["output"]
    pairs = list(zip(unique(names, set(inputs)), found, strict=True))
    outputs = [name for name, leaf in pairs if leaf.is_tensor]
    return outputs, {name: leaf.value for name, leaf in pairs if not leaf.is_tensor}


def _as_present(name: str, inputs: Mapping[str, torch.Tensor]) -> str:
    """A cache that comes out under the name of the one that goes in: `past_key_values.0.key` → `present.0.key`."""
    cached = _CACHED.fullmatch(name)
    if cached is not None and cached["cache"].startswith(_PAST):
        return f"{_PRESENT}.{cached['place']}"
    return f"{_PRESENT}{name.removeprefix(_PAST)}" if name in inputs and name.startswith(_PAST) else name


def _names_of_places(
    module: nn.Module, found: Sequence[Leaf], inputs: Mapping[str, torch.Tensor]
) -> list[str]:
    """Names where the model returns a tensor or a tuple of several things."""
    places = [int(leaf.name.partition(".")[0] or 0) for leaf in found]
    returned: Sequence[str | None] = _returned_variables(module) or ()
    if len(returned) <= max(places, default=0) or (len(returned) == 1 and len(found) > 1):
        returned = [None] * (max(places, default=0) + 1)
    returned = [None if name in inputs else name for name in returned]  # what it was before is another value
    unnamed = {place for place in places if returned[place] is None}
    logits = [leaf for leaf in found if is_logits(leaf.value, module, inputs.values())]
    caches = {match["cache"] for leaf in found if (match := _CACHED.fullmatch(leaf.name)) is not None}
    names = []
    for place, leaf in zip(places, found, strict=True):
        own, inner = returned[place], leaf.name.partition(".")[2]
        cached = _CACHED.fullmatch(leaf.name)
        if cached is not None and len(caches) == 1:
            own, inner = _PRESENT, cached["place"]
        elif [leaf] == logits and (own is None or len(own) == 1):  # `x` is no more of a name than none
            own = "logits"
        elif own is None:
            own = "output" if len(unnamed) == 1 and place == 0 else f"output_{place}"
        names.append(f"{own}.{inner}" if inner else own)
    return names


def is_logits(value: Any, module: nn.Module, inputs: Iterable[torch.Tensor]) -> bool:
    """Whether an output (..., v) has one score for each of the v token ids that a model takes.

    The model looks ids up in an embedding of v rows, v is no width of another of its embeddings, and what it returns
    are not probabilities.
    """
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    size = value.shape[-1]
    if size not in {table.num_embeddings for table in tables} - {table.embedding_dim for table in tables}:
        return False
    if all(each.is_floating_point() or each.dtype is torch.bool for each in inputs):
        return False
    sums = value.detach().float().sum(-1)
    return not (bool((value >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3))


def _returned_variables(module: nn.Module) -> list[str | None] | None:
    """The variable at each place of forward's `return a, b`, None for an expression; None if its returns differ."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    returns = [node.value for node in _own_nodes(tree.body[0]) if isinstance(node, ast.Return) and node.value]
    rows = [list(value.elts) if isinstance(value, ast.Tuple) else [value] for value in returns]
    if not rows or len({len(row) for row in rows}) > 1:
        return None
    return [_agreed_name(column) for column in zip(*rows, strict=True)]


def _agreed_name(items: Iterable[ast.expr]) -> str | None:
    """The variable that stands at one place of all returns."""
    names = {item.id for item in items if isinstance(item, ast.Name)}
    return names.pop() if len(names) == 1 else None


def _own_nodes(function: ast.AST) -> list[ast.AST]:
    """The nodes of a function without those of the functions inside it."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            nodes += [child, *_own_nodes(child)]
    return nodes


def renamed(
    names: Sequence[str], asked: Sequence[str], takes: Iterable[bool], taken: Set[str] = frozenset()
) -> list[str]:
    """Names of which the first that take one are those that were asked for, as far as they go.

    Args:
        names: As they are.
        asked: Those that the user's own export call gives; they are taken as they are.
        takes: Which of the names take one.
        taken: Names that no longer are to be had.
    """
    wanted = iter(asked)
    found = [next(wanted, name) if takes_one else name for name, takes_one in zip(names, takes, strict=True)]
    return unique(found, frozenset(taken))
