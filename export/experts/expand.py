"""Expand outlined MoE blocks: opaque nodes of an ONNX model become the nodes of a lowering."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch.export import ExportedProgram

from moe_export.einsum_rewrite import rewrite_program
from moe_export.errors import Code, NotExportableError
from moe_export.export.axes.chosen import names_experts
from moe_export.export.experts import contrib
from moe_export.export.experts.batch import trace_batched
from moe_export.export.experts.body_parts import BodyParts, split_body
from moe_export.export.experts.choose import IN_WORDS, LOWERINGS, Choice, Lowering, Target, choose, instead
from moe_export.export.experts.one_at_a_time import Opaque, guarded
from moe_export.export.experts.outline import DOMAIN, NUMBER, OPERATOR, Block
from moe_export.export.experts.trt_moe import add_meaning
from moe_export.export.experts.weights import Weight
from moe_export.export.gates.region import scope_of
from moe_export.export.onnx.decompositions import decompose
from moe_export.export.onnx.fourier import TRANSLATIONS as FOURIER
from moe_export.export.onnx.provenance import mark_block
from moe_export.export.onnx.reshapes import settle_axes, settle_reshapes
from moe_export.export.torch_compat.caches import cache_patches
from moe_export.export.torch_compat.failures import fixes_size
from moe_export.export.tracing.trace import quiet
from moe_export.graph_builder import GraphBuilder

Write = Callable[[GraphBuilder, Lowering, Opaque], ir.Value]
"""Writes a block by a lowering's name; returns the block's result."""


def expand_experts(
    model: ir.Model,
    blocks: Sequence[Block],
    choice: Choice,
    target: Target = "onnxruntime-cpu",
    write: Write | None = None,
    bodies: Bodies | None = None,
    *,
    packed: bool = False,
) -> list[str]:
    """Expand every opaque node of a model, in place.

    Args:
        model: The model as torch's exporter made it.
        blocks: What the opaque nodes mean, by their number.
        choice: The lowering, or `auto`.
        target: The engine that the graph is for, by which `auto` chooses.
        write: Writes a block; by default all of it, rather than one rank's part.
        bodies: Bodies that are translated already, if several graphs are made from one trace.
        packed: Whether the experts' weights will be packed.

    Returns:
        A line for each block, for the report.

    Raises:
        NotExportableError: A body cannot be translated to ONNX, or the requested lowering cannot write a block.
    """
    notes = []
    bodies = bodies or Bodies()
    for node in [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]:
        block = blocks[node.attributes[NUMBER].as_int()]
        name, reason = choose(choice, block.experts.count, target, packed=packed), ""
        opaque = _opaque(node, block, model, bodies)
        mark_block(node, "experts", module_of(block))
        builder, form = _builder(model, node), write or _write
        try:
            result = form(builder, name, opaque)
        except NotExportableError as error:
            if choice != "auto":
                error.where = error.where or block.experts.line
                raise
            builder, result, name, reason = _simpler(model, node, opaque, name, error, form)
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], builder.nodes, node.outputs, [result]
        )
        found = f"{block.experts.count} experts at {block.experts.line}"
        notes.append(f"{found}: {IN_WORDS[name]} (lowered as {name!r}{reason})")
    if notes:
        model.opset_imports.pop(DOMAIN, None)
        if any(node.domain == contrib.DOMAIN for node in model.graph):
            model.opset_imports[contrib.DOMAIN] = 1
        add_meaning(model)
        with quiet():
            optimizer.fold_constants(model)
            RemoveUnusedNodesPass()(model)
    return notes


def _simpler(
    model: ir.Model, node: ir.Node, block: Opaque, name: Lowering, error: NotExportableError, write: Write
) -> tuple[GraphBuilder, ir.Value, Lowering, str]:
    """Write a block by the next simpler lowering that can: its builder, result and name, and why no other could."""
    reason = ""
    while True:
        reason += f", not {name!r}: {error.what}"
        simpler = instead(name, block.count)
        if simpler == name:
            raise error
        builder, name = _builder(model, node), simpler
        try:
            return builder, write(builder, name, block), name, reason
        except NotExportableError as another:
            error = another


def _builder(model: ir.Model, node: ir.Node) -> GraphBuilder:
    return GraphBuilder(model.graph, f"experts_{node.attributes[NUMBER].as_int()}", node)


def module_of(block: Block) -> str:
    """The innermost module that the choice and the result of a block both run in."""
    chosen, result = (scope_of(node) for node in (block.experts.indices, block.experts.result))
    both = [one for one, other in zip(chosen, result, strict=False) if one == other]
    return both[-1] if both else ""


def _write(builder: GraphBuilder, name: Lowering, block: Opaque) -> ir.Value:
    if not names_experts(block.meaning.indices, block.count):
        block = guarded(builder, block)
    return LOWERINGS[name](builder, block)


def _body(program: ExportedProgram, block: Block, opset: int) -> BodyParts:
    """A body in ONNX, split into its parts."""
    program, _ = rewrite_program(program)
    decompose(program.graph)
    try:
        with quiet(), torch.no_grad(), cache_patches():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, verbose=False, custom_translation_table=FOURIER
            )
    except Exception as error:
        raise NotExportableError(
            "an expert could not be translated to ONNX",
            code=Code.EXPERT_BODY,
            where=block.experts.line,
            hint=str(error).split("\n", 1)[0],
        ) from error
    assert exported is not None
    settle_reshapes(exported.model.graph, may_be_zero=lambda size: not isinstance(size, int))
    settle_axes(exported.model.graph)
    return split_body(exported.model.graph, len(block.experts.shared))


class Bodies:
    """Bodies in ONNX: equal layers share one program (see `outline_experts`), which is translated once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[ExportedProgram, BodyParts]] = {}
        self._batched: dict[tuple[int, int], tuple[Block, BodyParts]] = {}

    def of(self, block: Block, opset: int) -> BodyParts:
        """The body of a block."""
        key = (id(block.program), opset)
        if key not in self._made:
            self._made[key] = (block.program, _body(block.program, block, opset))
        return self._made[key][1]

    def batched(self, block: Block, opset: int) -> BodyParts:
        """The body of a block for several experts at once."""
        key = (id(block), opset)
        if key not in self._batched:
            self._batched[key] = (block, _body(_batched(block), block, opset))
        return self._batched[key][1]


def _batched(block: Block) -> ExportedProgram:
    experts = block.experts
    try:
        return trace_batched(experts.body, block.example, len(experts.shared))
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        if fixes_size(error):
            why = "one of its operators takes a fixed number of them, as a convolution does"
        raise NotExportableError(
            f"an expert cannot be computed for several experts at once: {why}",
            code=Code.EXPERTS_FORM,
            where=experts.line,
            hint="--experts slices and --experts loop take one expert at a time",
        ) from error


def _opaque(node: ir.Node, block: Block, model: ir.Model, bodies: Bodies) -> Opaque:
    opset = model.opset_imports[""]
    values = [value for value in node.inputs if value is not None]
    experts = block.experts
    shared, rest = values[1 : 1 + len(experts.shared)], values[1 + len(experts.shared) :]
    weights: list[Weight] = []
    for weight in experts.weights:
        size = experts.count if weight.stack is None else 1
        weights.append(rest[:size] if weight.stack is None else rest[0])
        rest = rest[size:]
    result = experts.result.meta["val"]
    return Opaque(
        indices=values[0],
        shared=shared,
        weights=weights,
        parts=bodies.of(block, opset),
        batched=lambda: bodies.batched(block, opset),
        count=experts.count,
        slots=experts.slots,
        hidden=[size if isinstance(size, int) else None for size in result.shape[1:]],
        opset=opset,
        meaning=experts,
    )
