"""Masks of rows that come from no choice among experts, `scores[:, e] > 0`: routing by ReLU, by a threshold.

`if mask.any():` around what is done with the rows saves time and changes no result. A trace takes it for true; that
it is such a question is seen by what comes of the mask: rows are written by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import line_of

_aten = torch.ops.aten
_NUMBERS = {
    _aten.nonzero.default, _aten.nonzero_numpy.default, _aten.where.default, _aten.squeeze.dim, _aten.squeeze.default,
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.select.int, _aten.unbind.int,
    _aten.unsqueeze.default, _aten.expand.default,
}  # fmt: skip
_WRITES = {
    "index_put",
    "index_put_",
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "masked_scatter",
}
_WRITES |= {"scatter", "scatter_", "scatter_add", "scatter_add_", "masked_scatter_"}


def is_mask_of_rows(node: fx.Node) -> bool:
    """Whether a value is a mask (N,)."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool and value.dim() == 1


class DecidesError(NotExportableError):
    """Something else than rows that are written depends on conditions on masks.

    Args:
        what: As for every error of its kind.
        code: Likewise.
        where: Likewise.
        hint: Likewise.
        places: `file:line` of each condition.
    """

    def __init__(
        self, what: str, *, code: Code, where: str | None, hint: str, places: frozenset[str]
    ) -> None:
        super().__init__(what, code=code, where=where, hint=hint)
        self.places = places


def rows_written(asked: Sequence[tuple[fx.Node, str]]) -> None:
    """Check that each question was about a mask by which rows are written.

    Args:
        asked: Conditions on masks of rows, as they were traced, and where they were asked.

    Raises:
        DecidesError: Something else depends on a condition; names its line.
    """
    places = frozenset(place for node, place in asked if not _writes(_mask_in(node)))
    for node, place in asked:
        if place in places:
            raise DecidesError(
                "a condition on the values of a tensor decides what is computed",
                code=Code.VALUES_DECIDE,
                where=line_of(node.meta.get("stack_trace")),
                hint="compute both ways and take one of them by torch.where",
                places=places,
            )


def _mask_in(node: fx.Node) -> fx.Node:
    while not is_mask_of_rows(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _writes(mask: fx.Node) -> bool:
    waiting, seen = [mask], {mask}
    while waiting:
        for user in waiting.pop().users:
            name = getattr(getattr(user.target, "overloadpacket", None), "__name__", "")
            if name in _WRITES:
                return True
            is_part = getattr(user.target, "__name__", "") == "getitem"
            if (user.target in _NUMBERS or is_part) and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False
