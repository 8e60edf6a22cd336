"""Error localisation for a graph that is not equal to its model: where the export room and the search for a node meet.

The right values come from running the traced program: a node's metadata name the operator, the source line and the
module that it computes, so the value of that operator is what the node should give. Where several nodes remain suspect
(an operator became many, a loop became a body), the model is exported again; if that graph is right and was made in the
same way, every value has its counterpart there, in bodies too.
"""

from __future__ import annotations

import json
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx
from torch.export.graph_signature import InputKind

from moe_export.export.frontend.source import line_of
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.float32_kernels import with_float32_kernels
from moe_export.export.onnx.functions import without_functions
from moe_export.export.onnx.provenance import (
    FX,
    MODULE,
    OPERATOR,
    SOURCE,
    operator_name,
    relative_line,
    shorten_metadata,
    strip_scope,
)
from moe_export.export.options import Options
from moe_export.export.pipeline import Graph, export_subject
from moe_export.export.torch_compat.metadata import stack_trace_of
from moe_export.export.tracing.trace import SCOPE, Traced, quiet, trace
from moe_export.options.table import options_of
from moe_export.verify.bodies import bodies
from moe_export.verify.localise.difference import constant_difference
from moe_export.verify.localise.level import Level, Value
from moe_export.verify.localise.optimised import OptimiserFault, find_optimiser_fault, wrong_level
from moe_export.verify.localise.reference import GivenValues, GraphValues, ReferenceValues
from moe_export.verify.localise.search import Localisation, NodeError, find_faulty_node
from moe_export.verify.runners.torch_runner import to_numpy, to_torch
from moe_export.verify.specs import Array

OPTIONS = "moe_export.options"
"""The metadata that `graph_options` are stored under."""
_DECIDING = {"fold", "outline", "expand", "simplify", "quantize"}
"""The stages whose options decide which nodes a graph has. Its opset and its type can be read from the graph itself."""
_REWRITING = tuple(option.name for option in options_of("export") if _DECIDING & set(option.read_by))
_MAY_DIFFER = 0.1
"""The share of nodes that two graphs made in the same way may differ in; three nodes are always allowed."""
ENGINE_AT_FAULT = "onnxruntime's CPU gives the right outputs for these inputs: the engine is at fault"

IsRight = Callable[[Mapping[str, Value]], bool]


def graph_options(options: Options) -> str:
    """The options that decide which nodes a graph has, as JSON for the graph's metadata."""
    return json.dumps({name: getattr(options, name) for name in _REWRITING})


def open_graph(path: Path, folder: Path) -> onnx.ModelProto:
    """A graph ready for error localisation: weights loaded, functions inlined, half precision run by float32 kernels.

    Args:
        path: The file.
        folder: The model's folder, which source lines in the metadata are made relative to.
    """
    model = ir.load(path)
    if any(map(stack_trace_of, model.graph.all_nodes())):
        shorten_metadata(model, SCOPE, folder)  # torch's own exporter writes whole stack traces
    return _ready(model)


def _ready(model: ir.Model) -> onnx.ModelProto:
    return ir.to_proto(with_float32_kernels(without_functions(model)))


def localise(
    model: onnx.ModelProto,
    inputs: Mapping[str, Array],
    subject: Subject,
    reference: Subject,
    is_right: IsRight,
    is_right_but_rounded: IsRight,
) -> Localisation | OptimiserFault | str:
    """Find the first faulty node of a graph, on inputs that it is known to be wrong on.

    Args:
        model: The graph, from `open_graph`.
        inputs: The inputs, by the graph's names.
        subject: The model that it was made from.
        reference: What it should compute, under the graph's names: the model, or a gate of it.
        is_right: Judges the graph's outputs for these inputs.
        is_right_but_rounded: Likewise, by the precision that the graph computes in.

    Returns:
        The first faulty node, of the graph itself or as onnxruntime optimises it; or a sentence that says why none can
        be named.
    """
    level = wrong_level(model, inputs, is_right)
    if level is None:
        return ENGINE_AT_FAULT
    if level != "none":
        return find_optimiser_fault(model, inputs, level)
    traced = trace(reference)
    program = program_values(model, inputs, traced)
    found = None if program is None else find_faulty_node(model, inputs, program)
    if found is not None and found.faulty is not None and _stands_alone(model, found.faulty):
        differs = tuple(_weight_differences(model, found.faulty, traced))
        return replace(found, faulty=replace(found.faulty, differs=differs))
    good = _reexported_values(model, inputs, subject, is_right_but_rounded)
    if good is not None:
        found = find_faulty_node(model, inputs, good)
    if found is None and _dtype(model) != "float32":
        return "nodes in low precision are compared with those of a new export, and that is not right either"
    unnamed = "the graph does not say which operators of the model its nodes compute, so none can be named"
    return found or unnamed


def _stands_alone(model: onnx.ModelProto, error: NodeError) -> bool:
    """Whether the fault is down to a single node without bodies."""
    node = next((node for node in model.graph.node if error.value in node.output), None)
    return not error.also and node is not None and not bodies(node)


def _weight_differences(model: onnx.ModelProto, error: NodeError, traced: Traced) -> Iterator[str]:
    """How the weights that a node reads differ from the model's weights of the same names, one line each."""
    node = next(node for node in model.graph.node if error.value in node.output)
    for tensor in model.graph.initializer:
        weight = traced.program.state_dict.get(tensor.name)
        if tensor.name in node.input and weight is not None:
            right = onnx.numpy_helper.from_array(to_numpy(weight), tensor.name)
            line = constant_difference(tensor, right, tensor.name)
            if line is not None:
                yield line


def _reexported_values(
    model: onnx.ModelProto, inputs: Mapping[str, Array], subject: Subject, is_right: IsRight
) -> GraphValues | None:
    """The values of a new export of the model with the graph's own options.

    None if that fails, is not right for these inputs, or has other nodes.
    """
    facts = {entry.key: entry.value for entry in model.metadata_props}
    if model.producer_name != "moe-export":
        return None
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 17)
    kind, path = facts.get("moe_export.kind", "model"), facts.get("moe_export.module", "")
    options = remembered_options(facts, opset)
    try:
        with quiet():
            graphs = export_subject(subject, options)
        good = _ready(next(graph.model for graph in graphs if is_of(graph, kind, path)))
        if not alike(model, good):
            return None
        found = Level.of(good).read([output.name for output in good.graph.output], inputs)
        return GraphValues(good, inputs) if is_right(found) else None
    except Exception:  # an export that fails or does not run says nothing about the graph in question
        return None


def remembered_options(facts: Mapping[str, str], opset: int) -> Options:
    """The options that make a graph again, from its metadata."""
    kind, path = facts.get("moe_export.kind", "model"), facts.get("moe_export.module", "")
    return Options(
        opset=opset,
        gates=path if kind == "gate" else False,
        decode=kind == "step",
        decoder=kind == "decoder",
        dtype=facts.get("moe_export.dtype", "float32"),  # type: ignore[arg-type]
        **json.loads(facts.get(OPTIONS, "{}")),
    )


def is_of(graph: Graph, kind: str, path: str) -> bool:
    """Whether a graph is of this kind, and of a gate of this module."""
    return graph.kind == kind and (kind != "gate" or graph.path == path)


def alike(model: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Whether two graphs were made in the same way: nearly all nodes have the same operator, inputs and outputs."""
    mine, theirs = _nodes(model), _nodes(other)
    unlike = max((mine - theirs).total(), (theirs - mine).total())
    return unlike <= max(3, _MAY_DIFFER * theirs.total())


def _nodes(model: onnx.ModelProto) -> Counter[tuple[Any, ...]]:
    return Counter((node.op_type, *node.input, "→", *node.output) for node in model.graph.node)


def program_values(
    model: onnx.ModelProto, inputs: Mapping[str, Array], traced: Traced
) -> ReferenceValues | None:
    """Run a traced program, and return its values under the names of a graph that was made from it.

    A node is matched with an operator of the same origin (operator, source line, module) by the operator's name; where
    an export has renumbered the names, by its position among the nodes of that origin. Nothing is matched in a
    low-precision graph, which rounds where the program does not.

    Returns:
        The values; None if no value but the outputs can be matched, or the program does not run on these inputs.
    """
    if _dtype(model) != "float32" or not _takes(traced, inputs):
        return None
    try:
        recorded = _run(traced, inputs)
    except Exception:  # at sizes that the trace was not made for, an operator may raise anything
        return None
    nodes = [node for node in traced.program.graph.nodes if node.op == "call_function"]
    folder = traced_folder(model, nodes)
    theirs: dict[_Origin, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        if node.target is not operator.getitem:
            theirs[_origin(node, folder, traced.scope)].append(node)
    mine: dict[_Origin, list[onnx.NodeProto]] = defaultdict(list)
    for made in model.graph.node:
        facts = {entry.key: entry.value for entry in made.metadata_props}
        origin = _Origin(facts.get(OPERATOR, ""), facts.get(SOURCE, ""), facts.get(MODULE, ""))
        if origin.operator and (FX in facts or _is_last_of(made, origin.operator)):
            mine[origin].append(made)
    matched: dict[str, Value] = {}
    for origin, made_there in mine.items():
        there = theirs.get(origin, [])
        by_name = {name: node for node in there for name in (node.name, *_names(node))}
        for index, made in enumerate(made_there):
            kept = next((entry.value for entry in made.metadata_props if entry.key == FX), "")
            same = next((by_name[name] for name in (kept, *made.output) if name in by_name), None)
            if same is None and len(there) == len(made_there):
                same = there[index]
            names = [] if same is None else _names(same)
            pairs = zip(made.output, names, strict=False)
            matched |= {value: recorded[name] for value, name in pairs if value and name in recorded}
    outputs = {output.name for output in model.graph.output}
    matched |= _returned(traced, recorded, outputs)
    return GivenValues(matched) if len(matched) > len(outputs) else None


def _dtype(model: onnx.ModelProto) -> str:
    """The narrowest type that a graph computes in, according to its metadata."""
    return next((entry.value for entry in model.metadata_props if entry.key == "moe_export.dtype"), "float32")


def _takes(traced: Traced, inputs: Mapping[str, Array]) -> bool:
    """Whether inputs have the sizes that the trace fixed; at others the program may run, with meaningless values."""
    return all(
        not isinstance(want, int) or want == got
        for name, shape in traced.inputs.items()
        if name in inputs
        for want, got in zip(shape, inputs[name].shape, strict=True)
    )


@dataclass(frozen=True)
class _Origin:
    """What a node computes: an operator, at a source line, in a module."""

    operator: str
    source: str
    module: str


def _origin(node: fx.Node, folder: Path, scope: str) -> _Origin:
    line = line_of(node.stack_trace)
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    module = strip_scope(stack[-1], scope) if stack else ""
    return _Origin(operator_name(node.target), "" if line is None else relative_line(line, folder), module)


def _names(node: fx.Node) -> list[str]:
    """The name of a node's value; for a node with several values, their names in order, "" for an unused one."""
    parts = {int(str(user.args[1])): user.name for user in node.users if user.target is operator.getitem}
    return [parts.get(index, "") for index in range(1 + max(parts))] if parts else [node.name]


def _returned(traced: Traced, recorded: Mapping[str, Array], outputs: set[str]) -> dict[str, Value]:
    """The program's outputs by the graph's output names."""
    names = traced.program.graph_signature.user_outputs
    pairs = zip(traced.outputs, names, strict=False)
    return {mine: recorded[other] for mine, other in pairs if mine in outputs and other in recorded}


def _is_last_of(node: onnx.NodeProto, target: str) -> bool:
    """Whether a node is the last of those made from an operator: torch's exporter names only that one after it."""
    parts = target.split(".")
    stem = parts[1] if len(parts) > 1 else target
    return re.fullmatch(rf"node_{re.escape(stem)}_*\d*", node.name) is not None


def traced_folder(model: onnx.ModelProto, nodes: Iterable[fx.Node]) -> Path:
    """The folder that a graph's source lines are relative to, found by matching them with the program's.

    The current folder if none matches.
    """
    lines = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == SOURCE}
    for node in nodes:
        line = line_of(node.stack_trace)
        if line is None:
            continue
        for parent in Path(line).parents:
            if relative_line(line, parent) in lines:
                return parent
    return Path.cwd()


class _Recorder(fx.Interpreter):
    """Runs a program and records the tensor of every operator, as an array by the node's name."""

    def __init__(self, module: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.found: dict[str, Array] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op == "call_function":
            self.found[n.name] = to_numpy(result)
        return result


def _run(traced: Traced, inputs: Mapping[str, Array]) -> dict[str, Array]:
    program = traced.program
    given = iter(traced.inputs)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            name = next(given)
            arguments.append(to_torch(inputs[name]) if name in inputs else traced.example[name])
        elif spec.target in program.state_dict:
            arguments.append(program.state_dict[spec.target])
        else:
            arguments.append(program.constants[spec.target])
    recorder = _Recorder(program.graph_module, program.graph)
    with torch.no_grad():
        recorder.run(*arguments)
    return recorder.found
