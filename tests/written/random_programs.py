"""Random programs of the operators that the table of axes knows, as FX graphs with their values.

Each is written operator by operator and run at once, so that an operator that does not fit is left out.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
TOKENS, EXPERTS, WIDTH, SLOTS = 6, 5, 4, 2
NEAR = 1e-6
"""Scores that are nearer than this are tied, and no claim is made of which is chosen."""


@dataclass
class Program:
    """A program that grows.

    Attributes:
        choose: Where its choices come from.
        graph: The program.
        values: The value of each node.
    """

    choose: random.Random
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def given(self, value: Tensor) -> fx.Node:
        """An input."""
        node = self.graph.placeholder(f"x{len(self.values)}")
        return self._noted(node, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write an operator; raises what PyTorch raises where it does not fit."""
        value = target(*fx.map_arg(args, self.values.get), **fx.map_arg(kwargs, self.values.get))
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each.dim() > 4 or each.numel() > 4096 or not torch.isfinite(each).all() or each.numel() == 0:
                raise ValueError("too large, empty, or not finite")
            if each.is_floating_point() and each.abs().max() > 1e6:
                raise ValueError("too large")
        return self._noted(self.graph.call_function(target, args, kwargs), value)

    def _noted(self, node: fx.Node, value: Any) -> fx.Node:
        self.values[node] = node.meta["val"] = value
        return node

    def any(self, fits: Callable[[Tensor], bool] = lambda value: True) -> fx.Node:
        """A value, a late one more likely."""
        found = [node for node, value in self.values.items() if isinstance(value, Tensor) and fits(value)]
        found += found[-3:]
        return self.choose.choice(found)

    def axis(self, node: fx.Node) -> int:
        return self.choose.randrange(self.values[node].dim())

    def floats(self, rank: int | None = None) -> fx.Node:
        return self.any(lambda value: value.is_floating_point() and _has(value, rank))

    def numbers(self, below: int | None = None, rank: int | None = None) -> fx.Node:
        """Integers from 0 on, less than a size."""
        return self.any(
            lambda value: (
                value.dtype is torch.int64
                and _has(value, rank)
                and bool((value >= 0).all())
                and (below is None or bool((value < below).all()))
            )
        )


def _has(value: Tensor, rank: int | None) -> bool:
    return value.dim() == rank if rank is not None else value.dim() > 0


def _untied(program: Program, node: fx.Node, axis: int) -> None:
    value = program.values[node]
    if value.is_floating_point() and bool((value.sort(axis).values.diff(dim=axis) < NEAR).any()):
        raise ValueError("tied")


def _pointwise(p: Program) -> None:
    target = p.choose.choice([_aten.add.Tensor, _aten.mul.Tensor, _aten.sub.Tensor, _aten.maximum.default,
                              _aten.eq.Tensor, _aten.lt.Tensor, _aten.ne.Tensor])  # fmt: skip
    p.call(target, p.any(), p.any())


def _one(p: Program) -> None:
    target = p.choose.choice(
        [_aten.relu.default, _aten.exp.default, _aten.neg.default, _aten.sigmoid.default]
    )
    p.call(target, p.floats())


def _scalar(p: Program) -> None:
    target = p.choose.choice(
        [_aten.mul.Tensor, _aten.add.Tensor, _aten.eq.Scalar, _aten.gt.Scalar, _aten.ne.Scalar]
    )
    p.call(target, p.any(), p.choose.randrange(3))


def _cast(p: Program) -> None:
    p.call(_aten._to_copy.default, p.any(), dtype=p.choose.choice([torch.float64, torch.int64, torch.bool]))


def _reshape(p: Program) -> None:
    node = p.any()
    sizes = list(p.values[node].shape)
    if p.choose.random() < 0.5 and len(sizes) > 1:
        place = p.choose.randrange(len(sizes) - 1)
        sizes[place : place + 2] = [sizes[place] * sizes[place + 1]]
    else:
        place = p.choose.randrange(len(sizes) or 1)
        part = p.choose.choice([2, 3, TOKENS, EXPERTS, WIDTH, SLOTS, 1])
        sizes[place : place + 1] = [part, sizes[place] // part]
    if p.choose.random() < 0.1:
        p.call(_aten.flatten.using_ints, node)
    elif p.choose.random() < 0.1:
        p.call(_aten.unflatten.int, node, 0, [-1, SLOTS])
    else:
        views = [_aten.view.default, _aten._unsafe_view.default] if p.values[node].is_contiguous() else []
        p.call(p.choose.choice([*views, _aten.reshape.default]), node, sizes)


def _move(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 1)
    one, other = p.axis(node), p.axis(node)
    kind = p.choose.randrange(4)
    if kind == 0:
        p.call(_aten.mT.default, node)
    elif kind == 1 and p.values[node].dim() == 2:
        p.call(p.choose.choice([_aten.t.default, _aten.numpy_T.default]), node)
    else:
        p.call(_aten.transpose.int, node, one, other)


def _permute(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 1)
    p.call(_aten.permute.default, node, p.choose.sample(range(p.values[node].dim()), p.values[node].dim()))


def _unsqueeze(p: Program) -> None:
    node = p.any()
    p.call(_aten.unsqueeze.default, node, p.choose.randrange(p.values[node].dim() + 1))


def _squeeze(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    kind = p.choose.randrange(3)
    if kind == 0:
        p.call(_aten.squeeze.default, node)
    elif kind == 1:
        p.call(_aten.squeeze.dims, node, [p.axis(node)])
    else:
        p.call(_aten.squeeze.dim, node, p.axis(node))


def _expand(p: Program) -> None:
    node = p.any(lambda value: 1 in value.shape)
    sizes = [p.choose.choice([3, TOKENS, EXPERTS]) if size == 1 else -1 for size in p.values[node].shape]
    p.call(_aten.expand.default, node, sizes)


def _repeat(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    if p.choose.random() < 0.5:
        p.call(_aten.repeat_interleave.self_int, node, SLOTS, p.axis(node))
    else:
        p.call(_aten.repeat.default, node, [p.choose.randrange(1, 3) for _ in p.values[node].shape])


def _reduce(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    floats = p.values[node].is_floating_point()
    target = p.choose.choice([
        _aten.sum.dim_IntList, _aten.amax.default, _aten.amin.default, _aten.count_nonzero.dim_IntList,
        *((_aten.mean.dim, _aten.logsumexp.default) if floats else (_aten.any.dims, _aten.sum.dim_IntList)),
    ])  # fmt: skip
    if target is _aten.count_nonzero.dim_IntList:
        p.call(target, node, [p.axis(node)])
    else:
        p.call(target, node, [p.axis(node)], p.choose.random() < 0.3)


def _reduce_one(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    if p.values[node].is_floating_point():
        axis = p.axis(node)
        target, args, kwargs = p.choose.choice([
            (_aten.linalg_vector_norm.default, (2, [axis]), {}),
            (_aten.var.correction, ([axis],), {"correction": 0}),
            (_aten.prod.dim_int, (axis,), {}),
        ])  # fmt: skip
        p.call(target, node, *args, **kwargs)
        return
    p.call(p.choose.choice([_aten.any.dim, _aten.all.dim]), node, p.axis(node))


def _reduce_all(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    targets = [_aten.sum.default, _aten.max.default, _aten.min.default, _aten.count_nonzero.default]
    targets += [_aten.mean.default] if p.values[node].is_floating_point() else [_aten.any.default]
    p.call(p.choose.choice(targets), node)


def _softmax(p: Program) -> None:
    node = p.floats()
    target = p.choose.choice([_aten.softmax.int, _aten.log_softmax.int, _aten._softmax.default,
                              _aten._log_softmax.default])  # fmt: skip
    private = target in (_aten._softmax.default, _aten._log_softmax.default)
    p.call(target, node, p.axis(node), *([False] if private else []))


def _norm(p: Program) -> None:
    node = p.floats()
    size = p.values[node].shape[-1]
    weight = p.any(lambda value: value.dtype is torch.float64 and value.shape == (size,))
    if p.choose.random() < 0.5:
        p.call(_aten.layer_norm.default, node, [size], weight, None, 1e-3)
    else:
        p.call(_aten.rms_norm.default, node, [size], weight, 1e-3)


def _ordered(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 1)
    kind = p.choose.randrange(4)
    if kind == 0:
        p.call(_aten.flip.default, node, [p.axis(node)])
    elif kind == 1:
        p.call(_aten.roll.default, node, [1], [p.axis(node)])
    else:
        p.call([_aten.tril.default, _aten.triu.default][kind - 2], node)


def _like(p: Program) -> None:
    target = p.choose.choice([_aten.zeros_like.default, _aten.ones_like.default])
    node = p.any(lambda value: value.dim() > 0)
    if p.choose.random() < 0.3:
        p.call(_aten.full_like.default, node, p.choose.randrange(-1, 3))
    else:
        p.call(target, node)


def _copy(p: Program) -> None:
    target = p.choose.choice([
        _aten.clone.default, _aten.alias.default, _aten.detach.default, _aten.contiguous.default,
        _aten.lift_fresh_copy.default, _aten.type_as.default, _aten.dropout.default, _aten.to.dtype,
        _aten.to.dtype_layout, _aten.to.device,
    ])  # fmt: skip
    node = p.any()
    more = {
        _aten.type_as.default: lambda: [p.any()],
        _aten.dropout.default: lambda: [0.5, False],
        _aten.to.dtype: lambda: [p.choose.choice([torch.float64, torch.bool])],
        _aten.to.device: lambda: ["cpu", torch.float64],
    }.get(target, list)
    p.call(target, node, *more(), **({"dtype": torch.int64} if target is _aten.to.dtype_layout else {}))


def _attention(p: Program) -> None:
    query, key, value = (p.floats() for _ in range(3))
    p.call(_aten.scaled_dot_product_attention.default, query, key, value, None, 0.0, p.choose.random() < 0.3)


def _convolution(p: Program) -> None:
    rank = p.choose.choice([3, 3, 4])
    node, weight = p.floats(rank), p.floats(rank)
    ones, pads = [1] * (rank - 2), [p.choose.randrange(2)] * (rank - 2)
    if p.choose.random() < 0.5:
        p.call([_aten.conv1d.default, _aten.conv2d.default][rank - 3], node, weight, None, ones, pads)
    else:
        none = [0] * (rank - 2)
        p.call(_aten.convolution.default, node, weight, None, ones, pads, ones, False, none, 1)


def _embedding(p: Program) -> None:
    table = p.floats(2)
    p.call(_aten.embedding.default, table, p.numbers(p.values[table].shape[0]))


def _running(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    target = p.choose.choice([_aten.cumsum.default, _aten.cumsum.default, _aten.cumprod.default])
    target = (
        _aten.logcumsumexp.default
        if p.values[node].is_floating_point() and p.choose.random() < 0.2
        else target
    )
    p.call(target, node, p.axis(node))


def _product(p: Program) -> None:
    left, right = p.floats(), p.floats()
    target = {2: _aten.mm.default, 3: _aten.bmm.default}.get(p.values[left].dim(), _aten.matmul.default)
    if p.choose.random() < 0.2 and p.values[left].dim() == 3:
        right = p.call(_aten.transpose.int, left, 1, 2)
        p.call(_aten.baddbmm.default, p.call(_aten.bmm.default, left, right), left, right)
    elif p.choose.random() < 0.2:
        p.call(_aten.addmm.default, p.floats(), left, right)
    else:
        p.call(p.choose.choice([target, _aten.matmul.default]), left, right)


def _linear(p: Program) -> None:
    left, weight = p.floats(), p.floats(2)
    p.call(_aten.linear.default, left, weight)


def _einsum(p: Program) -> None:
    left, right = p.floats(), p.floats()
    letters = "abcd"
    one = "".join(p.choose.choice(letters) for _ in p.values[left].shape)
    two = "".join(p.choose.choice(letters) for _ in p.values[right].shape)
    both = sorted({*one, *two})
    out = "".join(p.choose.sample(both, p.choose.randrange(len(both) + 1)))
    if one and p.choose.random() < 0.2:  # its first axes unnamed
        one, out = "..." + one[p.choose.randrange(1, len(one) + 1) :], "..." + out
        out = "".join(letter for letter in out if letter in {".", *one, *two})
    p.call(_aten.einsum.default, f"{one},{two}->{out}", [left, right])


def _choice(p: Program) -> None:
    node = p.floats()
    axis = p.axis(node)
    _untied(p, node, axis)
    kind = p.choose.randrange(4)
    if kind == 0:
        p.call(p.choose.choice([_aten.argmax.default, _aten.argmin.default]), node, axis)
        return
    best = p.choose.choice([_aten.max.dim, _aten.min.dim])
    made = p.call(best, node, axis) if kind == 1 else p.call(_aten.topk.default, node, SLOTS, axis)
    for place in range(2):
        p.call(operator.getitem, made, place)


def _sort(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    axis = p.axis(node)
    _untied(p, node, axis)
    stable = {"stable": True, "dim": axis}
    if p.choose.random() < 0.5:
        p.call(_aten.argsort.stable, node, **stable)
    elif p.choose.random() < 0.3:
        node = p.floats()
        _untied(p, node, -1)
        p.call(_aten.argsort.default, node, -1)
    else:
        floats = p.values[node].is_floating_point()
        made = p.call(_aten.sort.default, node, axis) if floats else p.call(_aten.sort.stable, node, **stable)
        for place in range(2):
            p.call(operator.getitem, made, place)


def _numbering(p: Program) -> None:
    count = p.choose.choice([TOKENS, EXPERTS, SLOTS, TOKENS * SLOTS])
    kind = p.choose.randrange(4)
    if kind == 0:
        p.call(_aten.arange.start, p.choose.randrange(2), count)
    elif kind == 1:
        p.call(_aten.arange.start_step, 0, count * 2, p.choose.randrange(1, 3))
    else:
        p.call(_aten.arange.default, count)


def _made(p: Program) -> None:
    sizes = p.choose.choice(
        [[TOKENS, EXPERTS], [TOKENS, WIDTH], [EXPERTS], [TOKENS * SLOTS, WIDTH], [TOKENS]]
    )
    kind = p.choose.randrange(5)
    if kind == 4:
        p.call(_aten.scalar_tensor.default, 2.0, dtype=torch.float64)
    elif kind == 0:
        p.call(p.choose.choice([_aten.new_zeros.default, _aten.new_ones.default]), p.floats(), sizes)
    elif kind == 1:
        p.call(_aten.new_full.default, p.floats(), sizes, 2.0)
    elif kind == 2:
        p.call(_aten.full.default, sizes, 2.0, dtype=torch.float64)
    else:
        p.call(p.choose.choice([_aten.zeros.default, _aten.ones.default]), sizes, dtype=torch.float64)


def _one_hot(p: Program) -> None:
    node = p.numbers(EXPERTS)
    p.call(_aten.one_hot.default, node, EXPERTS)


def _one_hot_compared(p: Program) -> None:
    node = p.numbers()
    numbers = p.call(_aten.arange.default, p.choose.choice([EXPERTS, TOKENS]))
    p.call(_aten.eq.Tensor, p.call(_aten.unsqueeze.default, node, p.values[node].dim()), numbers)


def _count(p: Program) -> None:
    node = p.numbers(EXPERTS, 1)
    if p.choose.random() < 0.3:
        p.call(_aten.histc.default, p.call(_aten.to.dtype, node, torch.float64), EXPERTS, 0, EXPERTS - 1)
    else:
        p.call(_aten.bincount.default, node, None, EXPERTS)


def _index(p: Program) -> None:
    table = p.any(lambda value: value.dim() > 0)
    sizes = p.values[table].shape
    chosen = [p.numbers(sizes[0])]
    if len(sizes) > 1 and p.choose.random() < 0.3:
        chosen.append(p.numbers(sizes[1]))
    p.call(_aten.index.Tensor, table, chosen)


def _index_select(p: Program) -> None:
    table = p.any(lambda value: value.dim() > 0)
    axis = p.axis(table)
    p.call(_aten.index_select.default, table, axis, p.numbers(p.values[table].shape[axis], 1))


def _by_mask(p: Program) -> None:
    mask = p.any(lambda value: value.dtype is torch.bool and value.dim() > 0)
    table = p.any(lambda value: value.shape[: p.values[mask].dim()] == p.values[mask].shape)
    p.call(_aten.index.Tensor, table, [mask])


def _gather(p: Program) -> None:
    source = p.any(lambda value: value.dim() > 0)
    axis = p.axis(source)
    p.call(
        _aten.gather.default, source, axis, p.numbers(p.values[source].shape[axis], p.values[source].dim())
    )


def _scatter(p: Program) -> None:
    base = p.floats()
    axis = p.axis(base)
    index = p.numbers(p.values[base].shape[axis], p.values[base].dim())
    if p.choose.random() < 0.4:
        p.call(_aten.scatter.value, base, axis, index, 1)
        return
    values = p.any(lambda value: value.dtype is torch.float64 and value.shape == p.values[index].shape)
    if p.choose.random() < 0.2:
        p.call(_aten.scatter_reduce.two, base, axis, index, values, "sum")
    else:
        p.call(p.choose.choice([_aten.scatter.src, _aten.scatter_add.default]), base, axis, index, values)


def _add_rows(p: Program) -> None:
    base = p.floats()
    rows = p.floats(p.values[base].dim())
    p.call(_aten.index_add.default, base, 0, p.numbers(p.values[base].shape[0], 1), rows)


def _put(p: Program) -> None:
    base = p.floats()
    p.call(
        _aten.index_put.default,
        base,
        [p.numbers(p.values[base].shape[0], 1)],
        p.floats(),
        p.choose.random() < 0.5,
    )


def _list(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0 and not value.is_floating_point())
    if p.choose.random() < 0.5:
        listed = p.call(p.choose.choice([_aten.nonzero.default, _aten.argwhere.default]), node)
        p.call(_aten.select.int, listed, 1, p.choose.randrange(p.values[node].dim()))
        return
    made = p.call(p.choose.choice([_aten.nonzero_numpy.default, _aten.where.default]), node)
    for place in range(p.values[node].dim()):
        p.call(operator.getitem, made, place)


def _take(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    axis = p.axis(node)
    if p.choose.random() < 0.5:
        p.call(_aten.select.int, node, axis, p.choose.randrange(p.values[node].shape[axis]))
    else:
        p.call(_aten.slice.Tensor, node, axis, 0, p.choose.randrange(1, 7))


def _split(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    axis = p.axis(node)
    kind, size = p.choose.randrange(3), p.values[node].shape[axis]
    if kind == 0:
        made = p.call(_aten.chunk.default, node, 2, axis)
    elif kind == 1:
        made = p.call(_aten.split_with_sizes.default, node, [1, size - 1], axis)
    else:
        made = p.call(_aten.split.Tensor, node, p.choose.randrange(1, 4), axis)
    p.call(operator.getitem, made, 0)


def _unbind(p: Program) -> None:
    node = p.any(lambda value: value.dim() > 0)
    made = p.call(_aten.unbind.int, node, p.axis(node))
    p.call(operator.getitem, made, p.choose.randrange(len(p.values[made])))


def _join(p: Program) -> None:
    one = p.any(lambda value: value.dim() > 0)
    other = p.any(lambda value: value.dim() == p.values[one].dim() and value.dtype == p.values[one].dtype)
    joined = p.choose.choice([_aten.cat.default, _aten.concat.default, _aten.stack.default])
    p.call(joined, [one, other], p.axis(one))


def _divide(p: Program) -> None:
    by = p.choose.choice([SLOTS, TOKENS, EXPERTS])
    kind = p.choose.randrange(3)
    if kind == 0:
        p.call(_aten.div.Tensor_mode, p.numbers(), by, rounding_mode=p.choose.choice(["floor", "trunc"]))
    else:
        p.call([_aten.floor_divide.default, _aten.remainder.Scalar][kind - 1], p.numbers(), by)


def _where(p: Program) -> None:
    condition = p.any(lambda value: value.dtype is torch.bool)
    if p.choose.random() < 0.4:
        p.call(_aten.where.ScalarOther, condition, p.any(), -p.choose.randrange(2))
    else:
        p.call(_aten.where.self, condition, p.any(), p.any())


def _pad(p: Program) -> None:
    target = p.choose.choice([_aten.constant_pad_nd.default, _aten.pad.default])
    p.call(target, p.any(lambda value: value.dim() > 0), [1, 0])


def _masked_select(p: Program) -> None:
    mask = p.any(lambda value: value.dtype is torch.bool)
    p.call(_aten.masked_select.default, p.any(lambda value: value.shape == p.values[mask].shape), mask)


def _without_rule(p: Program) -> None:
    p.call(_aten.diff.default, p.any(lambda value: value.dim() > 0 and value.dtype is not torch.bool))


STEPS: tuple[Callable[[Program], None], ...] = (
    _pointwise, _pointwise, _one, _scalar, _cast, _reshape, _reshape, _move, _permute, _unsqueeze, _squeeze, _expand,
    _repeat, _reduce, _reduce, _reduce_one, _reduce_all, _softmax, _norm, _ordered, _like, _copy, _attention,
    _convolution, _embedding, _running, _product, _linear, _linear, _einsum, _choice, _choice, _sort,
    _numbering, _made, _one_hot, _one_hot_compared, _count, _index, _index, _index_select, _by_mask, _gather, _scatter,
    _add_rows, _put, _list, _take, _split, _unbind, _join, _divide, _where, _pad, _masked_select, _without_rule,
)  # fmt: skip


def random_program(seed: int, steps: int = 12) -> Program:
    """A program of a few steps on tokens, weights of a gate, stacked weights of experts and one square matrix."""
    program = Program(random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    for sizes in ((TOKENS, WIDTH), (EXPERTS, WIDTH), (EXPERTS, WIDTH, 3), (WIDTH, WIDTH)):
        program.given(torch.randn(sizes, generator=generator, dtype=torch.float64))
    if program.choose.random() < 0.5:  # as a gate does
        tokens, gate = list(program.values)[:2]
        scores = program.call(_aten.linear.default, tokens, gate)
        made = program.call(_aten.topk.default, scores, SLOTS, 1)
        for place in range(2):
            program.call(operator.getitem, made, place)
    for _ in range(steps):
        try:
            program.choose.choice(STEPS)(program)
        except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError):
            continue
    return program
