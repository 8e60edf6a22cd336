"""What an error of the tracer or the exporter is about.

Why: PyTorch raises one class for most, and says the rest in a text for people. The node that could not be translated is
in none of its errors; it is what the exporter's loop over nodes had in hand when the error went through.

Seen in torch 2.13.0 and 2.14.1 with onnxscript 0.7.2.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came of, the innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def untranslated_node(error: BaseException) -> fx.Node | None:
    """The node that the exporter failed at; None if it failed at none."""
    found = None
    for cause in causes_of(error):
        found = _node_in(cause) or found
    return found


def _node_in(error: BaseException) -> fx.Node | None:
    """The node in hand, in the innermost frame that has one."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, fx.Node) and node.op == "call_function":
            found = node
    return found


def is_unknown_operator(error: BaseException) -> bool:
    """Whether the exporter has no function for the operator."""
    from torch.onnx._internal.exporter._errors import DispatchError  # its package imports all of the exporter

    return any(isinstance(cause, DispatchError) for cause in causes_of(error))


def wants_number(error: BaseException) -> bool:
    """Whether an attribute of ONNX, which is a number, was given a value that the graph computes."""
    return "attribute type" in str(list(causes_of(error))[-1])


def depends_on_values(error: BaseException) -> bool:
    """Whether a trace stopped because the values of tensors decide how it goes on."""
    return isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error).lower()


def fixes_size(error: BaseException) -> bool:
    """Whether a trace holds for one size only of what was to be free."""
    return str(error).strip().startswith("Constraints violated")
