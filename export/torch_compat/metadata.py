"""What the exporter tells of a node: in ONNX as texts, which this file alone reads; of modules, in the trace.

Why: the texts are Python's own notation of objects, and PyTorch promises neither their keys nor their form. It has no
other way to tell what a node of ONNX was translated from: the exporter decomposes a program once more before it
translates it, so neither names nor nodes of the program that it was given say so.

    pkg.torch.onnx.name_scopes       ['', 'layers.0', 'layers.0.gate', 'mul_3']
    pkg.torch.onnx.class_hierarchy   ['model.Block', 'torch.nn.modules.linear.Linear', 'aten.linear.default']
    pkg.torch.onnx.fx_node           %mul_3 : [num_users=1] = call_function[target=operator.mul](args = (%n, 1.05), ...)
    pkg.torch.onnx.stack_trace       File "model.py", line 12, in forward ...

Seen in torch 2.13.0 and 2.14.1. What only knows ONNX reads them, too: nothing here imports PyTorch.
"""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

_PREFIX = "pkg."
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_NODE = "pkg.torch.onnx.fx_node"
_TRACE = "pkg.torch.onnx.stack_trace"

_NAME = re.compile(r"%(?P<name>\w+) :")
_OF_NUMBERS = re.compile(
    r"call_function\[target=(?:operator(?!\.getitem)|math|builtins|torch\.sym_\w+|torch\._sym_\w+)\b"
)
_CONSTANT = re.compile(r"(?<![%\w.])-?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
_OPAQUE = "_symbolic"
_NO_MODULE = "_empty_nn_module"  # stands for the module of what a decomposition made in no module


def is_module_path(path: str) -> bool:
    """Whether a path among those of a node names a module; the tracer has a word for "in no module"."""
    return bool(path) and not path.startswith(_NO_MODULE)


def is_opaque(operator: str) -> bool:
    """Whether a name among those of operators is that of nodes that are carried into ONNX as they are (`opaque`)."""
    return operator.startswith(_OPAQUE)


def scopes_of(node: ir.Node) -> list[str] | None:
    """Paths of the modules that a node is in, outermost first; None if it tells nothing."""
    text = node.metadata_props.get(_SCOPES)
    return None if text is None else _list(text)[:-1]


def module_of(node: ir.Node) -> str:
    """The path of the innermost module that a node is in; "" if it is in none, or tells nothing."""
    return next((path for path in reversed(scopes_of(node) or []) if is_module_path(path)), "")


def classes_of(node: ir.Node) -> list[str]:
    """The classes of these modules, and behind them the operator of PyTorch."""
    return _list(node.metadata_props.get(_CLASSES, "[]"))


def stack_trace_of(node: ir.Node) -> str | None:
    """The lines of Python that a node comes from."""
    return node.metadata_props.get(_TRACE)


def traced_as(node: ir.Node) -> str | None:
    """The name of the value in the exporter's program that a node was translated from."""
    found = _NAME.match(node.metadata_props.get(_NODE, ""))
    return found["name"] if found is not None else None


def is_translation_of(node: ir.Node, operator: str) -> bool:
    """Whether a node was translated from an ATen operator of this name, or is a part of what was."""
    return f"target=torch.ops.aten.{operator}." in node.metadata_props.get(_NODE, "")


def computes_number(node: ir.Node) -> bool:
    """Whether a node was translated from a function on Python's numbers, as sizes are."""
    return _OF_NUMBERS.search(node.metadata_props.get(_NODE, "")) is not None


def numbers_in(node: ir.Node) -> list[float]:
    """Python's own constants among the arguments that a node was translated from."""
    arguments = node.metadata_props.get(_NODE, "").partition("args = ")[2]
    return [float(number) for number in _CONSTANT.findall(arguments)]


def forget(node: ir.Node) -> None:
    """Take away all that the exporter tells."""
    for key in [key for key in node.metadata_props if key.startswith(_PREFIX) or key == "namespace"]:
        del node.metadata_props[key]


def _list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []
