"""Cut the graph of a rank where ranks exchange values: one graph a stage, what lives across a cut as its borders.

An exchange stands in the graph as a node of `moe_export`, `AllReduce` or `AllToAll`, which no engine knows. A node's
stage is the number of exchanges on the longest way to it, so that exchanges that do not wait for one another happen
together. What is computed from weights alone is moved to the first stage that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass, ShapeInferencePass

from moe_export.errors import Code, NotExportableError
from moe_export.export.onnx.bodies import with_inner
from moe_export.export.onnx.provenance import source_location
from moe_export.export.parallel.partial_sum import DOMAIN

ALL_REDUCE, ALL_TO_ALL = "AllReduce", "AllToAll"
LAYER, BACK, CAPACITY = "layer", "back", "capacity"
Spec = tuple[ir.DataType, tuple[int | str | None, ...]]
"""Type, and sizes: a number, the name of a dimension, or None for what the data decide."""


@dataclass(frozen=True)
class Exchange:
    """Values that the ranks exchange between two stages.

    Attributes:
        kind: `all_reduce` or `all_to_all`.
        layer: Of the experts.
        after: The stage that gives `sends`.
        sends: What a rank gives, by name in its stage.
        gives: What it gets, in the same order.
        counts: Of an `all_to_all` with rows as they come: the value (R,) of rows for each rank.
        counted: The value (R,) of rows from each rank: what the exchange tells, or on the way back what is known.
        back: Whether an `all_to_all` is the way back.
        capacity: Rows for each rank, where that is fixed.
    """

    kind: str
    layer: int
    after: int
    sends: tuple[str, ...]
    gives: tuple[str, ...]
    counts: str | None = None
    counted: str | None = None
    back: bool = False
    capacity: int | None = None


@dataclass(frozen=True)
class Staged:
    """The graph of one rank in stages.

    Attributes:
        stages: In order; a stage reads inputs of the model, and values of the stages and exchanges before it.
        exchanges: In order.
        specs: Type and shape of every value that is exchanged, by name.
    """

    stages: tuple[ir.Model, ...]
    exchanges: tuple[Exchange, ...]
    specs: Mapping[str, Spec] = field(default_factory=dict)


def is_exchange(node: ir.Node) -> bool:
    """Whether a node marks an exchange."""
    return node.domain == DOMAIN and node.op_type in (ALL_REDUCE, ALL_TO_ALL)


def cut(model: ir.Model) -> Staged:
    """Cut a model at its exchanges.

    Args:
        model: With exchanges as nodes; it is used up.

    Raises:
        NotExportableError: An exchange stands in the body of a loop, where no graph can end.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in model.graph.all_nodes():
        if is_exchange(node) and node.graph is not model.graph:
            raise NotExportableError(
                "experts inside the body of a loop cannot be spread over ranks: a graph cannot end there",
                code=Code.RANKS_FORM,
                where=source_location(node),
                hint="--recurrence unrolled writes the loop out, for one length",
            )
    _settle_outputs(model.graph)
    _know_types(model)
    return _Cut(model).staged()


def exchanges_of(model: ir.Model) -> Staged:
    """The exchanges of a model that is not cut; no stages."""
    _know_types(model)
    found = _Cut(model)
    return Staged((), found.exchanges(), found.specs())


def _settle_outputs(graph: ir.Graph) -> None:
    """An output that is what an exchange gives is handed on by a node, so that the last stage has one."""
    for index, value in enumerate(graph.outputs):
        node = value.producer()
        if node is not None and is_exchange(node):
            handed = ir.node("Identity", [value])
            handed.outputs[0].shape, handed.outputs[0].type = value.shape, value.type
            handed.outputs[0].name, value.name = value.name, f"{value.name}_exchanged"
            graph.append(handed)
            graph.outputs[index] = handed.outputs[0]


def _know_types(model: ir.Model) -> None:
    """An exchange gives what it takes; whatever else crosses a cut and has no type is inferred."""
    for node in model.graph:
        if is_exchange(node):
            for given, value in zip(node.inputs, node.outputs, strict=False):
                if given is not None and value.dtype is not None and given.dtype is None:
                    given.type, given.shape = value.type, value.shape


def _infer(model: ir.Model, values: Iterable[ir.Value]) -> None:
    """Infer the types of values that have none; on a copy, as inference takes sequences for tensors."""
    unknown = {str(value.name): value for value in values if value.dtype is None or value.shape is None}
    if not unknown:
        return
    inferred = ShapeInferencePass()(model.clone()).model
    for node in inferred.graph:
        for found in node.outputs:
            value = unknown.get(str(found.name))
            if value is not None and found.dtype is not None:
                value.type, value.shape = found.type, value.shape or found.shape


class _Cut:
    """One cut.

    Attributes:
        stage: Of each node of the graph.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._graph = model.graph
        self._nodes = list(model.graph)
        self._reads = {node: list(_taken(node)) for node in self._nodes}
        self._constants = set(model.graph.initializers.values())
        self.stage = self._levels()
        self._of_value = {value: self._given_in(node) for node in self._nodes for value in node.outputs}

    def _given_in(self, node: ir.Node) -> int:
        """The first stage that may read what a node gives."""
        return self.stage[node] + is_exchange(node)

    def _levels(self) -> dict[ir.Node, int]:
        stage: dict[ir.Node, int] = {}
        fixed: set[ir.Node] = set()  # reads weights alone
        for node in self._nodes:
            makers = [maker for maker in (value.producer() for value in self._reads[node]) if maker in stage]
            stage[node] = max((stage[maker] + is_exchange(maker) for maker in makers), default=0)
            rest = [value for value in self._reads[node] if value not in self._constants]
            if all(value.producer() in fixed for value in rest):
                fixed.add(node)
        readers: dict[ir.Node, list[ir.Node]] = {}
        for node in self._nodes:
            for value in self._reads[node]:
                maker = value.producer()
                if maker in fixed:
                    readers.setdefault(maker, []).append(node)
        for node in reversed(self._nodes):
            if node in fixed and node in readers:
                stage[node] = min(stage[reader] for reader in readers[node])
        return stage

    def exchanges(self) -> tuple[Exchange, ...]:
        """In the order in which they happen."""
        nodes = sorted((node for node in self._nodes if is_exchange(node)), key=lambda node: self.stage[node])
        return tuple(_described(node, self.stage[node]) for node in nodes)

    def specs(self) -> dict[str, Spec]:
        """Of every value that is exchanged."""
        nodes = [node for node in self._nodes if is_exchange(node)]
        values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
        return {str(value.name): _spec(value) for value in values}

    def staged(self) -> Staged:
        """The stages; the graph is used up."""
        exchanges = [node for node in self._nodes if is_exchange(node)]
        count = 1 + max((self.stage[node] + 1 for node in exchanges), default=0)
        crossing = self._crossing(exchanges)
        _infer(self._model, crossing)
        found, specs = self.exchanges(), self.specs()
        nodes: list[list[ir.Node]] = [[] for _ in range(count)]
        for node in self._nodes:
            if not is_exchange(node):
                nodes[self.stage[node]].append(node)
        self._graph.outputs[:], outputs = [], list(self._graph.outputs)
        self._graph.remove(self._nodes)
        stages = [self._stage(number, mine, crossing, outputs) for number, mine in enumerate(nodes)]
        return Staged(tuple(stages), found, specs)

    def _crossing(self, exchanges: Sequence[ir.Node]) -> set[ir.Value]:
        """Values of nodes that a later stage, or an exchange, reads."""
        found = {value for node in exchanges for value in (*node.inputs, *node.outputs) if value is not None}
        for node in self._nodes:
            for value in self._reads[node]:
                maker = value.producer()
                if maker in self.stage and self.stage[node] > self._given_in(maker):
                    found.add(value)
        return found

    def _stage(
        self, number: int, nodes: Sequence[ir.Node], crossing: set[ir.Value], outputs: Sequence[ir.Value]
    ) -> ir.Model:
        """The graph of one stage; what it reads from outside becomes an input of its own, under the same name."""
        own = set(nodes)
        given = [value for node in nodes for value in node.outputs]
        leaving = [value for value in given if value in crossing]
        leaving += [value for value in outputs if value in set(given) and value not in crossing]
        inputs: dict[ir.Value, ir.Value] = {}
        constants: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            for inner in with_inner(node):
                for place, value in enumerate(inner.inputs):
                    if value is None:
                        continue
                    if value in self._constants:
                        inner.replace_input_with(place, constants.setdefault(value, _twin(value)))
                    elif self._is_outside(value, own):
                        inner.replace_input_with(place, inputs.setdefault(value, _twin(value)))
        order = [value for value in self._graph.inputs if value in inputs]
        order += [value for value in inputs if value not in set(order)]
        graph = ir.Graph(
            [inputs[value] for value in order],
            leaving,
            nodes=nodes,
            initializers=list(constants.values()),
            opset_imports={
                key: version for key, version in self._model.opset_imports.items() if key != DOMAIN
            },
            name=f"{self._graph.name or 'graph'}.stage{number}",
        )
        made = ir.Model(graph, ir_version=self._model.ir_version)
        used = {node.domain for node in graph.all_nodes()}
        for key, function in self._model.functions.items():
            if function.domain in used:
                made.functions[key] = function
        RemoveUnusedNodesPass()(made)
        return made

    def _is_outside(self, value: ir.Value, own: set[ir.Node]) -> bool:
        """Whether a value of the main graph comes from another stage."""
        maker = value.producer()
        return (maker in self.stage and maker not in own) or value in set(self._graph.inputs)


def _described(node: ir.Node, stage: int) -> Exchange:
    sends = tuple(str(value.name) for value in node.inputs if value is not None)
    gives = tuple(str(value.name) for value in node.outputs)
    layer = node.attributes[LAYER].as_int()
    if node.op_type == ALL_REDUCE:
        return Exchange("all_reduce", layer, stage, sends, gives)
    back, capacity = bool(node.attributes[BACK].as_int()), node.attributes[CAPACITY].as_int()
    if capacity:
        return Exchange("all_to_all", layer, stage, sends, gives, None, None, back, capacity)
    if back:  # values, rows for each rank, rows from each rank
        return Exchange("all_to_all", layer, stage, sends[:-2], gives, sends[-2], sends[-1], back)
    return Exchange("all_to_all", layer, stage, sends[:-1], gives[:-1], sends[-1], gives[-1], back)


def _spec(value: ir.Value) -> Spec:
    sizes = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    return value.dtype or ir.DataType.FLOAT, tuple(sizes)


def _twin(value: ir.Value) -> ir.Value:
    return ir.Value(
        name=value.name,
        shape=value.shape,
        type=value.type,
        const_value=value.const_value,
        doc_string=value.doc_string,
    )


def _taken(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its bodies included; values that a body makes for itself are there, too."""
    for inner in with_inner(node):
        yield from (value for value in inner.inputs if value is not None)
