"""A model that gives something else at every call cannot be verified, and most often was not meant to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import line_of
from moe_export.export.frontend.subject import Subject


def refuse_random(program: ExportedProgram, subject: Subject, example: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model that gives other outputs when it is called again on the same inputs.

    Raises:
        NotExportableError: It draws random numbers, and names the operator and its line; or it keeps something
            from one call to the next where `state` does not see it.
    """
    absent = subject.weights is not None and subject.weights.absent
    if not absent and _agrees_with_itself(subject, example):
        return
    name = type(subject.module).__name__
    suspect = next((node for node in program.graph.nodes if may_be_random(node)), None)
    if absent and suspect is None:
        return  # zeros in the place of weights would hide what is drawn, so the program is asked
    if suspect is None:
        raise NotExportableError(
            f"{name} gives other outputs at every call, and not by random numbers",
            code=Code.STATE,
            where=str(subject.source),
            hint="it keeps state where it cannot be put back, as in a closure: pass that in and return it, "
            "or make it a buffer",
        )
    raise NotExportableError(
        f"{name} gives other outputs at every call: {suspect.target} draws random numbers",
        code=Code.RANDOM,
        where=line_of(suspect.meta.get("stack_trace")) or str(subject.source),
        hint="take the random numbers as an input; dropout: F.dropout(x, p, training=self.training)",
    )


def may_be_random(node: fx.Node) -> bool:
    """Whether an operator may draw random numbers, by its tag, and by what it is given."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_asleep(node)


def _is_asleep(node: fx.Node) -> bool:
    """Whether it is a dropout that drops nothing, or attention without one."""
    if node.target is torch.ops.aten.dropout.default:
        return node.args[2] is False
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return not (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return False


def _agrees_with_itself(subject: Subject, example: Mapping[str, torch.Tensor]) -> bool:
    with torch.no_grad():
        first, second = (subject.call([tensor.clone() for tensor in example.values()]) for _ in range(2))
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )
