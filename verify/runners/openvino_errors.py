"""Errors of OpenVINO, read from their text, and what its CPU does in silence: the node, and the line of the model.

    While validating ONNX node '<Node(Scan): scan.0>': Check '…' failed at …: … Number of Scan node inputs (2) is …
    No conversion rule found for operations: com.microsoft.MoE
    [CPU] Reshape node with name 'y' Check '…' failed at …: [cpu]reshape: the shape of input data (5) conflicts …

OpenVINO names a node by its first output, an operator without a rule by its type alone, and one that its optimiser
made by a name of its own; what that was made from stands in the compiled model.

Seen in openvino 2026.4.1. Canaries fail when another version words them differently, or when a fault that is refused
here is mended: `tests/verify/test_openvino_errors.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from moe_export.verify.bodies import all_nodes, bodies
from moe_export.verify.runner import shorten

if TYPE_CHECKING:
    import onnx

_SCAN_READS = (
    "the body of a Scan reads a value that is computed outside, which OpenVINO (2026.4) does not take",
    "--target openvino hands such values in as states",
)
# A value that a body reads is counted among its inputs, and then is missing among the node's inputs or its outputs.
_SCAN = re.compile(r"Number of Scan node inputs|num_scan_outputs can't be negative")
_NO_SEQUENCE = (
    "OpenVINO (2026.4) drops what a sequence holds before the loop, or corrupts its memory",
    "--target openvino, or --experts blocks, carries no sequence through a loop",
)
_ALL_AXES = (
    "OpenVINO (2026.4) overlooks the attribute axes of {op} and reduces all of them",
    "--target openvino writes it by sums; from --opset 18 on the axes are an input, which it reads",
)
_OVERLOOKED = ("ReduceL1", "ReduceLogSum", "ReduceLogSumExp")
_VALIDATED = re.compile(r"ONNX node '<Node\((?P<op>[\w.]+)\): (?P<outputs>[^>]+)>'")
_NO_RULE = re.compile(r"No conversion rule found for operations: (?P<ops>[\w., -]+?)(?= To |\n|$)")
_AT_RUN = re.compile(r"\[CPU\] \w+ node with name '(?P<name>[^']+)'")
_CHECKED = re.compile(r"(?:Exception from|Check '.*?' failed at) \S+?:\d+:", re.DOTALL)
_CALLED = re.compile(r"^.*FrontEnd API failed with \w+:", re.DOTALL)
_NO_MODEL = ("Error during import of ONNX model", "Please check if the model format is supported")


def reason_of(error: Exception) -> str:
    """The last sentence of a message: without the places in OpenVINO's sources, and what it says of each layer."""
    if match := _NO_RULE.search(str(error)):
        return match[0].rstrip()
    if _SCAN.search(str(error)):
        return _SCAN_READS[0]
    text = _CALLED.sub("", str(error).partition("Summary:")[0])
    parts = [" ".join(part.split()) for part in _CHECKED.split(text)]
    return shorten(next((part for part in reversed(parts) if part), "it gives no reason"), 400)


def is_no_model(error: Exception) -> bool:
    """Whether the file is truncated or not an ONNX model."""
    return any(text in str(error) for text in _NO_MODEL)


def hint_for(error: Exception) -> str | None:
    """The option that avoids a refusal; None if none is known."""
    if _SCAN.search(str(error)):
        return _SCAN_READS[1]
    return "--target openvino writes standard operators only" if _NO_RULE.search(str(error)) else None


def nodes_of(
    error: Exception, graph: onnx.GraphProto, made_from: Callable[[str], Iterable[str]] = lambda name: ()
) -> list[onnx.NodeProto]:
    """The nodes that a message is about, in the graph's order; empty where it names none.

    Args:
        error: OpenVINO's.
        graph: The graph that it read.
        made_from: Names of what a node of the compiled model was made from.
    """
    text = str(error)
    if match := _NO_RULE.search(text):
        operators = {each.strip() for each in match["ops"].split(",")}
        return [node for node in all_nodes(graph) if _operator(node) in operators][:1]
    names: set[str] = set()
    for match in _VALIDATED.finditer(text):
        names |= {each.strip() for each in match["outputs"].split(",")}
    if not names and (match := _AT_RUN.search(text)):
        names = {match["name"], *made_from(match["name"])}
    return [node for node in all_nodes(graph) if names & {node.name, *node.output} - {""}]


def place_of(node: onnx.NodeProto) -> str:
    """`node Scan recurrence.scan, model.py:12, module mixer`, as far as the graph says."""
    facts: Mapping[str, str] = {entry.key: entry.value for entry in node.metadata_props}
    module = facts.get("module", "")
    name = f"node {_operator(node)} {node.name or node.output[0]}"
    return ", ".join(part for part in (name, facts.get("source", ""), module and f"module {module}") if part)


def miscomputed(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, str, str] | None:
    """A node that OpenVINO is known to compute wrongly without a word, why, and what avoids it; None if there is none.

    A loop that carries a sequence may end the whole process, so such a graph is not run at all.
    """
    for node in all_nodes(graph):
        carried = [value for body in bodies(node).values() for value in body.input]
        if node.op_type == "Loop" and any(value.type.HasField("sequence_type") for value in carried):
            return node, *_NO_SEQUENCE
        if node.op_type in _OVERLOOKED and any(each.name == "axes" for each in node.attribute):
            return node, _ALL_AXES[0].format(op=node.op_type), _ALL_AXES[1]
    return None


def _operator(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
