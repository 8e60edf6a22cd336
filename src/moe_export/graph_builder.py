"""`GraphBuilder`: ONNX nodes, written as one writes calls. Whatever here writes more than a node or two takes it.

    w = GraphBuilder.in_front_of(end, "loop_0")
    y = w.op("MatMul", a, w.op("Unsqueeze", b, w.ints(2)))

A builder knows five things of what it writes, and a writer says none of them twice:

    where       in front of the node `before`; without one in `nodes`, which whoever asked for them puts somewhere:
                in the place of a node, or into the graph of a body
    whose       the metadata of the node `origin`, for which the new ones stand: its line, its module, its block
    names       `prefix.word`, the word being the operator's or one that is given; counted where it is taken
    types       if it is `typed`, those that the operators' schemas tell, for whoever reads them before they are
                inferred; shapes come from whoever knows them
    constants   `Constants`: initializers of one graph. One with a name is one of its own; without, there is one for
                each content, whoever asks

It does not know the opset: whoever writes an operator chooses one that the graph has. `inner` is a builder for a part,
or for the body of a loop, with nodes of its own; all else is that of the builder it came from.

One direction: a builder asks its constants, and these ask for names. None of them reads what was written.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

Array = npt.NDArray[Any]

_SMALL = 2**20  # elements of a weight that is reshaped here rather than in the graph
_FEW = 8  # elements of a constant that is called after them


class Names:
    """Names that nothing else has.

    Args:
        taken: Names that were there before; looked at anew for each name, so it may be what grows.
    """

    def __init__(self, taken: Container[str] = ()) -> None:
        self._taken = taken
        self._given: set[str] = set()
        self._counts: dict[str, int] = {}

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ..."""
        name = wanted
        while name in self._given or name in self._taken:
            self._counts[wanted] = self._counts.get(wanted, 0) + 1
            name = f"{wanted}_{self._counts[wanted]}"
        self._given.add(name)
        return name


class Constants:
    """The constants that new nodes read, seen from all of one main graph or one function.

    Args:
        root: The main graph or the function.
        names: Names that are free; None for those that no initializer of the root has.
        prefix: Of the names of those that have none of their own.
        inline: Make `Constant` nodes in front of everything instead of initializers; functions have no initializers.
    """

    def __init__(
        self,
        root: ir.Graph | ir.Function,
        names: Names | None = None,
        *,
        prefix: str = "",
        inline: bool = False,
    ) -> None:
        self.names = names or Names(root.initializers if isinstance(root, ir.Graph) else ())
        self._root, self._prefix = root, prefix
        self._inline = inline or isinstance(root, ir.Function)
        self._shared: dict[tuple[Any, ...], ir.Value] = {}

    def shared(self, array: Array) -> ir.Value:
        """The constant with this content; called after it."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.add(ir.tensor(array), self._prefix + _word(array))
        return self._shared[key]

    def ints(self, *numbers: int) -> ir.Value:
        """(n,) of int64."""
        return self.shared(np.array(numbers, np.int64))

    def all_shared(self) -> Sequence[ir.Value]:
        """Those without a name of their own."""
        return list(self._shared.values())

    def add(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """A constant of its own."""
        tensor.name = name = self.names.fresh(name)
        if not self._inline and isinstance(self._root, ir.Graph):
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
            self._root.register_initializer(value)
            return value
        node = ir.node("Constant", [], {"value": tensor})
        node.outputs[0].name = name
        for first in self._root:
            self._root.insert_before(first, node)
            break
        return node.outputs[0]


def _word(array: Array) -> str:
    """`ints_0_m1`, `scalar_3`, `constant_32x1024`."""
    if array.dtype != np.int64 or array.ndim > 1 or array.size > _FEW:
        return f"constant_{'x'.join(map(str, array.shape))}".rstrip("_")
    numbers = map(str, array.ravel().tolist())
    return "_".join(["ints" if array.ndim else "scalar", *numbers]).replace("-", "m")


class GraphBuilder:
    """Writes nodes (see above).

    Attributes:
        nodes: What was written, in order.
        prefix: Of all names.
        constants: Where constants go.

    Args:
        root: The main graph or the function that constants go to; or constants that others have, too.
        prefix: Of all names.
        origin: The node that the new ones stand for; None for none.
        before: The node in front of which to write; None to collect.
        typed: Whether outputs get the types that schemas tell. Inference finds them later, too.
    """

    def __init__(
        self,
        root: ir.Graph | ir.Function | Constants,
        prefix: str,
        origin: ir.Node | None = None,
        *,
        before: ir.Node | None = None,
        typed: bool = False,
    ) -> None:
        if not isinstance(root, Constants):
            root = Constants(root, prefix=f"{prefix}.")
        self.nodes: list[ir.Node] = []
        self.prefix, self.constants = prefix, root
        self._origin, self._before, self._typed = origin, before, typed

    @classmethod
    def in_front_of(cls, node: ir.Node, prefix: str) -> GraphBuilder:
        """A builder of what stands for a node of a graph, in front of it, with types."""
        assert node.graph is not None
        return cls(node.graph, prefix, node, before=node, typed=True)

    def inner(self, prefix: str) -> GraphBuilder:
        """A builder for a part: nodes of its own, the same constants."""
        return GraphBuilder(self.constants, f"{self.prefix}.{prefix}", self._origin, typed=self._typed)

    def take(self, other: GraphBuilder) -> None:
        """Put the nodes that another builder collected behind those of this one."""
        self._put(other.nodes)

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Write a node with one output.

        Args:
            kind: The operator.
            inputs: What it takes; None where it may be left out.
            name: What to call it, behind the prefix; default: the operator.
            domain: Of the operator.
            attributes: Numbers, texts, lists of them, tensors, graphs.
        """
        return self.many(kind, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def many(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: int,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Write a node with several outputs."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        if self._origin is not None:
            node.doc_string = self._origin.doc_string
            node.metadata_props.update(self._origin.metadata_props)
        self._write(node, name or kind.lower())
        return node.outputs

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """Write a node again with other inputs: it stands for itself, and its outputs keep their types."""
        new = ir.node(
            node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs)
        )
        new.metadata_props.update(node.metadata_props)
        self._write(new, node.op_type.lower())
        for old, output in zip(node.outputs, new.outputs, strict=True):
            output.type = old.type
        return new.outputs

    def ints(self, *numbers: int) -> ir.Value:
        """A constant (n,) of int64."""
        return self.constants.ints(*numbers)

    def scalar(self, number: int) -> ir.Value:
        """A constant () of int64."""
        return self.constants.shared(np.array(number, np.int64))

    def constant(self, content: Array | np.generic | ir.TensorProtocol, name: str | None = None) -> ir.Value:
        """A constant: with a name one of its own, without the one with this content.

        Args:
            content: Of it; a tensor that is not in memory needs a name. NumPy makes a number of its own kind of what it
                computes from an array (), which is as good.
            name: Behind the prefix.
        """
        if isinstance(content, np.generic):
            content = np.asarray(content)
        if name is None:
            return self.constants.shared(content if isinstance(content, np.ndarray) else content.numpy())
        tensor = ir.tensor(content) if isinstance(content, np.ndarray) else content
        return self.constants.add(tensor, f"{self.prefix}.{name}")

    def unsqueezed(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """With axes of size 1 at these places of the result; a small constant becomes another constant."""
        if not axes:
            return value
        tensor = value.const_value
        if (
            tensor is not None
            and tensor.size <= _SMALL
            and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        ):
            return self.constant(np.expand_dims(tensor.numpy(), tuple(axes)))
        return self.op("Unsqueeze", value, self.ints(*axes))

    def transposed(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """With its axes in another order."""
        if list(order) == list(range(len(order))):
            return value
        return self.op("Transpose", value, perm=list(order))

    def _write(self, node: ir.Node, word: str) -> None:
        fresh = self.constants.names.fresh
        node.name = fresh(f"{self.prefix}.{word}")
        several = len(node.outputs) > 1
        for place, output in enumerate(node.outputs):
            output.name = fresh(f"{node.name}_{place}") if several else node.name
        if self._typed:
            for output, kind in zip(node.outputs, _types(node), strict=True):
                output.type = kind
        self._put([node])

    def _put(self, nodes: Sequence[ir.Node]) -> None:
        self.nodes += nodes
        if self._before is not None:
            assert self._before.graph is not None
            self._before.graph.insert_before(self._before, nodes)


def _types(node: ir.Node) -> list[ir.TypeProtocol | None]:
    """The types of a node's outputs, where its operator's schema tells: one type only, or that of an input."""
    found: list[ir.TypeProtocol | None] = []
    schema = _schema(node.op_type) if node.domain in ("", "ai.onnx") else None
    for place in range(len(node.outputs)):
        source = schema.outputs[min(place, len(schema.outputs) - 1)] if schema is not None else None
        found.append(_type(node, schema, source.type_str) if source and source.is_homogeneous else None)
    return found


@cache
def _schema(kind: str) -> onnx.defs.OpSchema | None:
    return onnx.defs.get_schema(kind) if onnx.defs.has(kind) else None


def _type(node: ir.Node, schema: Any, wanted: str) -> ir.TypeProtocol | None:
    for place, value in enumerate(node.inputs):
        source = schema.inputs[min(place, len(schema.inputs) - 1)]
        if value is not None and source.type_str == wanted:
            return value.type
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    only = allowed.get(wanted, [wanted])
    if len(only) > 1:
        return None
    word = only[0].removeprefix("tensor(").removesuffix(")").upper()
    return ir.TensorType(ir.DataType[word]) if word in ir.DataType.__members__ else None
