"""Replace the opaque MoE nodes of an ONNX model by the lowering that was chosen."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnxscript import optimizer

from moe_export.einsum_rewrite import rewrite_program
from moe_export.errors import NotExportableError
from moe_export.export.experts_lower import LOWERINGS, Opaque, choose
from moe_export.export.experts_onnx import Writer
from moe_export.export.experts_place import DOMAIN, NUMBER, OPERATOR, Block
from moe_export.export.trace import quiet


def write_experts(model: ir.Model, blocks: Sequence[Block], choice: str) -> list[str]:
    """Write out every opaque node of a model, in place.

    Args:
        model: As torch's exporter made it.
        blocks: What the nodes mean, by their number.
        choice: The lowering, or `auto`.

    Returns:
        A line for each block, for the report.

    Raises:
        NotExportableError: A body has no ONNX form.
    """
    notes = []
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]:
        number = node.attributes[NUMBER].as_int()
        block = blocks[number]
        name = choose(choice, block.experts.count)
        writer = Writer(model.graph, f"experts_{number}")
        result = LOWERINGS[name](writer, _opaque(node, block, _body(block, model)))
        for made in writer.nodes:
            made.metadata_props.update(node.metadata_props)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], writer.nodes, node.outputs, [result]
        )
        notes.append(f"{block.experts.count} experts at {block.experts.line}: lowered as {name!r}")
    if notes:
        model.opset_imports.pop(DOMAIN, None)
        _drop_unused_weights(model)
        with quiet():
            optimizer.fold_constants(model)
    return notes


def _drop_unused_weights(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and value not in model.graph.outputs:
            del model.graph.initializers[name]


def _body(block: Block, model: ir.Model) -> ir.Graph:
    """One expert in ONNX, at the opset of the model."""
    program, _ = rewrite_program(block.program)
    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=model.opset_imports[""], verbose=False
            )
    except Exception as error:
        raise NotExportableError(
            "an expert could not be translated to ONNX",
            where=block.experts.line,
            hint=str(error).split("\n", 1)[0],
        ) from error
    assert exported is not None
    return exported.model.graph


def _opaque(node: ir.Node, block: Block, body: ir.Graph) -> Opaque:
    values = [value for value in node.inputs if value is not None]
    experts = block.experts
    shared, rest = values[1 : 1 + len(experts.shared)], values[1 + len(experts.shared) :]
    weights: list[Sequence[ir.Value] | ir.Value] = []
    for weight in experts.weights:
        size = experts.count if weight.stack is None else 1
        weights.append(rest[:size] if weight.stack is None else rest[0])
        rest = rest[size:]
    indices = experts.indices.meta["val"]
    result = experts.result.meta["val"]
    return Opaque(
        indices=values[0],
        shared=shared,
        weights=weights,
        body=body,
        count=experts.count,
        slots=int(indices.shape[1]) if indices.dim() == 2 else 1,
        hidden=[int(size) for size in result.shape[1:]],
        metadata=copy.copy(node.metadata_props),
    )
