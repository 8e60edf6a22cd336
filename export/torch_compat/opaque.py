"""`opaque_node`: a node of a traced graph that the exporter carries into ONNX as it is; and what such a node says.

Why: `torch.onnx.ops.symbolic`, which is public, makes one while a model runs, and a graph that is traced already is not
run again. So the node is written as that function would trace it, and read as it writes it.

Seen in torch 2.13.0 and 2.14.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from onnx_ir import tensor_adapters
from torch import fx
from torch.onnx.ops import _symbolic_impl

_OPAQUE = {
    torch.ops.onnx_symbolic._symbolic.default,
    torch.ops.onnx_symbolic._symbolic_multi_out.default,
}


def opaque_node(
    graph: fx.Graph,
    operator: tuple[str, str],
    inputs: Sequence[fx.Node],
    attributes: Mapping[str, int],
    dtype: torch.dtype,
    shape: Sequence[int | fx.Node],
) -> fx.Node:
    """Write the node where the graph inserts.

    Args:
        graph: Changed.
        operator: Its domain and its name in ONNX; version 1.
        inputs: Of the node.
        attributes: Of the node.
        dtype: Of its one output.
        shape: Of its one output: numbers, and nodes that are sizes.
    """
    domain, name = operator
    encoded = _symbolic_impl.EncodedAttrs.from_dict(dict(attributes))
    return graph.call_function(
        torch.ops.onnx_symbolic._symbolic.default,
        (list(inputs), name, int(tensor_adapters.from_torch_dtype(dtype))),
        {
            "shape": list(shape),
            "domain": domain,
            "version": 1,
            "metadata_props_keys": [],
            "metadata_props_values": [],
            **dataclasses.asdict(encoded),
        },
    )


def opaque_attributes(node: fx.Node) -> dict[str, Any]:
    """The integers, and lists of integers, among the attributes of such a node, by name."""
    given = node.kwargs
    names, kinds, places = (given[f"attr_{each}"] for each in ("keys", "types", "pos"))
    integers: Any = given["attr_ints"]
    found = {}
    for name, kind, (start, end) in zip(names, kinds, places, strict=True):  # type: ignore[arg-type]
        if kind == "i":
            found[name] = integers[start]
        elif kind == "is":
            found[name] = list(integers[start:end])
    return found


def opaque_operator(node: fx.Node) -> tuple[str, str] | None:
    """The domain and the name in ONNX of such a node; None for any other."""
    if node.target in _OPAQUE:
        return str(node.kwargs["domain"]), str(node.args[1])
    return None
