"""`canonicalize`: a traced graph in which the iterations of Python loops look alike, computing the same.

    before   slice(x, 0, 0, max) → select(·, 1, t);  copy(select(y, 1, t), v) → select_scatter(y, ·, 1, t)
    after    select(x, 1, t);                        select_scatter(y, v, 1, t)

Sizes are read off the inputs before anything else; slices of a whole axis, aliases and assertions are removed; a read
of what was just written becomes the written value; a view becomes a reshape, which takes any strides. Every rule holds
at the traced sizes, whatever they are.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from moe_export.export.recurrence.operand import SIZE
from moe_export.export.recurrence.period import LEAST_ITERATIONS
from moe_export.export.recurrence.repeated import indexed_anew
from moe_export.export.sizes import expression_of, fixed

aten = torch.ops.aten

_ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
_NUMBERS_OF_DATA = {aten.item.default, aten._local_scalar_dense.default}
_ARITHMETIC: dict[Any, Any] = {
    operator.add: aten.add.Tensor, operator.sub: aten.sub.Tensor, operator.mul: aten.mul.Tensor
}  # fmt: skip
_MOST_ENTRIES = 1024  # of a constant that is checked for holding a single number
_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default}
# A folded loop's results are laid out in memory differently from a buffer that the model fills step by step.
_ANY_STRIDES: dict[Any, Any] = dict.fromkeys(
    (aten.view.default, aten._unsafe_view.default), aten.reshape.default
)


def canonicalize(program: ExportedProgram) -> fx.Graph:
    """The program's graph in normal form: same placeholders, the model's own outputs, every node with its metadata.

    A program also returns what the model writes into (weights that it divides when first called), which is dropped.
    """
    return _Canonicalized(program).graph


class _Canonicalized:
    """Copies nodes in order; a node that a rule removes is mapped to the value that replaces it."""

    def __init__(self, program: ExportedProgram) -> None:
        self.graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}
        self._sizes: dict[Any, Any] = {}  # expression → node
        self._only_one_of: dict[int, fx.Node] = {}
        nodes = list(program.graph.nodes)
        self._anew = indexed_anew(nodes)
        self._constants = _numbers(program)
        for node in nodes:
            if node.op == "placeholder":
                self._values[node] = self._copied(node)
        self._read_sizes(program, nodes)
        for node in nodes:
            if node not in self._values and not _is_assertion(node):
                self._values[node] = (
                    self._size(node) or self._of_sizes(node) or self._simplified(node) or self._once(node)
                )
        kinds = [spec.kind for spec in program.graph_signature.output_specs]
        output = self._values[nodes[-1]]
        output.args = (
            tuple(
                value
                for kind, value in zip(kinds, output.args[0], strict=True)
                if kind is OutputKind.USER_OUTPUT
            ),
        )
        self.graph.eliminate_dead_code()

    def _copied(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, lambda source: self._values[source])
        new.target = _ANY_STRIDES.get(new.target, new.target)
        new.meta = copy.copy(node.meta)
        return new

    def _once(self, node: fx.Node) -> fx.Node:
        """A copy of a node; of a value that every iteration computes anew, one copy right after its operands."""
        value = self._anew.get(node)
        if value is None:
            return self._copied(node)
        if value not in self._only_one_of:
            last = max(self._values[source] for source in node.all_input_nodes)
            if last.op == "placeholder":
                last = [other for other in self.graph.nodes if other.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._only_one_of[value] = self._copied(node)
        return self._only_one_of[value]

    def _read_sizes(self, program: ExportedProgram, nodes: list[fx.Node]) -> None:
        """One node for each symbol that is a size of an input."""
        inputs = set(program.graph_signature.user_inputs)
        for node in nodes:
            if node.op != "placeholder" or node.name not in inputs:
                continue
            for axis, size in enumerate(node.meta["val"].shape):
                if fixed(size) is None and expression_of(size) not in self._sizes:
                    call = self.graph.call_function(aten.sym_size.int, (self._values[node], axis))
                    self._sizes[expression_of(size)] = _as_region(call, size)

    def _size(self, node: fx.Node) -> fx.Node | None:
        """The one node for this integer of the shape arithmetic."""
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            return None
        found = self._expressed(value.node.expr)
        return _as_region(found, value) if isinstance(found, fx.Node) else None

    def _of_sizes(self, node: fx.Node) -> fx.Node | None:
        """A float that nothing but sizes of the inputs decides, `width ** -0.5`: a number, as they are."""
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.SymFloat):
            return None
        if not all(SIZE in self._values[source].meta for source in node.all_input_nodes):
            return None
        return _as_region(self._copied(node), node.meta["val"])

    def _expressed(self, expression: Any) -> Any:
        """A number, or the node of a sum or product of input sizes; None for any other expression."""
        if expression.is_Integer:
            return int(expression)
        if expression not in self._sizes and expression.func in (sympy.Add, sympy.Mul):
            parts = [self._expressed(part) for part in expression.args]
            if any(part is None for part in parts):
                return None
            call = operator.add if expression.func is sympy.Add else operator.mul
            total = parts[0]
            for part in parts[1:]:
                total = self.graph.call_function(call, (total, part))
                total.meta[SIZE] = True
            self._sizes[expression] = total
        return self._sizes.get(expression)

    def _simplified(self, node: fx.Node) -> fx.Node | None:
        """The node that replaces this one, if a rule applies; else None."""
        if node.op != "call_function":
            return None
        args: Any = fx.map_arg(node.args, lambda source: self._values[source])
        if node.target in _SAME or (node.target is aten.slice.Tensor and _takes_all(args)):
            return _node(args[0])
        if node.target is aten.slice_scatter.default and _takes_all((args[0], *args[2:])):
            return _node(args[1]) if _alike(args[0], args[1]) else None
        if node.target is aten.copy.default:
            return _node(args[1]) if _alike(args[0], args[1]) else None
        if node.target is operator.getitem and args[0].target is aten.unbind.int:
            source, axis = (*args[0].args, 0)[:2]
            return self._read(node, (source, axis, args[1])) or self._select(node, source, axis, args[1])
        if node.target is aten.select.int:
            return self._looked_up(node, args) or self._read(node, args)
        if node.target is aten.select_scatter.default:
            return self._written_again(node, args)
        return self._filled(node, args[0]) if node.target is aten.clone.default else None

    def _looked_up(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        """An entry at a number of the data, by the tensor that holds it: no step has a symbol for an operand."""
        at = self._held(node, node.args[2])
        if at is None:
            return None
        source, axis = args[0], args[1] % args[0].meta["val"].dim()
        value = node.meta["val"].unsqueeze(axis)
        row = self._called(node, aten.index.Tensor, (source, [None] * axis + [at]), value)
        return self._called(node, aten.select.int, (row, axis, 0), node.meta["val"])

    def _filled(self, node: fx.Node, source: fx.Node) -> fx.Node | None:
        """A constant whose entries are all one number, as the `torch.full` that makes it; None for others."""
        if source.name not in self._constants:
            return None
        number = self._constants[source.name]
        value = node.meta["val"]
        call = self.graph.call_function(
            aten.full.default, (list(value.shape), number), {"dtype": value.dtype, "device": value.device}
        )
        call.meta = copy.copy(node.meta)
        return call

    def _held(self, node: fx.Node, number: Any) -> fx.Node | None:
        """The tensor (1,) that holds a number of the data, or a sum or product of one and integers."""
        if not isinstance(number, fx.Node):
            return None
        if number.target in _NUMBERS_OF_DATA:
            one = self._values[number.args[0]]  # type: ignore[index]
            return self._called(node, aten.reshape.default, (one, [1]), one.meta["val"].reshape(1))
        operator_of_tensors = _ARITHMETIC.get(number.target)
        if operator_of_tensors is None or not isinstance(number.args[1], int):
            return None
        one = self._held(node, number.args[0])
        return one and self._called(node, operator_of_tensors, (one, number.args[1]), one.meta["val"])

    def _called(self, node: fx.Node, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        """A new node with the metadata of one that it replaces."""
        call = self.graph.call_function(target, args)
        call.meta = {**node.meta, "val": value}
        return call

    def _written_again(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        """A write over a write at the same place: only the second one stays. Negative indices are resolved."""
        before, value, axis, index = args
        size = fixed(before.meta["val"].shape[axis])
        if isinstance(index, int) and size is not None:
            index %= size
        while before.target is aten.select_scatter.default and before.args[2:] == (axis, index):
            before = before.args[0]
        if (before, index) == (args[0], args[3]):
            return None
        call = self.graph.call_function(aten.select_scatter.default, (before, value, axis, index))
        call.meta = copy.copy(node.meta)
        return call

    def _select(self, node: fx.Node, source: fx.Node, axis: int, index: Any) -> fx.Node:
        call = self.graph.call_function(aten.select.int, (source, axis, index))
        call.meta = copy.copy(node.meta)
        return call

    def _read(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        """A read after writes: the value that was written there, else a read of the buffer before them."""
        source, axis, index = args
        while isinstance(index, int) and source.target is aten.select_scatter.default:
            before, written, at_axis, at = source.args
            rank = len(before.meta["val"].shape)
            size = fixed(before.meta["val"].shape[axis])
            if not isinstance(at, int) or at_axis % rank != axis % rank or size is None:
                break
            if at % size == index % size:
                return _node(written) if _alike(node, written) else None
            source = before
        if source is args[0]:
            return None
        return self._select(node, source, axis, index)


def _numbers(program: ExportedProgram) -> dict[str, int | float]:
    """Constants in the code that hold one number, `torch.tensor(t)`, by placeholder; only of a shape and dtype that at
    least three constants share: those may be one for each iteration.
    """
    constants = program.graph_signature.inputs_to_lifted_tensor_constants
    tensors = {name: program.constants[target] for name, target in constants.items()}
    alike = Counter((tensor.shape, tensor.dtype) for tensor in tensors.values())
    return {
        name: tensor.flatten()[0].item()
        for name, tensor in tensors.items()
        if alike[tensor.shape, tensor.dtype] >= LEAST_ITERATIONS
        and tensor.dtype != torch.bool
        and not tensor.is_complex()
        and 0 < tensor.numel() <= _MOST_ENTRIES
        and bool((tensor == tensor.flatten()[0]).all())
    }


def _as_region(node: fx.Node, value: Any) -> fx.Node:
    node.meta[SIZE] = True
    node.meta.setdefault("val", value)
    return node


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _is_assertion(node: fx.Node) -> bool:
    return node.op == "call_function" and any(name in str(node.target) for name in _ASSERTIONS)


def _alike(left: fx.Node, right: Any) -> bool:
    """Whether two values have the same shape and dtype, so that one can stand for the other."""
    a, b = (_facts(node.meta) if isinstance(node, fx.Node) else None for node in (left, right))
    return a is not None and a == b


def _facts(meta: Mapping[str, Any]) -> tuple[tuple[Any, ...], torch.dtype] | None:
    value = meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(expression_of, value.shape)), value.dtype


def _takes_all(args: tuple[Any, ...]) -> bool:
    """Whether slice arguments (tensor, axis, start, end, step) leave nothing out."""
    tensor, axis, start, end, step = (*args, *(None,) * 5)[:5]
    size = fixed(tensor.meta["val"].shape[axis or 0])
    whole = end is None or (isinstance(end, int) and end >= (2**62 if size is None else size))
    return start in (None, 0) and whole and step in (None, 1)
