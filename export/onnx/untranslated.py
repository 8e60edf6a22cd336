"""Why the exporter could not translate a model: the operator as the user wrote it, and the line.

The exporter's own text speaks of what an operator was decomposed into, for pages.
"""

from __future__ import annotations

import torch
from torch import fx

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import line_and_text
from moe_export.export.torch_compat.failures import (
    causes_of,
    is_unknown_operator,
    untranslated_node,
    wants_number,
)
from moe_export.export.torch_compat.operators import arguments_of
from moe_export.export.tracing.randomness import may_be_random


def untranslated(error: Exception) -> NotExportableError:
    """The refusal that an error of `torch.onnx.export` comes to."""
    *_, root = causes_of(error)
    node = untranslated_node(error)
    last = next((line.strip() for line in str(root).splitlines() if line.strip()), "")
    if node is None:
        return NotExportableError(
            f"the model could not be translated to ONNX: {last or type(root).__name__}",
            code=Code.NO_OPERATOR,
            hint="run with --debug for the exporter's own words",
        )
    name, where = _operator(node), line_and_text(node.meta.get("stack_trace"))
    if may_be_random(node):
        return NotExportableError(
            f"operator {name} draws random numbers, though the example's outputs do not show it",
            code=Code.RANDOM,
            where=where,
            hint="take the random numbers as an input; dropout: F.dropout(x, p, training=self.training)",
        )
    if is_unknown_operator(error):
        return NotExportableError(
            f"operator {name} has no ONNX form",
            code=Code.NO_OPERATOR,
            where=where,
            hint="write that line with other PyTorch operators",
        )
    numbers = _sizes_for_numbers(node) if wants_number(error) else []
    if numbers:
        return NotExportableError(
            f"operator {name} takes {' and '.join(numbers)} as a number, and here a size that may change decides it",
            code=Code.NUMBER_FROM_SIZE,
            where=where,
            hint="fix that size: --static, or --static with --dynamic for those that stay free",
        )
    return NotExportableError(
        f"operator {name} could not be translated to ONNX: {last.partition(' Signature:')[0][:300]}",
        code=Code.NO_OPERATOR,
        where=where,
        hint="write that line with other PyTorch operators",
    )


def _sizes_for_numbers(node: fx.Node) -> list[str]:
    """The arguments of an operator that are computed from sizes, by their names."""
    names = [argument.name for argument in arguments_of(node.target)]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    symbols = (torch.SymInt, torch.SymFloat)
    return [
        f"'{name}'"
        for name, value in given.items()
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), symbols)
    ]


def _operator(node: fx.Node) -> str:
    """The operator as it was traced, before it was decomposed into others: `aten.special_bessel_j0`."""
    origins = node.meta.get("from_node") or ()
    target = str(origins[0].target) if origins else str(node.target)
    return target.removesuffix(".default")
