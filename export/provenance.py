"""Where each node comes from: module path, source line, PyTorch operator, in metadata that Netron shows.

The exporter stores whole stack traces and Python reprs; kept are three short facts a person can use, and, on nodes that
a block of experts or a recurrence was written as, `block`: its kind and the path of its module.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import onnx_ir as ir

from moe_export.export.source import line_of

MODULE, SOURCE, OPERATOR, BLOCK = "module", "source", "torch", "block"
_PREFIX = "pkg."


def shorten_metadata(model: ir.Model, scope: str, folder: Path) -> None:
    """Replace the exporter's metadata by `module`, `source` (relative to the model's folder) and `torch`."""
    for node in model.graph.all_nodes():
        kept = _facts(node, scope, folder)
        for key in [key for key in node.metadata_props if key.startswith(_PREFIX) or key == "namespace"]:
            del node.metadata_props[key]
        node.metadata_props.update(kept)
        for output in node.outputs:
            output.metadata_props.clear()
    _complete(model)
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _complete(model: ir.Model) -> None:
    """Nodes that an optimiser made without a word belong to whom they work for, else to whom they continue."""
    for node in reversed(list(model.graph.all_nodes())):
        if MODULE not in node.metadata_props and OPERATOR not in node.metadata_props:
            readers = [use.node for output in node.outputs for use in output.uses()]
            makers = [value.producer() for value in node.inputs if value is not None]
            for other in (*readers, *makers):
                if other is not None and MODULE in other.metadata_props:
                    kept = {
                        key: other.metadata_props[key]
                        for key in (MODULE, SOURCE)
                        if key in other.metadata_props
                    }
                    node.metadata_props.update(kept)
                    break


def _facts(node: ir.Node, scope: str, folder: Path) -> dict[str, str]:
    facts = {}
    scopes = _literal_list(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    classes = _literal_list(node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "[]"))
    module = next(
        (name for name in reversed(scopes[:-1]) if name and not name.startswith("_empty_nn_module")), ""
    )
    if module:
        facts[MODULE] = strip_scope(module, scope)
    line = line_of(node.metadata_props.get("pkg.torch.onnx.stack_trace"))
    if line:
        facts[SOURCE] = relative_line(line, folder)
    if BLOCK in node.metadata_props:
        kind, _, path = node.metadata_props[BLOCK].partition(":")
        facts[BLOCK] = f"{kind}:{strip_scope(path, scope) if path else facts.get(MODULE, 'model')}"
    if classes:
        facts[OPERATOR] = classes[-1]
    return facts


def mark_block(node: ir.Node, kind: str, path: str = "") -> None:
    """Mark a node as a part of a block: `experts` or `recurrence`.

    Args:
        node: Of the block.
        kind: Of block.
        path: The module whose work the block does, as traced; "" for the one that the node itself is of.
    """
    node.metadata_props[BLOCK] = f"{kind}:{path}"


def strip_scope(path: str, scope: str) -> str:
    """Module paths as the user writes them: `model.layers.0` → `layers.0`; the model itself stays `model`."""
    return path.removeprefix(f"{scope}.") if path != scope else path


def place_of(node: ir.Node) -> str:
    """Where a node comes from, for an error: its source line and module, else its name."""
    line = node.metadata_props.get(SOURCE) or line_of(node.metadata_props.get("pkg.torch.onnx.stack_trace"))
    module = node.metadata_props.get(MODULE)
    place = line or f"node {node.name}"
    return f"{place} (module {module})" if module else place


def relative_line(line: str, folder: Path) -> str:
    """`file:line` as the metadata have it: relative to the model's folder, a library's from its package on."""
    path, _, number = line.rpartition(":")
    try:
        inside = os.path.relpath(path, folder)
    except ValueError:  # another drive
        inside = path
    if inside.startswith(".."):
        parts = Path(path).parts
        cut = parts.index("site-packages") + 1 if "site-packages" in parts else max(len(parts) - 2, 0)
        inside = str(Path(*parts[cut:]))
    return f"{inside}:{number}"


def _literal_list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []
