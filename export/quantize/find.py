"""Which weights of a graph can be packed: those that products alone read, in what a user calls experts or linear.

A weight is followed forward to the products that use it, through what only picks or turns it:

    W ─▶ [Gather, axis 0] ─▶ [Transpose] ─▶ MatMul or Gemm
    W (E, N, K) ─▶ com.microsoft.MoE
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from moe_export.errors import UsageError
from moe_export.export.onnx.bodies import bodies
from moe_export.export.onnx.counted_sizes import without_counted
from moe_export.export.onnx.provenance import BLOCK
from moe_export.export.precision.mixed import behind_choices
from moe_export.export.weights.recipe import Held, Recipe, recipe_of

Kind = Literal["experts", "linear", "router", "recurrence"]
_WORDS = {"experts": ("experts",), "linear": ("linear",), "all": ("experts", "linear")}
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types of weights that can be packed; they are multiplied in the same type."""
MOE_WEIGHTS = (2, 4)
"""Where `com.microsoft.MoE` has its weights, each (E, N, K)."""
_LEAST = 2
"""Axes of a weight; a vector is no matrix of a product."""


@dataclass(frozen=True)
class Candidate:
    """A weight that products alone read.

    Attributes:
        value: The initializer.
        axis: The axis of it that the products sum over.
        readers: The nodes that read it: products, or what picks or turns it before them.
        products: The products.
        kind: What it is a part of.
    """

    value: ir.Value
    axis: int
    readers: tuple[ir.Node, ...]
    products: tuple[ir.Node, ...]
    kind: Kind

    @property
    def name(self) -> str:
        """Of the weight."""
        return str(self.value.name)

    @property
    def source(self) -> Recipe:
        """Its elements."""
        recipe, tensor = recipe_of(self.value), self.value.const_value
        if recipe is not None:
            return recipe
        assert tensor is not None
        return Held(tensor.numpy, tensor.dtype, tuple(tensor.shape.numpy()))


@dataclass(frozen=True)
class Left:
    """A weight that was asked for, and is left as it is.

    Attributes:
        name: Of the weight.
        reason: Why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class _Way:
    """One way of a weight to a product, or to what ends it."""

    product: ir.Node | None
    axis: int
    reason: str = ""


def find_weights(model: ir.Model, asked: str, *, whole: bool = True) -> tuple[list[Candidate], list[Left]]:
    """The weights of a graph that are to be packed, and those among them that cannot be.

    Args:
        model: The graph; shapes that it lacks may be noted in it.
        asked: `experts`, `linear`, `all`, or patterns of names (`*.mlp.*`); several with commas.
        whole: Whether each pattern has to match a weight.

    Raises:
        UsageError: A pattern matches no weight of a product.
    """
    words = [word.strip() for word in asked.split(",")]
    kinds = {kind for word in words for kind in _WORDS.get(word, ())}
    patterns = [word for word in words if word not in _WORDS]
    _know_ranks(model)
    home = dict(_homes(model.graph))
    routers = behind_choices(model.graph)
    found: list[Candidate] = []
    left: list[Left] = []
    matched: set[str] = set()
    names: list[str] = []
    for value in model.graph.initializers.values():
        if value.dtype not in FLOATS or value.shape is None or len(value.shape) < _LEAST:
            continue
        ways = list(_ways(value, tuple(range(len(value.shape)))))
        products = tuple(dict.fromkeys(way.product for way in ways if way.product is not None))
        if not products:
            continue
        names.append(str(value.name))
        kind = _kind(products, routers, home)
        own = [pattern for pattern in patterns if named(str(value.name), pattern)]
        matched.update(own)
        if kind not in kinds and not own:
            continue
        reason = next((way.reason for way in ways if way.reason), "")
        if not reason and len({way.axis for way in ways}) > 1:
            reason = "products sum over different axes of it"
        if reason:
            left.append(Left(str(value.name), reason))
        else:
            readers = tuple(dict.fromkeys(use.node for use in value.uses()))
            found.append(Candidate(value, ways[0].axis, readers, products, kind))
    for pattern in patterns:
        if whole and pattern not in matched:
            raise UsageError(
                f"--quantize {pattern}: no product of the graph has a weight of this name",
                hint=f"experts, linear, all, or a pattern of: {', '.join(names[:8])}" if names else None,
            )
    return found, left


def _know_ranks(model: ir.Model) -> None:
    """Note the shapes of what picks experts out of stacks, where nobody did: how many axes it has decides the axis."""
    nodes = list(model.graph.all_nodes())
    unknown = [place for place, node in enumerate(nodes) if _picks_at_unknown_rank(node)]
    if not unknown:
        return
    inferred = list(ShapeInferencePass()(model.clone()).model.graph.all_nodes())
    for place in unknown:
        index, known = nodes[place].inputs[1], inferred[place].inputs[1]
        if index is not None and known is not None and known.shape is not None:
            index.shape, index.type = without_counted(known.shape.copy()), index.type or known.type


def _picks_at_unknown_rank(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.inputs[0] is None or not node.inputs[0].is_initializer():
        return False
    return node.inputs[1] is not None and node.inputs[1].shape is None


def named(name: str, pattern: str) -> bool:
    """Whether a pattern means a weight: `layers.*.mlp.*`, or the path of a module."""
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _ways(value: ir.Value, axes: Sequence[int], picked: bool = False) -> Iterator[_Way]:
    """Every way of a value to a product; `axes` are the weight's axes that its own axes are, -1 for others."""
    if value.is_graph_output():
        yield _Way(None, -1, "an output of the graph")
    for use in value.uses():
        node, place = use.node, use.idx
        if node.op_type == "MatMul" and len(axes) >= _LEAST:
            yield _Way(node, axes[-1] if place == 0 else axes[-2])
        elif node.op_type == "Gemm" and place < _LEAST:
            turned = bool(node.attributes.get_int("transA" if place == 0 else "transB", 0))
            yield _Way(node, axes[-1] if (place == 0) != turned else axes[-2])
        elif is_moe(node) and place in MOE_WEIGHTS and value.is_initializer() and len(axes) > _LEAST:
            yield _Way(node, axes[-1])
        elif node.op_type == "Transpose":
            order = _order(node, len(axes))
            yield from _ways(node.outputs[0], [axes[axis] for axis in order], picked)
        elif node.op_type == "Gather" and _picks(node, place) and value.is_initializer():
            indices = node.inputs[1]
            rank = len(indices.shape) if indices is not None and indices.shape is not None else None
            if rank is None or len(axes) - 1 < _LEAST:
                yield _Way(None, -1, f"read by {node.op_type}")
            else:
                yield from _ways(node.outputs[0], [-1] * rank + list(axes[1:]), picked=True)
        else:
            yield _Way(None, -1, f"read by {node.op_type}")


def is_moe(node: ir.Node) -> bool:
    """Whether a node is ONNX Runtime's own operator for all experts at once."""
    return (node.op_type, node.domain) == ("MoE", "com.microsoft")


def _picks(node: ir.Node, place: int) -> bool:
    return place == 0 and node.attributes.get_int("axis", 0) == 0


def _order(node: ir.Node, rank: int) -> list[int]:
    given = node.attributes.get("perm")
    return list(given.as_ints()) if given is not None else list(reversed(range(rank)))


def _kind(products: Sequence[ir.Node], routers: set[ir.Node], home: dict[ir.Node, bool]) -> Kind:
    if any(node in routers for node in products):
        return "router"
    marks = {node.metadata_props.get(BLOCK, "").partition(":")[0] for node in products}
    if "recurrence" in marks or any(home[node] for node in products):
        return "recurrence"
    return "experts" if "experts" in marks else "linear"


def _homes(graph: ir.Graph, *, stepped: bool = False) -> Iterator[tuple[ir.Node, bool]]:
    """Every node, and whether it is in the body of a loop over time."""
    for node in graph:
        yield node, stepped
        for body in bodies(node):
            yield from _homes(body, stepped=stepped or node.op_type == "Scan")
