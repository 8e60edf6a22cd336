"""A `Traced` becomes an `onnx_ir.Model`: `translate`, then `name_at_opset` at the opset that was asked for, then
`check`.

The translation operator by operator is torch's; the names, the opset, the metadata and the checks are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moe_export.errors import Code, MoeExportError, NotExportableError
from moe_export.export.frontend.pytree import identifier, unique
from moe_export.export.onnx.decompositions import decomposed
from moe_export.export.onnx.empty_products import settle_empty_products
from moe_export.export.onnx.expands import drop_expands
from moe_export.export.onnx.fourier import TRANSLATIONS as FOURIER
from moe_export.export.onnx.naming import name_nodes, statements
from moe_export.export.onnx.opset import EXPORTER_LOWEST, set_opset
from moe_export.export.onnx.provenance import shorten_metadata
from moe_export.export.onnx.recipe_steps import fold_steps
from moe_export.export.onnx.recipes import has_recipes, is_streamed, place_recipes, without_weights
from moe_export.export.onnx.reshapes import plain_transposes, settle_axes, settle_reshapes
from moe_export.export.onnx.size_numbers import exact_sizes
from moe_export.export.onnx.transposed import mend_products
from moe_export.export.onnx.untranslated import untranslated
from moe_export.export.onnx.weight_names import name_derived, name_weights
from moe_export.export.torch_compat.caches import cache_patches, decomposed_if_needed
from moe_export.export.torch_compat.exact_rules import exact_constants
from moe_export.export.torch_compat.rewrite_rules import rules_by_operator
from moe_export.export.tracing.slices import TRANSLATIONS as SLICES
from moe_export.export.tracing.trace import Traced, quiet
from moe_export.export.tracing.traced_dims import ordered_sum, rename

_DATA_SIZE = re.compile(r"u\d+")
_PROTOBUF_LIMIT = 2**31 - 2**20


def translate(traced: Traced, opset: int) -> ir.Model:
    """The traced model operator by operator, with the exporter's names, its opaque nodes as they are.

    Args:
        traced: The model.
        opset: 17 or newer; the result has at least this one.

    Raises:
        NotExportableError: An operator has no ONNX form; names the model's line.
    """
    try:
        with quiet(), torch.no_grad(), cache_patches(), exact_constants():
            program = decomposed_if_needed(decomposed(traced.program))
            lowest = max(opset, EXPORTER_LOWEST)
            streamed = is_streamed(program)
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=lowest,
                verbose=False,
                optimize=False,
                custom_translation_table={**SLICES, **FOURIER},
            )
            assert result is not None
            exact_sizes(result.model.graph)
            name_derived(result.model.graph)
            if streamed:  # before anything computes with weights
                place_recipes(result.model)
                fold_steps(result.model.graph)
            with rules_by_operator():
                result.optimize()
    except MoeExportError:
        raise
    except Exception as error:
        raise untranslated(error) from error
    settle_reshapes(result.model.graph)
    settle_axes(result.model.graph)
    plain_transposes(result.model.graph)
    drop_expands(result.model.graph)
    RemoveUnusedNodesPass()(result.model)
    return result.model


def name_at_opset(model: ir.Model, traced: Traced, opset: int, folder: Path, root: str = "") -> None:
    """Names, metadata and the opset of a translated model, in place.

    Args:
        model: As translated, with nothing opaque left in it.
        traced: What it was translated from: inputs, outputs and dynamic dimensions get its names.
        opset: 17 or newer; the result has exactly this one.
        folder: The folder of the model's file; source lines in the metadata are relative to it.
        root: The path in the traced module below which weights have the names of the user's model.

    Raises:
        NotExportableError: An operator has no form at this opset; names the model's line.
    """
    settle_empty_products(model, traced)
    mend_products(model)
    origins = statements(model, traced.scope)
    shorten_metadata(model, traced.scope, folder)
    name_weights(model.graph, f"{traced.scope}.{root}".rstrip("."))
    name_nodes(model, origins)
    _name_values(model, traced)
    set_opset(model, opset)
    RemoveUnusedNodesPass()(model)  # what newer operators are told by inputs, older ones are by attributes


def _name_values(model: ir.Model, traced: Traced) -> None:
    """Give inputs, outputs and dimensions their names; inner values that hold one of them step aside."""
    graph = model.graph
    _separate_outputs(graph)
    wanted = dict(zip([*graph.inputs, *graph.outputs], [*traced.inputs, *traced.outputs], strict=True))
    others = [value for value in _values(graph) if value not in wanted]
    fresh = unique([value.name or "value" for value in others], set(wanted.values()))
    # Two steps, so that no value takes a name that another one still has.
    for value in wanted:
        value.name = f"__{value.name}"
    for value, name in zip(others, fresh, strict=True):
        if value.name != name:
            value.name = name
    for value, name in wanted.items():
        value.name = name
    _name_dims([*wanted, *others], traced.dim_names())
    _name_data_sizes([*graph.outputs, *others], set(traced.dim_names().values()))


def _separate_outputs(graph: ir.Graph) -> None:
    """Give every output a value of its own: an input that is returned, or a value returned twice, is copied."""
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(graph.outputs):
        if value in seen:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            copy.outputs[0].name = f"{value.name}_output_{index}"
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        seen.add(value)


def _values(graph: ir.Graph) -> list[ir.Value]:
    values: list[ir.Value] = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values += node.outputs
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                values += [*attribute.as_graph().inputs, *attribute.as_graph().initializers.values()]
    return list(dict.fromkeys(values))


def _name_dims(values: Iterable[ir.Value], names: Mapping[str, str]) -> None:
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([_named(dim, names) for dim in value.shape])


def _name_data_sizes(values: Sequence[ir.Value], own: set[str]) -> None:
    """Sizes that only the data decides have the tracer's names, `u3`; each is called after the first value that has it.

    Args:
        values: Outputs first: their names are the ones that a reader sees.
        own: Names that the user gave, which may look like the tracer's.
    """
    names: dict[str, str] = {}
    for value in values:
        for axis, dim in enumerate(value.shape or ()):
            text = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if text and _DATA_SIZE.fullmatch(text) and text not in own:
                names.setdefault(text, f"{identifier(value.name or 'value')}_dim{axis}")
    if names:
        _name_dims(values, dict(zip(names, unique(list(names.values()), own), strict=True)))


def _named(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        return None
    text = ordered_sum(rename(dim.value, names))
    return (
        int(text) if text.isdigit() else text
    )  # the tracer may still write a size that it fixed as a symbol


def check(model: ir.Model) -> None:
    """Check a model as strictly as ONNX can, with shape inference.

    Raises:
        NotExportableError: The checker refuses it.
    """
    streamed = has_recipes(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > _PROTOBUF_LIMIT and not streamed:
        return  # the checker reads such a model from its file; `serialize` does that
    try:
        onnx.checker.check_model(without_weights(model) if streamed else ir.to_proto(model), full_check=True)
    except Exception as error:
        raise NotExportableError(
            f"onnx.checker refuses the graph: {error}", code=Code.INVALID_GRAPH
        ) from error
