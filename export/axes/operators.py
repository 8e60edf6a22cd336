"""Families of operators that code that follows axes treats alike, whatever it looks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_aten = torch.ops.aten

# fmt: off
CASTS = {
    _aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.clone.default,
    _aten.alias.default, _aten.detach.default, _aten.contiguous.default, _aten.type_as.default,
    _aten.lift_fresh_copy.default,
}
"""Copies: the same entries in the same places, perhaps of another type."""
VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints}
"""The same entries in the same order, in another shape."""
TURNS = {
    _aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.mT.default, _aten.numpy_T.default,
}
"""Axes in another order: `axes.shapes.order_of` says in which."""
ZEROS = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}
FULL: Mapping[Any, int] = {
    _aten.full_like.default: 1, _aten.full.default: 1, _aten.new_full.default: 2, _aten.scalar_tensor.default: 0,
}
"""Values all alike, and which argument says what they are."""
BOTH = {_aten.mul.Tensor, _aten.bitwise_and.Tensor, _aten.logical_and.default, _aten.__and__.Tensor}
"""Products, of masks too: 0 where one of the two is."""
EITHER = {_aten.add.Tensor, _aten.bitwise_or.Tensor, _aten.logical_or.default, _aten.__or__.Tensor}
"""Sums, of masks too: 0 where both are."""
NONZERO = {_aten.ne.Scalar, _aten.gt.Scalar, _aten.greater.Scalar}
"""Comparisons that say of a mask, with 0, where it is set."""
SOFTMAXES = {
    _aten.softmax.int, _aten._softmax.default, _aten.log_softmax.int, _aten._log_softmax.default,
}
NORMS = {_aten.layer_norm.default, _aten.native_layer_norm.default, _aten.rms_norm.default}
REDUCES = {
    _aten.sum.dim_IntList, _aten.mean.dim, _aten.amax.default, _aten.amin.default, _aten.any.dim, _aten.any.dims,
    _aten.all.dim, _aten.prod.dim_int, _aten.logsumexp.default, _aten.var.correction,
    _aten.linalg_vector_norm.default, _aten.count_nonzero.dim_IntList,
}
"""Sums and the like along some axes, which go, or keep the size 1."""
RUNS = {_aten.cumsum.default, _aten.cumprod.default, _aten.logcumsumexp.default}
SORTS = {_aten.sort.default, _aten.sort.stable, _aten.argsort.default, _aten.argsort.stable}
PARTS = {_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default}
JOINS = {_aten.cat.default, _aten.concat.default, _aten.stack.default}
ADDS_AN_AXIS = {_aten.unsqueeze.default, _aten.stack.default}
ALONG = {
    *SOFTMAXES, *REDUCES, *RUNS, *PARTS, *JOINS, _aten.unbind.int, _aten.topk.default, _aten.glu.default,
    _aten.select.int, _aten.slice.Tensor, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.transpose.int,
    _aten.permute.default,
}
"""Operators along the axes that they name (`axes.shapes.named_axes`): to the entries of the others they do the same."""
SCATTERS = {_aten.scatter.src, _aten.scatter.value, _aten.scatter_.src, _aten.scatter_.value}
# fmt: on
