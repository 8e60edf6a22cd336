"""Outline each MoE block that was understood: one opaque node takes its place, and is expanded after translation.

The node is `moe_export::Experts(indices, *shared, *weights)` with the block's number as its attribute. torch's
exporter carries it into ONNX as it is, and `experts/one_at_a_time` replaces it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.errors import Code, RefusedError
from moe_export.export.axes.operators import ZEROS
from moe_export.export.experts.batch import trace_body
from moe_export.export.experts.body import Experts
from moe_export.export.experts.canonical import text_of
from moe_export.export.experts.flat_tokens import with_flat_tokens
from moe_export.export.experts.mixing import check_rows
from moe_export.export.experts.recognise import Recognised, find_experts
from moe_export.export.gates.gate import values_of
from moe_export.export.torch_compat.opaque import opaque_node
from moe_export.export.tracing.programs import copied_module, with_module
from moe_export.export.tracing.trace import Traced

DOMAIN, OPERATOR, NUMBER = "moe_export", "Experts", "block"

_aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """An MoE block that was replaced by an opaque node.

    Attributes:
        experts: What it means.
        program: Its body, with a dynamic number of rows.
        example: What the body was traced with.
    """

    experts: Experts
    program: ExportedProgram
    example: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Outlined:
    """A traced model with its MoE blocks made opaque.

    Attributes:
        traced: The model; its program can be translated, not run.
        blocks: By the number that their node carries.
        refused: Why other loops over experts stay as they were written, with their lines.
    """

    traced: Traced
    blocks: tuple[Block, ...]
    refused: tuple[str, ...]


def outline_experts(traced: Traced) -> Outlined:
    """Find the MoE blocks of a model and replace each by one opaque node; refuse with a reason what is not one."""
    blocks: list[Block] = []
    found = _found(traced.program)
    refused = list(found.refused)
    # The model runs once for all blocks: a run a block would take as many runs as there are layers.
    nodes = tuple(dict.fromkeys(node for experts in found.blocks for node in _examples(experts)))
    whole = dataclasses.replace(traced, program=found.program)
    values = dict(zip(nodes, values_of(whole, nodes), strict=True)) if nodes else {}
    programs: dict[str, ExportedProgram] = {}
    for experts in found.blocks:
        try:
            blocks.append(_block(experts, values, programs))
        except RefusedError as error:
            why = f"the loop over experts at {experts.line} stays as it was written: {error}"
            refused.append(Code.EXPERTS.mark(why))
    program = _with_nodes(found.program, [block.experts for block in blocks])
    return Outlined(dataclasses.replace(traced, program=program), tuple(blocks), tuple(refused))


def _found(program: ExportedProgram) -> Recognised:
    """The blocks of a model, which has flat tokens where that shows more of them, and why others are none."""
    found = find_experts(program)
    flattened = with_flat_tokens(found.program)
    if flattened is None:
        return found
    flat = find_experts(flattened)
    if len(flat.blocks) > len(found.blocks):
        return flat
    return found if found.blocks or found.refused else found._replace(refused=flat.refused)


def _examples(experts: Experts) -> tuple[fx.Node, ...]:
    """What a block's body is tried on: indices, shared values, and of each weight the first expert's, or the stack."""
    first = [weight.separate[0] if weight.separate else weight.stack for weight in experts.weights]
    return (experts.indices, *experts.shared, *(node for node in first if node is not None))


def _block(
    experts: Experts, values: Mapping[fx.Node, torch.Tensor], programs: dict[str, ExportedProgram]
) -> Block:
    """Check that the body works row by row, and trace it with a free number of rows.

    Layers that are alike have one program, kept in `programs`: the body's text and the types of its arguments are all
    that a trace depends on.
    """
    check_rows(experts, values)
    first = _examples(experts)[1 + len(experts.shared) :]
    weights = [
        values[node] if weight.stack is None else values[node][0]
        for node, weight in zip(first, experts.weights, strict=True)
    ]
    rows = torch.arange(3) % max(1, values[experts.indices].shape[0])
    expert = torch.zeros(1, dtype=torch.int64)
    shared = [values[node] for node in experts.shared]
    arguments = (rows, torch.zeros_like(rows), expert, *shared, *weights)
    free = {0, 1, *range(3, 3 + len(shared))}
    spec = [[index in free] * value.dim() for index, value in enumerate(arguments)]
    key = _written(experts.body, arguments, spec)
    try:
        if key not in programs:
            programs[key] = trace_body(experts.body, arguments, spec)
    except Exception as error:
        raise RefusedError(f"the expert cannot be traced for any number of tokens: {error}") from error
    return Block(experts, programs[key], arguments)


def _written(body: fx.GraphModule, arguments: Sequence[torch.Tensor], spec: list[list[bool]]) -> str:
    """A body as text, with what it is traced on; one that holds tensors or modules of its own is like no other."""
    own = id(body) if any(node.op in ("get_attr", "call_module") for node in body.graph.nodes) else 0
    types = [(str(value.dtype), tuple(value.shape), value.stride()) for value in arguments]
    return f"{text_of(body)}\n{types}\n{spec}\n{own}"


def _with_nodes(program: ExportedProgram, blocks: Sequence[Experts]) -> ExportedProgram:
    """A copy of the program in which each block is one node."""
    module = copied_module(program)
    copies = dict(zip(program.graph.nodes, module.graph.nodes, strict=True))
    for number, experts in enumerate(blocks):
        _replace(module.graph, experts, number, copies)
    return with_module(program, module)


def _replace(graph: fx.Graph, experts: Experts, number: int, copies: dict[fx.Node, fx.Node]) -> None:
    result = copies[experts.result]
    start = copies[experts.start] if experts.start is not None else copies[experts.indices]
    inputs = [copies[node] for node in (experts.indices, *experts.shared)]
    for weight in experts.weights:
        inputs += (
            [copies[node] for node in weight.separate] if weight.stack is None else [copies[weight.stack]]
        )
    value = result.meta["val"]
    with graph.inserting_before(result):
        shape: list[Any] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                node = graph.call_function(_aten.sym_size.int, (start, axis))
                node.meta["val"] = size
                shape.append(node)
            else:
                shape.append(size)
        opaque = opaque_node(graph, (DOMAIN, OPERATOR), inputs, {NUMBER: number}, value.dtype, shape)
        opaque.meta = dict(result.meta)
        replacement = opaque
        if experts.overwrites:
            replacement = _where_chosen(graph, copies[experts.indices], experts.count, opaque, start)
        elif experts.start is not None and start.target not in ZEROS:
            replacement = graph.call_function(_aten.add.Tensor, (start, opaque))
        if replacement is not opaque:
            replacement.meta = dict(result.meta)
    result.replace_all_uses_with(replacement)
    copies[experts.result] = replacement


def _where_chosen(graph: fx.Graph, indices: fx.Node, count: int, rows: fx.Node, others: fx.Node) -> fx.Node:
    """The rows of the tokens whose index (N,) names one of `count` experts; of the other tokens those of `others`."""

    def call(operator: Any, *args: Any) -> fx.Node:
        node = graph.call_function(operator, args)
        node.meta["val"] = operator(*fx.map_arg(args, lambda arg: arg.meta["val"]))
        return node

    chosen = call(
        _aten.logical_and.default, call(_aten.ge.Scalar, indices, 0), call(_aten.lt.Scalar, indices, count)
    )
    for axis in range(1, rows.meta["val"].dim()):
        chosen = call(_aten.unsqueeze.default, chosen, axis)
    return call(_aten.where.self, chosen, rows, others)
