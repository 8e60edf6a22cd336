"""Where each node comes from: module path, source line, PyTorch operator, in metadata that Netron shows.

The exporter stores whole stack traces and Python reprs; kept are short facts that a person can use:

| key | on | holds |
|---|---|---|
| `module`, `source`, `torch` | all that tell | path of the module, line of the model's code, operator of PyTorch |
| `fx` | the node that ends an operator | the value's name in the traced program |
| `einsum` | what an einsum became | its equation |
| `block` | what experts or a recurrence were written as | the kind and the path of the block's module |
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import onnx_ir as ir

from moe_export.export.frontend.source import line_of
from moe_export.export.torch_compat.metadata import classes_of, forget, module_of, stack_trace_of, traced_as

MODULE, SOURCE, OPERATOR, BLOCK, FX, EINSUM = "module", "source", "torch", "block", "fx", "einsum"
_ADDRESS = re.compile(r"<(?:built-in )?function (\S+)(?: at 0x[0-9a-f]+)?>")
_EQUATION = re.compile(r'File "<einsum (?P<equation>[^"]+)>"')


def shorten_metadata(model: ir.Model, scope: str, folder: Path) -> None:
    """Replace the exporter's metadata by those of the module's docstring.

    Args:
        model: Changed in place.
        scope: The name that the model has as a module.
        folder: Source lines are told relative to it.
    """
    for node in model.graph.all_nodes():
        kept = _facts(node, scope, folder)
        forget(node)
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
            readers = [use.node.metadata_props for output in node.outputs for use in output.uses()]
            makers = [value.producer() for value in node.inputs if value is not None]
            others = readers or [maker.metadata_props for maker in makers if maker is not None]
            known = [facts for facts in others if MODULE in facts]
            if known:  # of several the outermost: what it makes goes on from there
                facts = min(known, key=lambda facts: facts[MODULE].count("."))
                node.metadata_props.update({key: facts[key] for key in (MODULE, SOURCE) if key in facts})


def _facts(node: ir.Node, scope: str, folder: Path) -> dict[str, str]:
    facts = {}
    module, classes, trace, traced = module_of(node), classes_of(node), stack_trace_of(node), traced_as(node)
    if module:
        facts[MODULE] = strip_scope(module, scope)
    line = line_of(trace)
    einsum = _EQUATION.search(trace or "")
    if einsum is not None:
        facts[EINSUM] = einsum["equation"]
    if traced is not None and re.fullmatch(rf"node_{traced}(__\d+)?", str(node.name)):
        facts[FX] = traced
    if line:
        facts[SOURCE] = relative_line(line, folder)
    if BLOCK in node.metadata_props:
        kind, _, path = node.metadata_props[BLOCK].partition(":")
        facts[BLOCK] = f"{kind}:{strip_scope(path, scope) if path else facts.get(MODULE, 'model')}"
    if classes:
        facts[OPERATOR] = operator_name(classes[-1])
    return facts


def operator_name(target: object) -> str:
    """An operator as the metadata have it: `aten.add.Tensor`; a Python function by its name, not by its address."""
    return _ADDRESS.sub(r"\1", str(target))


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


def source_location(node: ir.Node) -> str:
    """Where a node comes from, for an error: its source line and module, else its name."""
    line = node.metadata_props.get(SOURCE) or line_of(stack_trace_of(node))
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
