"""What an operator says of itself, and PyTorch's functions that have no public name.

- `arguments_of`: the names and types of an operator's arguments. Why: `OpOverload._schema` is the only place that has
  them; `torch.library` writes schemas and does not read them.
- `is_functional`: whether no operator of a graph writes into its input, or runs a graph of its own. Why: the same
  schema says so, and the type of operators with graphs has no public name.
- `is_batched`: whether `torch.vmap` is in a trace. Why: the calls that begin and end it there have no public name.
- `effect_of`, `without_writing`: whether an operator writes, returns a view, or is made of others; the same operator
  without the write. Why: `OpOverload._schema` and the table of kernels say so, both private.
- `writes_to`: whether a large tensor was written to, without comparing its values. Why: it is what autograd counts by,
  under a private name.
- `owner_of`: what a tensor is a view of. Why: autograd keeps it under a private name.
- `GROUPED_MM`: the public function, and the private one that it calls, which is what libraries call, too.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import fx

GROUPED_MM = (torch.nn.functional.grouped_mm, torch._grouped_mm)


def arguments_of(target: Any) -> list[Any]:
    """The arguments of an operator, in order: each has `name`, `type` and `kwarg_only`; none of another function."""
    schema = getattr(target, "_schema", None)
    return list(schema.arguments) if schema is not None else []


def writes_to(tensor: torch.Tensor) -> int:
    """PyTorch's count of writes to a tensor; 0 of one for inference, whose writes are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def owner_of(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor is a view of, whose writes are counted together with its own; itself if it is none."""
    return tensor if tensor._base is None else tensor._base


def is_functional(graph: fx.Graph) -> bool:
    """Whether a graph is right without functionalization: nothing in it writes, or holds a graph of its own."""
    return not any(
        node.op in ("get_attr", "call_module")
        or (
            node.op == "call_function"
            and (
                isinstance(node.target, torch._ops.HigherOrderOperator)
                or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
            )
        )
        for node in graph.nodes
    )


def is_batched(graph: fx.Graph) -> bool:
    """Whether `torch.vmap` is in a trace: as calls that begin and end it; between them, values lack the batch axis."""
    return any(
        str(getattr(node.target, "__module__", "")).startswith("torch._functorch") for node in graph.nodes
    )


class Effect(Enum):
    """What an operator does beside computing a value of its own."""

    NONE = auto()
    WRITES = auto()
    """It writes into its first argument."""
    FILLS = auto()
    """It writes its result into its argument `out`."""
    VIEWS = auto()
    """It may return a view of an argument."""
    COMPOSITE = auto()
    """It may return a view, and is made of other operators (`reshape`)."""
    UNKNOWN = auto()


@cache
def effect_of(target: Any) -> Effect:
    """The effect of a node's target; `UNKNOWN` for writes elsewhere, changed shapes, and graphs inside."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return Effect.UNKNOWN
    if not isinstance(target, torch._ops.OpOverload):
        return Effect.NONE
    aliases = [argument for argument in target._schema.arguments if argument.alias_info is not None]
    written = [each for each in aliases if each.alias_info is not None and each.alias_info.is_write]
    if torch.Tag.inplace_view in target.tags:
        return Effect.UNKNOWN
    if written:
        if len(aliases) != 1:
            return Effect.UNKNOWN
        if written == target._schema.arguments[:1]:
            return Effect.WRITES
        return Effect.FILLS if written[0].name == "out" else Effect.UNKNOWN
    name = f"{target._schema.name}.{target._schema.overload_name}".rstrip(".")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    # `dropout` returns its input where it drops nothing, and its schema does not say so.
    if composite and (aliases or torch.Tag.maybe_aliasing_or_mutating in target.tags):
        return Effect.COMPOSITE
    return Effect.VIEWS if aliases else Effect.NONE


def without_writing(target: Any) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor` and for `aten.add.out`; None where PyTorch has no such operator."""
    name, overload = target._schema.name.partition("::")[2], target._overloadname
    if effect_of(target) is Effect.FILLS:
        takes = [(each.name, str(each.type)) for each in target._schema.arguments if each.name != "out"]
        others = [getattr(target._overloadpacket, other) for other in target._overloadpacket.overloads()]
        alike = [
            other
            for other in others
            if [(each.name, str(each.type)) for each in arguments_of(other)] == takes
        ]
        found = alike[0] if len(alike) == 1 else None
    elif name.endswith("_"):
        found = getattr(getattr(getattr(torch.ops, target.namespace), name[:-1], None), overload, None)
    else:
        found = None
    return found if effect_of(found) is Effect.NONE else None
