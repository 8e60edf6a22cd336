"""Count parameters, FLOPs, memory of values and rows exchanged on a traced program, at any sizes, without running it.

Experts are counted per pair of a token and an expert: the trace shows each expert once, or all tokens at all experts,
while a rank computes only the pairs of its own experts.

Letters: N tokens, k choices, S = N*k pairs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from moe_export.export.experts.body import Experts
from moe_export.export.experts.recognise import find_experts
from moe_export.export.gates.region import ancestors, scope_of
from moe_export.export.quantize.rounding import block_of
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.tracing.dims import default_name

_aten = torch.ops.aten
_VIEWS = {
    _aten.view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.transpose.int, _aten.permute.default, _aten.expand.default, _aten.slice.Tensor, _aten.select.int,
    _aten.alias.default, _aten.detach.default, _aten.t.default, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.unflatten.int, _aten.numpy_T.default,
}  # fmt: skip
_TOKEN, _SLOT, _EXPERT = 0, 1, 2  # the first inputs of an expert's body
_ROWS = 7  # rows that a body is run on: a size that no weight is likely to have

Sizes = Mapping[str, int]

_MATRIX = 2
"""Axes from which on a weight can be packed."""


@dataclass(frozen=True)
class ExpertsCount:
    """A block of experts.

    Attributes:
        module: The path of the module that computes the result.
        line: `file:line` of the block in the user's code; None if unknown.
        experts: E.
        slots: k.
        bytes_each: (E,) bytes of the parameters that belong to each expert.
        flops: FLOPs of one pair.
        values: Bytes of all values of one pair together.
        partial: Bytes of a token in the partial sum.
        there: Bytes of a row on its way to its expert: the row's values, and the expert's int64 index.
        back: Bytes of a row on its way back.
        tokens: N at given sizes of the free dimensions.
    """

    module: str
    line: str | None
    experts: int
    slots: int
    bytes_each: tuple[int, ...]
    flops: int
    values: int
    partial: int
    there: int
    back: int
    tokens: Callable[[Sizes], int]


@dataclass(frozen=True)
class Counted:
    """The counts of a model.

    Attributes:
        parameters: The number of parameters.
        bytes: Bytes of all parameters and buffers that the model reads.
        blocks: Its blocks of experts, in order.
        dims: The symbol of each free dimension → its size in the example.
        names: The symbol of each free dimension → its name.
        flops: FLOPs outside the experts, at given sizes.
        memory: At given sizes, the peak bytes of values outside the experts, and their bytes at each block's result.
        refused: Why other code that looks like experts was not recognised.
    """

    parameters: int
    bytes: int
    blocks: tuple[ExpertsCount, ...]
    dims: Mapping[str, int]
    names: Mapping[str, str]
    flops: Callable[[Sizes], int]
    memory: Callable[[Sizes], tuple[int, tuple[int, ...]]]
    refused: tuple[str, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the parameters and buffers that every rank holds: those of no expert."""
        return self.bytes - sum(sum(block.bytes_each) for block in self.blocks)


def count(program: ExportedProgram, scheme: Scheme | None = None) -> Counted:
    """Count a traced program, whose weights may be on the meta device.

    Args:
        program: The program.
        scheme: How the experts' weights will be packed; None for as they are.
    """
    program, found, refused = find_experts(program)
    graph = program.graph
    places = {node: place for place, node in enumerate(graph.nodes)}
    found = tuple(sorted(found, key=lambda experts: places[experts.result]))
    states = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    held = {
        node: value_of(node)
        for node in graph.nodes
        if node.op == "placeholder" and node.name in states and node.users
    }
    names = set(program.graph_signature.inputs_to_parameters)
    outside = _outside(graph, found)
    blocks = [_block(experts, held, scheme) for experts in found]
    return Counted(
        parameters=sum(value.numel() for node, value in held.items() if node.name in names),
        bytes=sum(_bytes(value, {}) for value in held.values()) - sum(saved for _, saved in blocks),
        blocks=tuple(block for block, _ in blocks),
        dims=_dims(graph)[0],
        names=_dims(graph)[1],
        flops=lambda sizes: sum(_flops(node, sizes) for node in outside),
        memory=lambda sizes: _memory(graph, outside, [experts.result for experts in found], sizes),
        refused=refused,
    )


def value_of(node: fx.Node) -> Any:
    """The value that the trace recorded for a node: a tensor without data, a size, or None."""
    return node.meta.get("val")


def _weights(experts: Experts, held: Mapping[fx.Node, Any]) -> dict[fx.Node, list[int]]:
    """Parameters that belong to experts → the indices of these experts; -1 for all experts of a stacked parameter."""
    owners: dict[fx.Node, list[int]] = {}
    for weight in experts.weights:
        nodes = weight.separate or (weight.stack,) * (weight.stack is not None)
        for number, node in enumerate(nodes):
            assert node is not None
            for source in {node, *ancestors([node])} & held.keys():
                owners.setdefault(source, []).append(number if weight.separate else -1)
    return owners


def _block(experts: Experts, held: Mapping[fx.Node, Any], scheme: Scheme | None) -> tuple[ExpertsCount, int]:
    """The counts of a block, and the bytes that packing its weights saves."""
    each, saved = [0] * experts.count, 0
    for node, owners in _weights(experts, held).items():
        size = _bytes(held[node], {})
        if scheme is not None:
            packed = _packed_bytes(held[node], scheme, stacked=-1 in owners)
            size, saved = packed, saved + size - packed
        if -1 in owners:
            each = [before + size // experts.count for before in each]
        else:
            for owner in owners:
                each[owner] += size // len(owners)
    indices, result = value_of(experts.indices), value_of(experts.result)
    seen = _costs_of_row(experts)
    scopes = scope_of(experts.result)
    found = ExpertsCount(
        module=scopes[-1].removeprefix("model.") if scopes else "model",
        line=experts.line,
        experts=experts.count,
        slots=int(indices.shape[1]) if indices.dim() == 2 else 1,
        bytes_each=tuple(each),
        flops=seen.flops,
        values=seen.values,
        partial=_row_bytes(result),
        there=seen.there + 8,  # the expert's index as int64
        back=seen.back,
        tokens=lambda sizes: size_at(indices.shape[0], sizes),
    )
    return found, saved


def _outside(graph: fx.Graph, found: Sequence[Experts]) -> list[fx.Node]:
    """The nodes that the outputs need, without the blocks; of each block, only indices, shared values and start."""
    blocks = {experts.result: experts for experts in found}
    stack = [node for node in graph.nodes if node.op == "output"]
    needed = set(stack)
    while stack:
        node = stack.pop()
        block = blocks.get(node)
        sources: Sequence[fx.Node | None] = node.all_input_nodes
        if block is not None:
            sources = [block.indices, *block.shared, block.start]
        for source in sources:
            if source is not None and source not in needed:
                needed.add(source)
                stack.append(source)
    return [node for node in graph.nodes if node in needed and node not in blocks]


@dataclass(frozen=True)
class _RowCosts:
    """The costs of one row in a body: FLOPs, bytes of its values, bytes that enter the body's core and leave it."""

    flops: int
    values: int
    there: int
    back: int


def _costs_of_row(experts: Experts) -> _RowCosts:
    """Run one expert's body on `_ROWS` rows on the meta device, and count what depends on rows."""
    body, first = experts.body.graph, 3 + len(experts.shared)
    arguments = [torch.zeros(_ROWS, dtype=torch.int64, device="meta")] * 2
    arguments.append(torch.zeros(1, dtype=torch.int64, device="meta"))
    arguments += [_plain(value_of(node)) for node in experts.shared]
    for weight in experts.weights:
        value = _plain(value_of(weight.separate[0] if weight.stack is None else weight.stack))
        arguments.append(value if weight.stack is None else value[0])
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values[node] = super().run_node(node)
            return values[node]

    with torch.no_grad():
        Recorder(experts.body).run(*arguments)
    nodes = [node for node in body.nodes if node.op != "output"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    own = _below(nodes, {*inputs[first:]}, {*inputs[:_EXPERT], *inputs[3:first]})
    rows = _below(nodes, set(inputs[:_EXPERT]), set())
    core = _core(nodes, {*inputs[first:], inputs[_EXPERT], *own} - rows)
    entering = {
        source for node in core for source in node.all_input_nodes if source in rows and source not in core
    }
    result = next(node for node in body.nodes if node.op == "output").args[0]
    leaving = {node for node in core if node is result or any(user not in core for user in node.users)}
    made = [node for node in nodes if node in rows and node.op != "placeholder"]
    return _RowCosts(
        flops=sum(_flops(node, {}, values) for node in made) // _ROWS,
        values=sum(_bytes(values[node], {}) for node in made if node.target not in _VIEWS) // _ROWS,
        there=sum(_bytes(values[node], {}) for node in entering) // _ROWS,
        back=sum(_bytes(values[node], {}) for node in leaving if node in rows) // _ROWS,
    )


def _core(nodes: Sequence[fx.Node], own: set[fx.Node]) -> set[fx.Node]:
    """The nodes that read a value of the expert's own (a weight), and all nodes between such nodes."""
    core = {
        node for node in nodes if node not in own and any(source in own for source in node.all_input_nodes)
    }
    below = _below(nodes, core, set())
    above: set[fx.Node] = set(core)
    for node in reversed(nodes):
        if any(user in above for user in node.users):
            above.add(node)
    return core | (below & above)


def _below(nodes: Sequence[fx.Node], begin: set[fx.Node], without: set[fx.Node]) -> set[fx.Node]:
    """`begin`, and all nodes that depend on it but on no node of `without`."""
    found, left_out = set(begin), set(without)
    for node in nodes:
        sources = node.all_input_nodes
        if any(source in left_out for source in sources):
            left_out.add(node)
        elif any(source in found for source in sources):
            found.add(node)
    return found


def _plain(value: Any) -> torch.Tensor:
    """An empty meta tensor of the same dtype; free sizes are the example's, and at least 2."""
    shape = [size if isinstance(size, int) else max(2, _hint(size)) for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _dims(graph: fx.Graph) -> tuple[dict[str, int], dict[str, str]]:
    """By the symbol of each free dimension, its size in the example, and its name."""
    found: dict[str, int] = {}
    names: dict[str, str] = {}
    for node in graph.nodes:
        value = value_of(node)
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            shape: Sequence[Any] = value.shape
            for axis, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and str(size).isidentifier() and str(size) not in found:
                    found[str(size)] = _hint(size)
                    names[str(size)] = default_name(value, axis, node.name)
    return found, names


def _hint(size: Any) -> int:
    hint = size.node.hint
    return 1 if hint is None else int(hint)


def size_at(size: Any, sizes: Sizes) -> int:
    """A size of the trace at given sizes of the free dimensions; the example's if it depends on anything else."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    found = expression.subs(
        {symbol: sizes[str(symbol)] for symbol in expression.free_symbols if str(symbol) in sizes}
    )
    return int(found) if found.is_number else _hint(size)


def _elements(value: Any, sizes: Sizes) -> int:
    return math.prod(size_at(size, sizes) for size in value.shape)


def _bytes(value: Any, sizes: Sizes) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_bytes(part, sizes) for part in value)
    return _elements(value, sizes) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _packed_bytes(value: torch.Tensor, scheme: Scheme, *, stacked: bool) -> int:
    """At most so many bytes of a weight, once it is packed; a vector stays as it is.

    Which axis a product sums over is not known here. Blocks along the shorter one have the most scales.
    """
    matrix = value.shape[stacked:]
    if len(matrix) < _MATRIX:
        return _bytes(value, {})
    elements = _elements(value, {})
    block = block_of(int(min(matrix)), scheme)
    scales = -(-elements // block)
    codes = elements * scheme.stored.itemsize + (scales * scheme.stored.itemsize if scheme.zero_points else 0)
    return math.ceil(codes) + scales * value.element_size()


def _row_bytes(value: Any) -> int:
    return math.prod(int(size) for size in value.shape[1:]) * int(value.element_size())


def _flops(node: fx.Node, sizes: Sizes, values: Mapping[fx.Node, Any] | None = None) -> int:
    """FLOPs of a node: 2 for each multiply-add of a matrix product, 1 for each element of any other float result."""
    known: Callable[[Any], Any] = value_of if values is None else values.__getitem__
    value = known(node) if node.op == "call_function" else None
    if not isinstance(value, torch.Tensor) or node.target in _VIEWS or not value.dtype.is_floating_point:
        return 0
    made = _elements(value, sizes)
    if node.target in (_aten.linear.default, _aten.mm.default, _aten.bmm.default, _aten.matmul.default):
        return 2 * made * size_at(known(node.args[0]).shape[-1], sizes)
    if node.target is _aten.addmm.default:
        return 2 * made * size_at(known(node.args[1]).shape[-1], sizes)
    if node.target is _aten.einsum.default:
        return 2 * _einsum(str(node.args[0]), [known(part) for part in node.args[1]], sizes)  # type: ignore[union-attr]
    if node.target is _aten.scaled_dot_product_attention.default:
        query, key = known(node.args[0]), known(node.args[1])
        return 4 * _elements(query, sizes) * size_at(key.shape[-2], sizes)
    if node.target in (_aten.convolution.default, _aten.conv1d.default, _aten.conv2d.default):
        return (
            2 * made * _elements(known(node.args[1]), sizes) // size_at(known(node.args[1]).shape[0], sizes)
        )
    return made


def _einsum(equation: str, operands: Sequence[Any], sizes: Sizes) -> int:
    """Multiply-adds of an einsum: the product of all labels' sizes, an ellipsis being the axes that it stands for."""
    found: dict[str, int] = {}
    for term, value in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        shape = [size_at(size, sizes) for size in value.shape]
        middle = len(shape) - len(before) - len(after) if dots else 0
        labels = [*before, *(f".{place}" for place in range(middle, 0, -1)), *after]
        for label, size in zip(labels, shape, strict=True):
            found[label] = max(size, found.get(label, 1))
    return math.prod(found.values())


def _memory(
    graph: fx.Graph, outside: Sequence[fx.Node], results: Sequence[fx.Node], sizes: Sizes
) -> tuple[int, tuple[int, ...]]:
    """Peak bytes of the values of a run in order, each freed after its last reader; and the bytes at each result."""
    kept = {*outside, *results}
    nodes = [node for node in graph.nodes if node in kept and node.op == "call_function"]
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        sources = node.all_input_nodes
        owner[node] = owner.get(sources[0], sources[0]) if node.target in _VIEWS and sources else node
    order = {node: place for place, node in enumerate(graph.nodes)}
    last: dict[fx.Node, int] = {}
    for node in nodes:
        last[owner[node]] = max([last.get(owner[node], 0), *(order[user] for user in node.users)])
    live: dict[fx.Node, int] = {}
    now = most = 0
    at: list[int] = []
    for node in nodes:
        if owner[node] is node:
            live[node] = _bytes(value_of(node), sizes)
            now += live[node]
            most = max(most, now)
        if node in results:
            at.append(now)
        for done in [held for held in live if last[held] <= order[node]]:
            now -= live.pop(done)
    return most, tuple(at)
