"""`permutes_apart`: permutes that ONNX Runtime's CPU takes slowly, as two fast ones that it does not join.

    y = Transpose(x, [2, 1, 0])           a = Transpose(x, [0, 2, 1])
                                          b = Reshape(Flatten(a), shape of a)         as a, and a barrier
                                          y = Transpose(b, [1, 2, 0])

ONNX Runtime (1.31) draws a Transpose through elementwise operators, Concat, Slice and Pad into the next one, and so
makes slow permutes of fast ones, too: of a chunked scan's states, `[0, 1, 3, 4, 2]` and `[0, 2, 1, 3, 4]` behind a
Concat became `[0, 3, 1, 4, 2]`, which took a fifth of the time of a Mamba-2 block. So the barrier also stands between
two permutes that cost less apart. It moves no data: `Flatten` and `Reshape` only name other sizes. A `Reshape` alone
is drawn through as well; `Flatten` is not.

Sizes that are not known are guessed, as in plans.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from moe_export.einsum_rewrite.binding import Size
from moe_export.einsum_rewrite.onnx_known import Known, bodies, taken_names
from moe_export.einsum_rewrite.permutes import (
    Order,
    composed,
    in_two,
    inverse,
    is_fast,
    permute_price,
    price_of_two,
)
from moe_export.einsum_rewrite.prices import GUESS
from moe_export.einsum_rewrite.targets import Target
from moe_export.graph_builder import Constants, GraphBuilder, Names

APART_FOR = "moe_export.apart"
"""In the metadata of the nodes of a barrier: what it is for."""
_WHY = "onnxruntime is faster at two permutes that it does not join"
_ALLOWZERO = 14
_THROUGH = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Concat", "Div", "Erf", "Exp", "Identity", "Log", "Max", "Min", "Mul", "Neg", "Pad",
     "Pow", "Reciprocal", "Relu", "Sigmoid", "Slice", "Softplus", "Sqrt", "Sub", "Tanh", "Where"}
)  # fmt: skip
"""What a Transpose is drawn through, of those that leave the axes where they are."""
_DEPTH = 8  # operators that are looked through
_NEAR = 1.5  # how much dearer two permutes may be that are there already than the best two


def permutes_apart(
    model: ir.Model, target: Target, among: Collection[ir.Node] | None = None, names: Names | None = None
) -> int:
    """Split slow permutes, and keep fast ones from becoming slow, in place; below opset 14 nothing is done.

    Args:
        model: The graph, with bodies and functions.
        target: Whose prices decide; nothing is done for one that splits none.
        among: The nodes that may be changed; all if None.
        names: Those that are free; None for names that nothing in the model has.

    Returns:
        How many barriers there are now.
    """
    if (
        not target.splits
        or max(model.opset_imports.get(domain, 0) for domain in ("", "ai.onnx")) < _ALLOWZERO
    ):
        return 0
    found = [
        node
        for _, node in bodies(model)
        if _order(node) is not None and (among is None or node in among) and _is_slow(node)
    ]
    if not found:
        return 0
    pass_ = _Pass(Known(model), target, names or Names(taken_names(model)))
    return sum(pass_.visit(node) for node in found)


def _is_slow(node: ir.Node) -> bool:
    """Whether a permute may be slow, alone or with one that is drawn into it; those of constants are not run."""
    order, source = _permute(node)
    return source.const_value is None and (not is_fast(order) or any(True for _ in _drawn(node)))


class _Pass:
    def __init__(self, known: Known, target: Target, names: Names) -> None:
        self._known, self._target, self._names = known, target, names
        self._constants: dict[ir.Graph | ir.Function, Constants] = {}
        self._joined: dict[ir.Node, Order] = {}  # what a permute and those that are drawn into it do together

    def visit(self, node: ir.Node) -> bool:
        """Whether a barrier was made for this permute."""
        order, source = _permute(node)
        known = self._known.shape(source)
        if known is None or len(known) != len(order):
            return False
        sizes = tuple(float(size if isinstance(size, int) else GUESS) for size in known)
        first = self._drawn_into(node, order, sizes)
        start = _sizes_before(first, sizes)
        together = composed(first, order)
        two = in_two(self._target, together, start)
        if two is None:
            self._joined[node] = together
            return False
        as_they_are = price_of_two(self._target, first, order, start)
        if as_they_are < min(
            _NEAR * price_of_two(self._target, *two, start), permute_price(self._target, together, start)
        ):
            two = first, order
        w = self._writer(node)
        half = composed(inverse(first), two[0])
        node.replace_input_with(0, _barrier(w, w.transposed(source, half), [known[axis] for axis in half]))
        node.attributes["perm"] = ir.AttrInt64s("perm", list(two[1]))
        return True

    def _drawn_into(self, permute: ir.Node, order: Order, sizes: tuple[float, ...]) -> Order:
        """What is drawn into a permute with this order; of several, that with which it becomes slowest."""
        firsts = [self._joined.get(node) or _order(node) for node in _drawn(permute)]
        fitting = [first for first in firsts if first is not None and len(first) == len(order)]
        return max(
            fitting,
            key=lambda first: permute_price(
                self._target, composed(first, order), _sizes_before(first, sizes)
            ),
            default=tuple(range(len(order))),
        )

    def _writer(self, node: ir.Node) -> GraphBuilder:
        graph = node.graph
        assert graph is not None
        if graph not in self._constants:
            self._constants[graph] = Constants(graph, self._names)
        name = node.name or node.outputs[0].name or "permute"
        return GraphBuilder(self._constants[graph], name, node, before=node, typed=True)


def _barrier(w: GraphBuilder, value: ir.Value, sizes: Sequence[Size]) -> ir.Value:
    written = len(w.nodes)
    known = [size for size in sizes if isinstance(size, int)]
    flat = w.op("Flatten", value)
    shape = w.ints(*known) if len(known) == len(sizes) else w.op("Shape", value)
    apart = w.op("Reshape", flat, shape, allowzero=1, name="apart")
    for node in w.nodes[written:]:
        node.metadata_props[APART_FOR] = _WHY
    return apart


def _sizes_before(order: Order, sizes: tuple[float, ...]) -> tuple[float, ...]:
    """The sizes of what a permute takes, of those of its result."""
    return tuple(sizes[place] for place in inverse(order))


def _order(node: ir.Node) -> Order | None:
    """What a permute does; None for other nodes, and where its order is a function's attribute or left out."""
    if node.op_type != "Transpose" or node.domain or "perm" not in node.attributes:
        return None
    attribute = node.attributes["perm"]
    return None if attribute.is_ref() else tuple(attribute.as_ints())


def _permute(node: ir.Node) -> tuple[Order, ir.Value]:
    """The order of a permute, and what it takes."""
    order, source = _order(node), node.inputs[0]
    assert order is not None
    assert source is not None
    return order, source


def _drawn(permute: ir.Node) -> Iterator[ir.Node]:
    """The permutes that would be drawn into one; none from around a body."""
    _, source = _permute(permute)
    waiting, seen = [(source, 0)], {source}
    while waiting:
        value, depth = waiting.pop()
        node = value.producer()
        if node is None or node.graph is not permute.graph or depth > _DEPTH:
            continue
        if _order(node) is not None:
            yield node
        elif node.op_type in _THROUGH and not node.domain:
            for other in node.inputs:
                if other is not None and other not in seen and _may_have_as_many_axes(other, value):
                    seen.add(other)
                    waiting.append((other, depth + 1))


def _may_have_as_many_axes(value: ir.Value, other: ir.Value) -> bool:
    return value.shape is None or other.shape is None or len(value.shape) == len(other.shape)
