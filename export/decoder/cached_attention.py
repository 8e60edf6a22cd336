"""`find_attention`: attention over keys and values that a decoder's graph keeps, as `GroupQueryAttention` computes it.

    K = Concat(past key, k)   V = Concat(past value, v)                 (b, g, p + n, w)
    y = Softmax(cap(scale * q K^T) + mask) V                            (b, h, n, w)

with each of the g heads of keys repeated for h / g heads of queries, and, where there are sinks, one more score a head
that takes part in the softmax and adds nothing. `cap(x) = c tanh(x / c)`, or nothing.

What only leads from K and V to y may be computed in another way then. Anything else that reads K, V or a past must
look at its sizes alone. Reads only; what does not have this form is refused, with what was found in its place.

Letters: b batch, h heads, g heads of keys, n new tokens, p earlier tokens, t = p + n, w width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

WIDTHS = 8
"""The kernel takes heads whose width is a multiple of it."""
_TIME = 2  # the axis of keys and values that grows


@dataclass(frozen=True)
class CachedAttention:
    """Attention of one layer.

    Attributes:
        key, value: The `Concat` of what was kept and what is new.
        query: (b, h, n, w), perhaps scaled.
        mask: Added to scores: broadcast to (b, h, n, t).
        scale: What the product of `query` and keys is multiplied by.
        softcap: c; 0 for none.
        sinks: The score (h,) that takes part for each head; None for none.
        inner: The nodes between the two `Concat` and the result, in the order of the graph.
        result: y.
    """

    key: ir.Node
    value: ir.Node
    query: ir.Value
    mask: ir.Value
    scale: float
    softcap: float
    sinks: np.ndarray | None
    inner: Sequence[ir.Node]
    result: ir.Value

    @property
    def heads(self) -> tuple[int, int]:
        """How many heads of queries and of keys: h and g."""
        sizes = (_sizes(self.query)[1], _sizes(self.key.inputs[0])[1])
        assert isinstance(sizes[0], int)
        assert isinstance(sizes[1], int)
        return sizes[0], sizes[1]

    @property
    def width(self) -> int:
        """Of a head: w."""
        width = _sizes(self.key.inputs[0])[3]
        assert isinstance(width, int)
        return width


class NoAttentionError(Exception):
    """What reads a past is no such attention; says what it is instead."""


def find_attention(graph: ir.Graph, pasts: Sequence[ir.Value]) -> list[CachedAttention]:
    """The attention of each layer.

    Args:
        graph: Of a decoder.
        pasts: Its inputs that grow; each must be the keys or the values of one attention.

    Raises:
        NoAttentionError: Some past is something else; with its name.
    """
    joins = {past: _join(past) for past in pasts}
    ends = {past: _Walk(join).to_the_softmax() for past, join in joins.items()}
    found = []
    for past, walk in ends.items():
        if not walk.is_value:
            found.append(_attention(graph, walk, ends, past))
    if 2 * len(found) != len(pasts):
        raise NoAttentionError("of some layer only keys or only values are kept")
    return found


def sized(node: ir.Node) -> bool:
    """Whether a node reads one size of a value."""
    return node.op_type == "Shape" and _int(node, "end", 0) == _int(node, "start", 0) + 1


def _join(past: ir.Value) -> ir.Node:
    """The `Concat` that adds what is new to a past; all else that reads it must read sizes."""
    others = [node for node in past.consumers() if not sized(node)]
    if len(others) != 1 or others[0].op_type != "Concat" or others[0].graph is not past.graph:
        kinds = ", ".join(sorted(node.op_type for node in others))
        raise NoAttentionError(f"{past.name} is read by {kinds or 'nothing'}, not by one Concat")
    (join,) = others
    if len(join.inputs) != 2 or join.inputs[0] is not past or _int(join, "axis", 0) % 4 != _TIME:
        raise NoAttentionError(f"{past.name} does not grow at its end, along axis {_TIME}")
    sizes = _sizes(past)
    if not isinstance(sizes[1], int) or not isinstance(sizes[3], int) or sizes[3] % WIDTHS:
        raise NoAttentionError(
            f"{past.name} is {past.shape}, and the width of a head must be a multiple of {WIDTHS}"
        )
    if past.dtype is not ir.DataType.FLOAT:
        raise NoAttentionError(f"{past.name} is {past.dtype}, not float32")
    return join


class _Walk:
    """From K or V along the only node that reads each value, to the softmax (K) or to the result (V).

    Attributes:
        inner: The nodes on the way.
        is_value: Whether it began at V.
    """

    def __init__(self, join: ir.Node) -> None:
        self.join, self.inner = join, list[ir.Node]()
        self.is_value = False
        self.scale, self.softcap = 1.0, 0.0
        self.query: ir.Value | None = None
        self.mask: ir.Value | None = None
        self.sinks: np.ndarray | None = None
        self.product: ir.Node | None = None
        self._at = join.outputs[0]

    def to_the_softmax(self) -> _Walk:
        """Walk; afterwards the attributes are known.

        Raises:
            NoAttentionError: Something on the way is not of attention's form.
        """
        self._repeated()
        self._scaled(transposed=True)
        product = self._next()
        if product.op_type != "MatMul" or product.inputs[1] is not self._at:
            raise self._other()
        self._step(product)
        self.product, self.query = product, product.inputs[0]
        before = self.query.producer() if self.query is not None else None
        self.is_value = before is not None and before.op_type in ("Softmax", "Slice")
        if not self.is_value:
            self._scaled()
            self._capped()
            self._masked()
            self._with_sinks()
        return self

    def _repeated(self) -> None:
        """`Unsqueeze`, `Expand`, `Reshape`: each head of keys for several of queries."""
        if self._next().op_type == "Unsqueeze" and _ints(self._next().inputs[1]) == [2]:
            for kind in ("Unsqueeze", "Expand", "Reshape"):
                if self._next().op_type != kind:
                    raise self._other()
                self._step(self._next())

    def _scaled(self, *, transposed: bool = False) -> None:
        """Products with numbers, and on the way to the first product the transposition of keys."""
        while True:
            node = self._next()
            factor = self._factor(node)
            if factor is not None:
                self.scale *= factor
            elif not transposed or node.op_type != "Transpose" or list(_perm(node)) != [0, 1, 3, 2]:
                return
            self._step(node)

    def _capped(self) -> None:
        """`c tanh(x / c)`; the division may have been read as a part of the scale."""
        if self._next().op_type != "Tanh":
            return
        self._step(self._next())
        cap = self._factor(self._next())
        if cap is None or cap <= 0:
            raise self._other()
        self._step(self._next())
        self.scale, self.softcap = self.scale * cap, cap

    def _masked(self) -> None:
        node = self._next()
        if node.op_type != "Add":
            raise self._other()
        self.mask = node.inputs[1] if node.inputs[0] is self._at else node.inputs[0]
        self._step(node)

    def _with_sinks(self) -> None:
        """The softmax, and around it one more score a head where there are sinks."""
        node = self._next()
        if node.op_type == "Concat":
            expand = node.inputs[1].producer() if node.inputs[1] is not None else None
            sinks = expand.inputs[0] if expand is not None and expand.op_type == "Expand" else None
            if sinks is None or sinks.const_value is None or _int(node, "axis", 0) not in (-1, 3):
                raise self._other()
            assert sinks.shape is not None
            if [size for size in sinks.shape if size != 1] != [sinks.const_value.size] or len(
                sinks.shape
            ) != 4:
                raise self._other()
            self.sinks = sinks.const_value.numpy().reshape(-1)
            self._step(node)
            self._less_greatest()
            node = self._next()
        if node.op_type != "Softmax" or _int(node, "axis", -1) not in (-1, 3):
            raise self._other()
        self._step(node)
        if self.sinks is not None:
            node = self._next()
            bounds = [_ints(value) for value in node.inputs[1:]] if node.op_type == "Slice" else []
            if bounds[:3] not in ([[0], [-1], [3]], [[0], [-1], [-1]]):
                raise self._other()
            self._step(node)

    def _less_greatest(self) -> None:
        """`x - max(x)`, which a softmax does not see."""
        readers = self._at.consumers()
        greatest = next((node for node in readers if node.op_type == "ReduceMax"), None)
        if greatest is None:
            return
        (less,) = greatest.outputs[0].consumers()
        if set(readers) != {greatest, less} or less.op_type != "Sub" or less.inputs[0] is not self._at:
            raise self._other()
        self.inner += [greatest, less]
        self._at = less.outputs[0]

    def _next(self) -> ir.Node:
        nodes = [
            node for node in self._at.consumers() if self._at is not self.join.outputs[0] or not sized(node)
        ]
        kept = self._at.is_graph_output() and self._at is not self.join.outputs[0]
        if len(nodes) != 1 or kept or nodes[0].graph is not self.join.graph:
            raise NoAttentionError(f"{self._at.name} is read by {len(nodes)} nodes, not by one")
        return nodes[0]

    def _step(self, node: ir.Node) -> None:
        self.inner.append(node)
        (self._at,) = node.outputs

    def _factor(self, node: ir.Node) -> float | None:
        """The number that a node multiplies with; None if it does something else."""
        if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
            return None
        one, other = node.inputs
        if node.op_type == "Mul" and other is self._at:
            one, other = other, one
        tensor = other.const_value if other is not None and one is self._at else None
        if tensor is None or tensor.size != 1:
            return None
        number = float(tensor.numpy().reshape(-1)[0])
        return number if node.op_type == "Mul" else 1 / number

    def _other(self) -> NoAttentionError:
        past = self.join.inputs[0]
        assert past is not None
        return NoAttentionError(f"{past.name} leads to {self._next().op_type} ({self._next().name})")


def _attention(graph: ir.Graph, walk: _Walk, ends: dict[ir.Value, _Walk], past: ir.Value) -> CachedAttention:
    """The attention whose keys a walk began at, with the one that began at its values."""
    weights = walk.inner[-1].outputs[0]
    readers = list(weights.consumers())
    values = next((each for each in ends.values() if each.is_value and [each.product] == readers), None)
    if values is None or walk.query is None or walk.mask is None:
        raise NoAttentionError(f"the scores of {past.name} meet no values that are kept")
    assert values.product is not None
    sizes, others = _sizes(walk.join.inputs[0]), _sizes(values.join.inputs[0])
    if (sizes[1], sizes[3]) != (others[1], others[3]):
        raise NoAttentionError(f"keys are {sizes}, and values {others}")
    heads = _sizes(walk.query)[1]
    if not isinstance(heads, int) or heads % int(str(sizes[1])):
        raise NoAttentionError(f"the number of heads of {walk.query.name} is not known")
    inner = set(walk.inner) | set(values.inner)
    return CachedAttention(
        walk.join, values.join, walk.query, walk.mask, walk.scale, walk.softcap, walk.sinks,
        [node for node in graph if node in inner], values.product.outputs[0],
    )  # fmt: skip


def _sizes(value: ir.Value | None) -> list[int | str | None]:
    if value is None or value.shape is None or len(value.shape) != 4:
        raise NoAttentionError(f"{value.name if value is not None else 'nothing'} has not four axes")
    return [size if isinstance(size, int) else size.value for size in value.shape]


def _int(node: ir.Node, name: str, otherwise: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else otherwise


def _perm(node: ir.Node) -> Sequence[int]:
    return node.attributes["perm"].as_ints() if "perm" in node.attributes else ()


def _ints(value: ir.Value | None) -> list[int] | None:
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
