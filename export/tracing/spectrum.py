"""`Spectrum`: a spectrum that remembers the signal that it is of, and what operators on spectra do to signals.

    rfft(x, n) ─▶ Spectrum of x      Spectrum of x * Spectrum of k ─▶ Spectrum of convolve(x, k)      + ─▶ of x + k
    abs(Spectrum of x) ─▶ its parts, computed now

Only where a spectrum itself is looked at is it computed. So a convolution that is written as a product of spectra stays
one, of any length, and whoever writes it down may choose how: a transform of another length does as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moe_export.export.axes.shapes import arguments
from moe_export.export.sizes import is_at_most, same_size
from moe_export.export.tracing.complex_arithmetic import Rule, bilinear, conjugate
from moe_export.export.tracing.complex_parts import alike
from moe_export.export.tracing.complex_writer import Pair, Part, Writer, parts_of
from moe_export.export.tracing.fourier import CONVOLVE

_aten = torch.ops.aten


@dataclass(frozen=True)
class Convolved:
    """The signal of a product of spectra, n long, which is only written once it is known how much of it is read."""

    one: Pair
    other: Pair
    n: Any

    def upto(self, w: Writer, length: Any) -> Pair:
        """Its first entries."""
        sizes = [w.size(tensor_of(each), -1) for each in (self.one, self.other)]
        wraps = not is_at_most(sum(map(value_of, sizes)) - 1, value_of(self.n))
        return bilinear(CONVOLVE, w, self.one, self.other, *sizes, self.n, length, wraps)


@dataclass(frozen=True)
class Of:
    """What a spectrum is of.

    Attributes:
        of: A signal along its last axis.
        n: Of how many frequencies it is; the signal is no longer.
        axis: Where the frequencies are, counted from the end: -1 for the last axis.
        onesided: Whether it ends at n // 2, the signal being real.
        power: Of 1 / sqrt(n), by which it is scaled.
    """

    of: Pair | Convolved
    n: Any
    axis: int
    onesided: bool
    power: int

    @property
    def rank(self) -> int:
        """How many axes it has."""
        ones = (self.of.one, self.of.other) if isinstance(self.of, Convolved) else (self.of,)
        return max(int(tensor_of(each).meta["val"].dim()) for each in ones)

    def signal(self, w: Writer) -> Pair:
        """The signal itself."""
        return self.of.upto(w, self.n) if isinstance(self.of, Convolved) else self.of

    def like(self, other: Of) -> bool:
        """Whether entries of two spectra with the same index have the same frequency."""
        kind = self.axis == other.axis and self.onesided == other.onesided
        return kind and same(self.n, other.n)


class Spectrum(Pair):
    """A spectrum, whose parts are computed when they are asked for."""

    def __init__(self, of: Of, compute: Callable[[], tuple[Part, Part]]) -> None:
        super().__init__(None, None)
        self.of = of
        self._compute = compute
        self._known: tuple[Part, Part] | None = None

    @property
    def parts(self) -> tuple[Part, Part]:
        if self._known is None:
            self._known = self._compute()
        return self._known


def value_of(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, fx.Node) else size


def same(one: Any, other: Any) -> bool:
    return same_size(value_of(one), value_of(other))


def axis_of(value: Any, axis: int) -> int:
    """An axis, counted from the end."""
    rank = rank_of(value)
    return axis % rank - rank


def rank_of(value: Any) -> int:
    if isinstance(value, Spectrum):
        return value.of.rank
    return int(tensor_of(value).meta["val"].dim())


def tensor_of(value: Any) -> fx.Node:
    return next(part for part in parts_of(value) if isinstance(part, fx.Node))


def _tensors(value: Pair) -> list[fx.Node]:
    return [part for part in value.parts if isinstance(part, fx.Node)]


def moved(w: Writer, value: Any, source: int, target: int) -> Pair:
    """A value with one of its axes elsewhere, both counted from the end."""
    pair = Pair(*parts_of(value))
    if source == target:
        return pair
    rank = tensor_of(pair).meta["val"].dim()
    order = [axis for axis in range(rank) if axis != source % rank]
    order.insert(target % rank, source % rank)
    return alike(_aten.permute.default, (0,), w, pair, order)


def cut(w: Writer, value: Pair, size: Any) -> Pair:
    """A value with at most this many entries along its last axis."""
    there = tensor_of(value).meta["val"].shape[-1]
    if is_at_most(there, value_of(size)):
        return value
    least = w.number(torch.sym_min, w.size(tensor_of(value), -1), size)
    return alike(_aten.slice.Tensor, (0,), w, value, -1, 0, least)


def signal_of(w: Writer, of: Of, power: int) -> Pair | None:
    """The signal of a spectrum, as an inverse transform with this scale gives it."""
    scale = of.power + power - 2  # the power of 1 / sqrt(n) that remains
    if scale % 2:
        return None
    found = of.of.upto(w, _read(w.node, of)) if isinstance(of.of, Convolved) else _filled_up(w, of.of, of.n)
    for _ in range(abs(scale) // 2):
        by = _aten.div.Tensor if scale > 0 else _aten.mul.Tensor
        found = alike(by, (0,), w, found, of.n)
    return moved(w, found, -1, of.axis)


def _read(node: fx.Node, of: Of) -> Any:
    """How many entries of an inverse transform are read, where all of its readers cut it off at the same place."""
    ends = set()
    for user in node.users:
        if user.target is not _aten.slice.Tensor or len(user.args) < 4:
            return of.n
        _, axis, start, end, *step = arguments(user)
        if start not in (None, 0) or step not in ([], [1]) or axis_of(node, axis) != of.axis:
            return of.n
        ends.add(end)
    end = ends.pop() if len(ends) == 1 else None
    if isinstance(end, fx.Node):
        return end if end < node and is_at_most(end.meta["val"], value_of(of.n)) else of.n
    return end if isinstance(end, int) and end >= 0 and is_at_most(end, value_of(of.n)) else of.n


# What is done to spectra, done to signals


def on_signals(rule: Rule, target: Any, w: Writer, *args: Any, **kwargs: Any) -> Any:
    """An operator on complex numbers; of spectra whose signals it means something for, it is done to these.

    Args:
        rule: The operator's rule for parts.
        target: The operator.
        w: The writer.
        args: Of the operator.
        kwargs: Likewise.
    """
    of = _SIGNALS[target](w, target, *args, **kwargs)
    if of is None:
        return rule(w, *args, **kwargs)
    value = w.node.meta["val"]
    return Spectrum(of, lambda: w.fitted(rule(w, *args, **kwargs), value).parts)


def _product(w: Writer, target: Any, one: Any, other: Any) -> Of | None:
    if not isinstance(one, Spectrum) or not isinstance(other, Spectrum):
        return _scaled(w, target, *((one, other) if isinstance(one, Spectrum) else (other, one)))
    if not one.of.like(other.of):
        return None
    found = Convolved(one.of.signal(w), other.of.signal(w), one.of.n)
    if len({part.meta["val"].dtype for each in (found.one, found.other) for part in _tensors(each)}) > 1:
        return None
    return replace(one.of, of=found, power=one.of.power + other.of.power)


def _scaled(w: Writer, target: Any, spectrum: Any, by: Any) -> Of | None:
    """A spectrum times a real number, or real numbers that are the same for all frequencies; or divided by them."""
    if not isinstance(spectrum, Spectrum) or isinstance(by, (Pair, complex)):
        return None
    of = spectrum.of
    value = by.meta["val"] if isinstance(by, fx.Node) else by
    if isinstance(value, torch.Tensor) and value.dim():
        if value.dim() >= -of.axis and not same(value.shape[of.axis], 1):
            return None
        rank = max(value.dim(), -of.axis)
        by = moved(w, alike(_aten.reshape.default, (0,), w, by, _leading(w, by, rank)), of.axis, -1)
        by = tensor_of(by)
    signal = of.signal(w)
    return replace(
        of, of=Pair(*(part if part is None else w.call(target, part, by) for part in signal.parts))
    )


def _leading(w: Writer, value: fx.Node, rank: int) -> list[Any]:
    """A shape with axes of size 1 in front, up to a rank."""
    there = value.meta["val"].dim()
    return [1] * (rank - there) + [w.size(value, axis) for axis in range(there)]


def _sum(w: Writer, target: Any, one: Any, other: Any, *, alpha: Any = 1) -> Of | None:
    if not isinstance(one, Spectrum) or not isinstance(other, Spectrum) or not one.of.like(other.of):
        return None
    if alpha != 1 or one.of.power != other.of.power:
        return None
    signals = [each.of.signal(w) for each in (one, other)]
    sizes = [tensor_of(each).meta["val"].shape[-1] for each in signals]
    if not same(*sizes):
        signals = [_filled_up(w, each, one.of.n) for each in signals]
    combine = w.sub if target is _aten.sub.Tensor else w.add
    return replace(one.of, of=Pair(*(combine(*parts) for parts in zip(*map(parts_of, signals), strict=True))))


def _mirrored(w: Writer, target: Any, spectrum: Any) -> Of | None:
    """The conjugate of a spectrum: that of conj(x[-t]), round about."""
    if not isinstance(spectrum, Spectrum):
        return None
    filled = alike(_aten.flip.default, (0,), w, _filled_up(w, spectrum.of.signal(w), spectrum.of.n), [-1])
    turned = conjugate(w, alike(_aten.roll.default, (0,), w, filled, [1], [-1]))
    return replace(spectrum.of, of=turned)


def _elsewhere(w: Writer, target: Any, spectrum: Any, *rest: Any) -> Of | None:
    """What is done to other axes than the last, where the frequencies are."""
    if not isinstance(spectrum, Spectrum) or spectrum.of.axis != -1 or not rest:
        return None
    signal = spectrum.of.signal(w)
    rank = tensor_of(signal).meta["val"].dim()
    axis = rest[0] % (rank + 1 if target is _aten.unsqueeze.default else rank)
    if axis > (rank - 1 if target is _aten.unsqueeze.default else rank - 2):
        return None
    return replace(spectrum.of, of=alike(target, (0,), w, signal, axis, *rest[1:]))


def _filled_up(w: Writer, value: Pair, n: Any) -> Pair:
    """A signal with zeros behind it, up to n."""
    if same(tensor_of(value).meta["val"].shape[-1], n):
        return value
    missing = w.number(operator.sub, n, w.size(tensor_of(value), -1))
    return alike(_aten.constant_pad_nd.default, (0,), w, value, [0, missing])


_ALONG = (_aten.unsqueeze.default, _aten.select.int, _aten.slice.Tensor)
_SIGNALS: dict[Any, Callable[..., Of | None]] = {
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul.Scalar), _product),
    **dict.fromkeys((_aten.div.Tensor, _aten.div.Scalar), _scaled),
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor), _sum),
    **dict.fromkeys((_aten._conj.default, _aten.conj.default, _aten._conj_physical.default), _mirrored),
    **dict.fromkeys(_ALONG, _elsewhere),
}
SIGNAL_RULES = frozenset(_SIGNALS)
"""Operators that mean something for the signals of spectra."""
