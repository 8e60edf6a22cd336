"""The pass over an ONNX model: every Einsum, whoever wrote the file, becomes the steps of its plan.

    before   y = Einsum<equation="bld,dn->bldn">(x, a)
    after    t = Unsqueeze(x, [3])
             y = Mul(t, a)

The main graph, subgraphs of If, Loop and Scan, and functions are all rewritten. The result keeps the name, type
and metadata of what it replaces; new nodes carry the Einsum's metadata. An Einsum that cannot be rewritten
stays, with the reason; shapes are inferred once more after each round, so that one rewritten Einsum tells
the next one its rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import onnx
import onnx_ir as ir

from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.onnx_constants import FIRST_FREE_INITIALIZERS, MovedConstants
from moe_export.einsum_rewrite.onnx_known import Known, bodies, taken_names
from moe_export.einsum_rewrite.onnx_ops import OLDEST
from moe_export.einsum_rewrite.onnx_permutes import permutes_apart
from moe_export.einsum_rewrite.onnx_types import computing_type
from moe_export.einsum_rewrite.onnx_writer import GraphEngine, write
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import make_plan
from moe_export.einsum_rewrite.proof import Proof, prove_onnx
from moe_export.einsum_rewrite.sites import Site, typed_equation, user_frame
from moe_export.einsum_rewrite.targets import read_target
from moe_export.errors import Code, EquationError, NotExportableError
from moe_export.graph_builder import Names

Model = TypeVar("Model", onnx.ModelProto, ir.Model)

STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Where torch's exporter leaves the user's lines."""

BFLOAT16 = 28
"""The opset from which Einsum takes bfloat16."""

DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Options:
    """What the user wants of a rewritten model.

    Attributes:
        target: The engine to plan for (see `targets`).
        keep_einsum: Leave two-operand einsums that are plain matrix products as they are.
        max_intermediate: The most bytes that one intermediate value may take.
        fold_external: Read weights outside the file where rearranging them once saves doing so in every run.
    """

    target: str = "onnxruntime-cpu"
    keep_einsum: bool = False
    max_intermediate: int | None = None
    fold_external: bool = True

    def __post_init__(self) -> None:
        read_target(self.target)


@dataclass(frozen=True)
class Refused:
    """An Einsum that stays, and why."""

    node: str
    equation: str
    error: EquationError

    def __str__(self) -> str:
        return f"node {self.node!r}: {self.equation!r} stays: {self.error.what}"


@dataclass
class Rewriting:
    """What became of the einsums of one model, in the order of its graphs; what is kept has no proof."""

    sites: list[Site] = field(default_factory=list)
    proofs: list[Proof | None] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def rewrite_onnx(model: Model, options: Options | None = None, report: Rewriting | None = None) -> Model:
    """Replace every Einsum of an ONNX model.

    Args:
        model: An `onnx.ModelProto` or an `onnx_ir.Model`; stays as it is.
        options: What the user wants.
        report: Takes note of every einsum.

    Returns:
        A model of the same kind without Einsum.

    Raises:
        NotExportableError: An Einsum cannot be rewritten and there is no `report` to say so.
        ProofError: The new nodes do not compute what the Einsum did.
    """
    options = options or Options()
    if isinstance(model, onnx.ModelProto):
        graph = ir.from_proto(model)
        # A proto does not know where its external data lies.
        done = rewrite_in_place(graph, Options(**{**vars(options), "fold_external": False}))
        new: ir.Model | onnx.ModelProto = _kept(ir.to_proto(graph), model)
    else:
        new = model.clone()
        done = rewrite_in_place(new, options)
    if report is not None:
        report.sites += done.sites
        report.proofs += done.proofs
        report.refused += done.refused
    elif done.refused:
        raise NotExportableError(str(done.refused[0]), code=Code.EINSUM, where=done.refused[0].error.where,
                                 hint=done.refused[0].error.hint)  # fmt: skip
    return cast("Model", new)


def _kept(new: onnx.ModelProto, old: onnx.ModelProto) -> onnx.ModelProto:
    """Put back what the intermediate representation has no place for, and leave out what it adds."""
    new.training_info.extend(old.training_info)
    written = {info.name for info in old.graph.value_info}
    repeated = {tensor.name for tensor in new.graph.initializer} - written
    infos = [info for info in new.graph.value_info if info.name not in repeated]
    del new.graph.value_info[:]
    new.graph.value_info.extend(infos)
    new.graph.sparse_initializer.extend(old.graph.sparse_initializer)
    return new


def rewrite_in_place(model: ir.Model, options: Options) -> Rewriting:
    """Replace every Einsum of `model` itself that can be replaced."""
    pass_ = _Pass(model, options)
    while pass_.round():
        pass
    return pass_.finish()


class _Pass:
    def __init__(self, model: ir.Model, options: Options) -> None:
        self._model, self._options = model, options
        self._names = Names(taken_names(model))
        self._places = OutputPlaces()
        self._constants: dict[ir.Graph | ir.Function, MovedConstants] = {}
        self._found: dict[ir.Node, tuple[Site, Proof | None]] = {}
        self._order = [node for _, node in bodies(model) if _is_einsum(node)]
        self._refused: dict[ir.Node, Refused] = {}
        self._written: set[ir.Node] = set()

    def round(self) -> bool:
        """Rewrite what can be rewritten; whether another round may bring more."""
        self._refused.clear()
        waiting = [(root, node) for root, node in bodies(self._model) if self._is_open(node)]
        if not waiting:
            return False
        known = Known(self._model)
        for root, node in waiting:
            equation = _text(node)
            try:
                self._found[node] = self._rewrite(root, node, known)
            except EquationError as error:
                self._refused[node] = Refused(node.name or str(node.outputs[0].name), equation, error)
        _remove([node for _, node in waiting if node in self._found and not self._found[node][0].kept])
        return 0 < len(self._refused) < len(waiting)

    def finish(self) -> Rewriting:
        """Clear up, and tell what happened."""
        for constants in self._constants.values():
            constants.drop_replaced()
        permutes_apart(self._model, read_target(self._options.target), self._written, self._names)
        found = [self._found[node] for node in self._order if node in self._found]
        refused = [self._refused[node] for node in self._order if node in self._refused]
        return Rewriting([site for site, _ in found], [proof for _, proof in found], refused)

    def _is_open(self, node: ir.Node) -> bool:
        return _is_einsum(node) and node not in self._found

    def _rewrite(
        self, root: ir.Graph | ir.Function, node: ir.Node, known: Known
    ) -> tuple[Site, Proof | None]:
        equation = Equation.parse(_text(node), "torch")
        operands = [value for value in node.inputs if value is not None]
        constants = self._constants_of(root)
        dtype = next((found for value in operands if (found := known.dtype(value))), None)
        opset = self._opset(root)
        plan = make_plan(
            equation,
            known.shapes(equation, operands),
            constants=[k for k, value in enumerate(operands) if constants.known(value) is not None],
            target=self._options.target,
            limit=self._limit(dtype),
        )
        via = computing_type(plan, dtype, opset, self._options.target)
        site = _site(node, equation, plan)
        if (
            self._options.keep_einsum
            and plan.is_gemm
            and (dtype != ir.DataType.BFLOAT16 or opset >= BFLOAT16)
        ):
            return replace(site, kept=True), None
        proof = prove_onnx(plan, opset, site.where)
        engine = GraphEngine(node, opset, constants)
        result = write(plan, operands, engine, None if via is None or dtype is None else (via, dtype))
        _replace(node, engine.nodes, result, self._places)
        self._written.update(engine.nodes)
        return site, proof

    def _limit(self, dtype: ir.DataType | None) -> int | None:
        """The limit in elements; a type that is not known is taken to have 4 bytes."""
        if self._options.max_intermediate is None:
            return None
        return int(self._options.max_intermediate / (dtype.itemsize if dtype is not None else 4))

    def _constants_of(self, root: ir.Graph | ir.Function) -> MovedConstants:
        if root not in self._constants:
            inline = (self._model.ir_version or 0) < FIRST_FREE_INITIALIZERS
            self._constants[root] = MovedConstants(
                root, self._names, inline=inline, read_external=self._options.fold_external
            )
        return self._constants[root]

    def _opset(self, root: ir.Graph | ir.Function) -> int:
        for imports in (root.opset_imports, self._model.opset_imports):
            for domain in DEFAULT_DOMAINS:
                if domain in imports:
                    return max(imports[domain], OLDEST)
        return OLDEST


def _is_einsum(node: ir.Node) -> bool:
    return node.op_type == "Einsum" and node.domain in DEFAULT_DOMAINS


def _text(node: ir.Node) -> str:
    attribute = node.attributes.get("equation")
    return "" if attribute is None or attribute.is_ref() else attribute.as_string()


def _replace(node: ir.Node, new: Sequence[ir.Node], result: ir.Value, places: OutputPlaces) -> None:
    """Put `new` in front of `node`; the result takes over the name, the users, and all that is known of it."""
    old, graph, last = node.outputs[0], node.graph, result.producer()
    assert graph is not None
    assert last is not None
    name, last.name = old.name, node.name
    result.type, result.shape, result.doc_string = old.type, old.shape, old.doc_string
    result.metadata_props.update(old.metadata_props)
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, result)
    for place in places.of(graph, old):
        graph.outputs[place] = result
    graph.insert_before(node, new)
    result.name = name


def _remove(nodes: Sequence[ir.Node]) -> None:
    """Remove nodes that nothing uses, all at once: each removal looks through the outputs of the graph."""
    dead: dict[ir.Graph | ir.Function, list[ir.Node]] = {}
    for node in nodes:
        assert node.graph is not None
        dead.setdefault(node.graph, []).append(node)
    for graph, group in dead.items():
        graph.remove(group, safe=True)


class OutputPlaces:
    """Where values stand among the outputs of their graph, looked up once for all of them."""

    def __init__(self) -> None:
        self._places: dict[ir.Graph | ir.Function, dict[ir.Value, list[int]]] = {}

    def of(self, graph: ir.Graph | ir.Function, value: ir.Value) -> list[int]:
        """The positions of a value; most have none, some files list one twice."""
        if not value.is_graph_output():
            return []
        if graph not in self._places:
            self._places[graph] = {}
            for place, output in enumerate(graph.outputs):
                self._places[graph].setdefault(output, []).append(place)
        return self._places[graph].get(value, [])


def _site(node: ir.Node, equation: Equation, plan: Plan) -> Site:
    file, line = user_frame(node.metadata_props.get(STACK_TRACE, ""))
    typed = None
    if file and line:
        line, typed = typed_equation(equation, file, line)
    name = node.name or str(node.outputs[0].name)
    return Site(file, line, "", typed or equation.text, plan, node=name)
