"""`folded_module`: a rolled graph becomes a module again, each loop one call, the length read off an input.

    before   select(a, 1, 0) mul add … select(a, 1, 9) mul add  stack
    after    loop_0([h0], [a, b], [A], L) → [h, ys]

The module runs in PyTorch at every length, so that it can be compared with the original before any ONNX is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from moe_export.export.recurrence.fold_body import BodyWriter, kept_meta, view_call, write_counting
from moe_export.export.recurrence.fold_results import outputs_of
from moe_export.export.recurrence.form import Form, FormError
from moe_export.export.recurrence.induction_sequences import InductionSequences, counts
from moe_export.export.recurrence.loop import Loop, Made, Step
from moe_export.export.recurrence.loop_body import LoopBody
from moe_export.export.recurrence.operand import PART, View, atoms
from moe_export.export.recurrence.rolled import (
    Call,
    Folded,
    ItemRef,
    LengthError,
    RolledGraph,
    Row,
    Scaled,
    Size,
    Summed,
    Value,
    Whole,
)
from moe_export.export.torch_compat.sizes import require
from moe_export.export.tracing.weight_inputs import attach, weights_by_input

aten = torch.ops.aten


class FoldedModule(nn.Module):
    """A graph with the weights of the traced model under their own names, less the given prefix.

    Args:
        program: The traced model.
        prefix: What the paths of its weights begin with.
        same: For each length, the (input number, axis) pairs whose size it is.
    """

    def __init__(
        self, program: ExportedProgram, prefix: str, same: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        super().__init__()
        self._same = tuple(same)
        self.graph = fx.Graph()
        self.targets = dict(weights_by_input(program))
        for target, tensor in self.targets.values():
            attach(self, target.removeprefix(prefix), tensor)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Run the graph node by node, so that each keeps the line of the model that it was traced from."""
        for places in self._same:
            sizes = [inputs[place].shape[axis] for place, axis in places]
            for size in sizes[1:]:
                require(size == sizes[0])  # so that a tracer knows it, too
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(self, graph=self.graph).run(*inputs)


def folded_module(
    rolled: RolledGraph,
    program: ExportedProgram,
    lengths: Sequence[Sequence[tuple[str, int]]],
    prefix: str,
) -> FoldedModule:
    """Build the module.

    Args:
        rolled: The rolled graph, with its integers as forms of the length.
        program: One of the programs that it was made from; gives the weights and inputs.
        lengths: For each length, the (placeholder, axis) pairs whose size it is; it is read off the first.
        prefix: What the paths of the weights begin with in the program, but not in the module.

    Raises:
        LengthError: A loop reads or writes in a way that cannot be folded.
    """
    inputs = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    same = [[(inputs.index(name), axis) for name, axis in places] for places in lengths]
    module = FoldedModule(program, prefix, same)
    try:
        _Builder(rolled, program, module, [places[0] for places in lengths], prefix).build()
    except FormError as error:
        raise LengthError(
            f"no single formula gives the places that its steps read or write: {error}", None
        ) from error
    module.graph.lint()
    return module


class _Builder:
    def __init__(
        self,
        rolled: RolledGraph,
        program: ExportedProgram,
        module: FoldedModule,
        lengths: Sequence[tuple[str, int]],
        prefix: str,
    ) -> None:
        self._rolled, self._program, self._module = rolled, program, module
        self._lengths_at, self._prefix = lengths, prefix
        self.graph = module.graph
        self._places: dict[str | int, fx.Node] = {}
        self._numbers: dict[Form, Any] = {}
        self._combined: dict[Scaled | Summed, fx.Node] = {}
        self._sizes: dict[fx.Node, fx.Node] = {}
        self._views: dict[Any, fx.Node] = {}
        self._loops = {item.number: item.loop for item in rolled.items if isinstance(item, Folded)}
        self._wanted = outputs_of(rolled)
        self._results: dict[int, fx.Node] = {}
        self._meta: dict[str, Any] = {}

    def build(self) -> None:
        for node in self._program.graph.nodes:
            if node.op != "placeholder":
                continue
            weight = self._module.targets.get(node.name)
            if weight is None:
                self._places[node.name] = self.graph.placeholder(node.name)
        for name, (target, _) in self._module.targets.items():
            self._places[name] = self.graph.get_attr(target.removeprefix(self._prefix))
        for index, item in enumerate(self._rolled.items):
            if isinstance(item, Folded):
                self._meta = kept_meta(item.loop.first)
                self._results[item.number] = self._loop(item)
            else:
                self._meta = kept_meta(item.node)
                self._places[index] = self._call(item)
        self.graph.output(self.argument(self._rolled.outputs))
        self.graph.eliminate_dead_code()

    # Numbers and values

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write a node with the metadata of the item that is being written."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(self._meta)
        return node

    def _length(self, of: int) -> fx.Node:
        """A length, or after the last the product of all."""
        if of == len(self._lengths_at):
            return reduce(partial(self.call, operator.mul), map(self._length, range(of)))
        name, axis = self._lengths_at[of]
        return self.call(aten.sym_size.int, self._places[name], axis)

    def number(self, number: Any) -> Any:
        """A number, or the node that computes it from the length."""
        if isinstance(number, Value):
            return self.value(number)
        if isinstance(number, Size):
            return self._size(number.node)
        if isinstance(number, (Scaled, Summed)):
            return self._with_sizes(number)
        if not isinstance(number, Form):
            return number
        if number not in self._numbers:
            whole = Form(1, 0, of=number.of)
            length = self._numbers.get(whole)
            if length is None:
                length = self._numbers[whole] = self._length(number.of)
            total: Any = length
            if number.slope != 1:
                total = self.call(operator.mul, total, number.slope)
            if number.offset:
                total = self.call(operator.add, total, number.offset)
            if number.divisor != 1:
                total = self.call(operator.floordiv, total, number.divisor)
            if number.factor != 1:
                total = self.call(operator.mul, total, number.factor)
            if number.plus:
                total = self.call(operator.add, total, self.call(operator.mul, length, number.plus))
            if number.shift:
                total = self.call(operator.add, total, number.shift)
            self._numbers[number] = total
        return self._numbers[number]

    def _size(self, node: Any) -> Any:
        """Compute a size as the trace computes it from those of the inputs."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "placeholder":
            return self._places[node.name]
        if node not in self._sizes:
            assert callable(node.target)
            self._sizes[node] = self.call(node.target, *(self._size(argument) for argument in node.args))
        return self._sizes[node]

    def _with_sizes(self, number: Scaled | Summed) -> fx.Node:
        """A number of the length times sizes of the inputs, or plus such."""
        if number not in self._combined:
            combine = operator.mul if isinstance(number, Scaled) else operator.add
            total = self.number(number.number)
            for size in number.sizes:
                total = self.call(combine, total, self._size(size.node))
            self._combined[number] = total
        return self._combined[number]

    def value(self, value: Any) -> fx.Node:
        """The node of a value."""
        return self.viewed(self._base(value), value.path)

    def viewed(self, node: fx.Node, path: tuple[View, ...]) -> fx.Node:
        """A node with views applied to it."""
        for view in path:
            key = (node, view)
            if key not in self._views:
                self._views[key] = view_call(self.call, node, view, [self.number(n) for n in view.numbers])
            node = self._views[key]
        return node

    def _base(self, value: Value) -> fx.Node:
        base: Any = value.base
        if isinstance(base, ItemRef):
            return self._places[base.key]
        if isinstance(base, Whole):
            return self._wanted[base.loop].buffer(self, base.position)
        assert isinstance(base, Made)
        return self._wanted[base.loop].made(self, base)

    def result(self, loop: int, index: int) -> fx.Node:
        """One of the results of a loop's call."""
        return self.viewed(self._results[loop], (View(PART, (index,)),))

    def loop(self, number: int) -> Loop:
        """The loop with this number."""
        return self._loops[number]

    def item(self, place: ItemRef) -> Any:
        """The item at a place; None for an input."""
        return self._rolled.items[place.key] if isinstance(place.key, int) else None

    # Items

    def argument(self, argument: Any) -> Any:
        """Arguments of a call outside loops: nodes in the place of values, numbers or nodes in the place of forms."""
        if isinstance(argument, dict):
            return {key: self.argument(value) for key, value in argument.items()}
        if isinstance(argument, tuple):
            return tuple(self.argument(value) for value in argument)
        if isinstance(argument, Value):
            return self.value(argument)
        return self.number(argument)

    def _call(self, item: Call) -> fx.Node:
        if item.args and isinstance(item.args[0], tuple) and any(isinstance(v, Row) for v in item.args[0]):
            return self._collecting(item)
        if any(counts(leaf) for leaf in atoms((item.args, item.kwargs))):
            step = Step(item.target, item.args, item.kwargs)
            return write_counting(
                self.call,
                step,
                item.node,
                self.argument,
                InductionSequences(self.call, self.number, 1).scalar,
            )
        return self.call(item.target, *self.argument(item.args), **self.argument(item.kwargs))

    def _collecting(self, item: Call) -> fx.Node:
        """`stack` or `cat` of what loops made, and of other values before and after it."""
        axis = item.args[1] if len(item.args) > 1 else item.kwargs.get("dim", 0)
        stacking = item.target is aten.stack.default
        parts = []
        for leaf in item.args[0]:
            if isinstance(leaf, Row):
                parts.append(self._wanted[leaf.loop].row(self, leaf, item))
            else:
                node = self.value(leaf)
                parts.append(self.call(aten.unsqueeze.default, node, axis) if stacking else node)
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, axis)

    def _loop(self, item: Folded) -> fx.Node:
        writer = BodyWriter(self, item.loop)
        collected = self._wanted[item.number]
        iterations = item.loop.iterations
        least = iterations.at(1) if isinstance(iterations, Form) else int(iterations)
        graph = writer.write(collected.operands())
        body = LoopBody(item.number, graph, len(writer.initial), writer.alongs, collected.alongs(), least)
        collected.states = writer.states
        return self.call(
            body, writer.initial, writer.sequences, writer.captured, self.number(item.loop.iterations)
        )
