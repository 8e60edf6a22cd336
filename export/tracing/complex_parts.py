"""Operators that do to both parts of a complex number what they do to a real one; what makes, splits and joins them.

reshape(z)   (reshape(x), reshape(y))       where(m, z, w)   (where(m, xz, xw), where(m, yz, yw))
complex(x, y), view_as_complex, view_as_real, real, imag, casts, zeros and other tensors made of a type
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from moe_export.export.tracing.complex_arithmetic import Rule, conjugate
from moe_export.export.tracing.complex_writer import VIEWS, Pair, Part, Writer, parts_of

_aten = torch.ops.aten

# Operators that are linear in their first argument alone, however a model calls them.
_ALIKE = """
    _reshape_alias.default _unsafe_view.default alias.default as_strided.default atleast_1d.default
    atleast_2d.default atleast_3d.default block_diag.default broadcast_to.default cat.default chunk.default
    clone.default column_stack.default concat.default concatenate.default constant_pad_nd.default
    contiguous.default cumsum.default detach.default diag.default diag_embed.default diagonal.default diff.default
    dropout.default dstack.default expand.default expand_as.default fft_fftshift.default fft_ifftshift.default
    flatten.using_ints flip.default fliplr.default flipud.default gather.default hstack.default index.Tensor
    index_select.default lift_fresh.default lift_fresh_copy.default mT.default masked_select.default mean.default
    mean.dim moveaxis.int moveaxis.intlist movedim.int movedim.intlist narrow.default narrow.Tensor neg.default
    negative.default numpy_T.default pad.default permute.default positive.default ravel.default repeat.default
    repeat_interleave.self_int repeat_interleave.self_Tensor reshape.default reshape_as.default
    resolve_conj.default resolve_neg.default roll.default rot90.default select.int slice.Tensor split.Tensor
    split.sizes split_with_sizes.default squeeze.default squeeze.dim squeeze.dims stack.default sum.default
    sum.dim_IntList sum_to_size.default swapaxes.default swapdims.default t.default take.default
    take_along_dim.default tensor_split.indices tensor_split.sections tile.default trace.default transpose.int
    tril.default triu.default unbind.int unflatten.int unfold.default unsafe_chunk.default unsafe_split.Tensor
    unsqueeze.default view.default view_as.default vstack.default
""".split()  # noqa: SIM905 (a table that people read)

# Those that are linear in two arguments together, with the places of these.
_TOGETHER = {
    "copy.default": (0, 1),
    "diagonal_scatter.default": (0, 1),
    "index_add.default": (0, 3),
    "index_copy.default": (0, 3),
    "index_put.default": (0, 2),
    "lerp.Scalar": (0, 1),
    "lerp.Tensor": (0, 1),
    "masked_fill.Scalar": (0, 2),
    "masked_fill.Tensor": (0, 2),
    "masked_scatter.default": (0, 2),
    "scatter.src": (0, 3),
    "scatter.value": (0, 3),
    "scatter_add.default": (0, 3),
    "select_scatter.default": (0, 1),
    "slice_scatter.default": (0, 1),
    "where.self": (1, 2),
    "where.ScalarOther": (1, 2),
    "where.ScalarSelf": (1, 2),
    "where.Scalar": (1, 2),
}

_CASTS = "_to_copy.default to.device to.dtype to.dtype_layout to.other type_as.default".split()  # noqa: SIM905

_MAKERS = """
    empty.memory_format empty_like.default full.default full_like.default new_empty.default new_full.default
    new_ones.default new_zeros.default ones.default ones_like.default scalar_tensor.default zeros.default
    zeros_like.default
""".split()  # noqa: SIM905
_REAL_MAKERS = """
    eye.default eye.m
""".split()  # noqa: SIM905

# What is asked of a tensor's shape, and is the same of a part.
_ASKED = """
    numel.default size.default stride.default sym_numel.default sym_size.default sym_size.int
    sym_storage_offset.default sym_stride.default sym_stride.int
""".split()  # noqa: SIM905


def alike(target: Any, places: Sequence[int], w: Writer, *args: Any, **kwargs: Any) -> Pair:
    """An operator that is linear in the arguments at `places`: once for each part."""
    found: list[Part] = []
    others = [_real(arg) if place not in places else arg for place, arg in enumerate(args)]
    named = {name: _real(value) for name, value in kwargs.items()}
    for which in (0, 1):
        chosen = {place: _part(args[place], which) for place in places if place < len(args)}
        if not any(map(_is_there, chosen.values())):
            found.append(None)
            continue
        given = [
            _filled(w, chosen[place], args[place]) if place in chosen else other
            for place, other in enumerate(others)
        ]
        found.append((w.view if target in VIEWS else w.call)(target, *given, **named))
    return Pair(*found)


def _part(value: Any, which: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_part(each, which) for each in value]
    return parts_of(value)[which]


def _is_there(part: Any) -> bool:
    return any(map(_is_there, part)) if isinstance(part, list) else part is not None


def _filled(w: Writer, part: Any, value: Any) -> Any:
    """A part with 0 in the place of what is not there: in the shape of the other part, or a number."""
    if isinstance(part, list):
        return [_filled(w, each, of) for each, of in zip(part, value, strict=True)]
    if part is not None:
        return part
    like = next((each for each in parts_of(value) if isinstance(each, fx.Node)), None)
    return 0 if like is None else w.zeros(like)


def _real(value: Any) -> Any:
    """An argument that is no operand: of a pair its shape is asked, of a type its parts'."""
    if isinstance(value, Pair):
        return next(part for part in value.parts if isinstance(part, fx.Node))
    if isinstance(value, torch.dtype) and value.is_complex:
        return value.to_real()
    return value


def item(w: Writer, values: Any, place: int) -> Any:
    """One of several values."""
    if isinstance(values, Pair):
        return alike(operator.getitem, (0,), w, values, place)
    return values[place]


def cast(w: Writer, value: Any, *_: Any, **__: Any) -> Any:
    """A cast: of a pair to a real type, its real part; the types of parts are seen to by whoever asked."""
    return Pair(*parts_of(value))


def make(target: Any, w: Writer, *args: Any, **kwargs: Any) -> Pair:
    """A tensor made of a type, filled with a number."""
    number = next((each for each in (*args, kwargs.get("fill_value")) if isinstance(each, complex)), None)
    named = {name: _real(value) for name, value in kwargs.items()} | {
        "dtype": w.node.meta["val"].dtype.to_real()
    }
    given = [each.real if isinstance(each, complex) else _real(each) for each in args]
    if isinstance(named.get("fill_value"), complex):
        named["fill_value"] = named["fill_value"].real
    real = w.call(target, *given, **named)
    if number is None or not number.imag:
        return Pair(real, w.zeros(real))  # a part of its own: a loop may start from it
    return Pair(real, w.call(_aten.full_like.default, real, number.imag))


def make_real(target: Any, w: Writer, *args: Any, **kwargs: Any) -> Pair:
    """A tensor made of a complex type whose entries are real."""
    return Pair(w.call(target, *args, **{**kwargs, "dtype": w.node.meta["val"].dtype.to_real()}), None)


def joined(w: Writer, real: Any, imag: Any) -> Pair:
    """`complex(x, y)`."""
    return Pair(real, imag)


def from_last_axis(w: Writer, value: fx.Node) -> Pair:
    """`view_as_complex`."""
    return Pair(*(w.call(_aten.select.int, value, -1, which) for which in (0, 1)))


def as_last_axis(w: Writer, value: Any) -> fx.Node:
    """`view_as_real`."""
    return w.call(_aten.stack.default, list(w.whole(value)), -1)


def one_part(which: int, w: Writer, value: Any) -> fx.Node:
    """`real` and `imag`."""
    part = parts_of(value)[which]
    return part if isinstance(part, fx.Node) else w.whole(value)[which]


def asked(target: Any, w: Writer, value: Any, *rest: Any) -> Any:
    """A question about the shape."""
    return w.call(target, _real(value), *rest)


def transposed_conjugate(target: Any, w: Writer, value: Any) -> Pair:
    """`H`, `mH`."""
    return alike(target, (0,), w, conjugate(w, value))


def _named(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(_aten, packet), overload)


RULES: dict[Any, Rule] = {
    operator.getitem: item,
    **{_named(name): partial(alike, _named(name), (0,)) for name in _ALIKE},
    **{_named(name): partial(alike, _named(name), places) for name, places in _TOGETHER.items()},
    **{_named(name): cast for name in _CASTS},
    **{_named(name): partial(make, _named(name)) for name in _MAKERS},
    **{_named(name): partial(make_real, _named(name)) for name in _REAL_MAKERS},
    **{_named(name): partial(asked, _named(name)) for name in _ASKED},
    _aten.complex.default: joined,
    **dict.fromkeys((_aten.view_as_complex.default, _aten.view_as_complex_copy.default), from_last_axis),
    **dict.fromkeys((_aten.view_as_real.default, _aten.view_as_real_copy.default), as_last_axis),
    _aten.real.default: partial(one_part, 0),
    _aten.imag.default: partial(one_part, 1),
    _aten._neg_view.default: partial(alike, _aten.neg.default, (0,)),
    _aten.adjoint.default: partial(transposed_conjugate, _aten.mT.default),
    _aten.mH.default: partial(transposed_conjugate, _aten.mT.default),
    _aten.matrix_H.default: partial(transposed_conjugate, _aten.mT.default),
}
