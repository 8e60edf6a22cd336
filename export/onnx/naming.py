"""Names that a reader of the graph knows: modules of the model, and variables of its code.

A node is called after its module and what it does there: `layers.0.moe.gate.linear`, `mamba.silu`. Its value is called
after the variable that the model keeps it in, if the node ends that statement: `layers.0.moe.weights`; else after the
node. What experts or a recurrence were written as stands under its block: `layers.0.moe.experts.3.gemm`.

Names repeat where code runs more than once; they are counted then: `mul`, `mul_1`. Inputs and outputs have their names
already (`translate`).
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx_ir as ir

from moe_export.export.frontend.source import model_frame
from moe_export.export.onnx.provenance import BLOCK, FX, MODULE, OPERATOR, strip_scope
from moe_export.export.torch_compat.metadata import (
    classes_of,
    is_module_path,
    is_opaque,
    scopes_of,
    stack_trace_of,
)

_COUNTED = re.compile(r"^(?P<word>.+?)(_\d+)*$")
_WRITTEN = re.compile(r"^experts_\d+\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Statement:
    """A statement of the model's code, as one module runs it.

    Attributes:
        module: Path of that module.
        file, line: Where the statement begins.
        targets: The variables that it assigns; empty for another statement.
        in_order: Whether an expression stands for each of them, as in `a, b = x + 1, x - 1`. What one call returns may
            be computed in any order.
    """

    module: str
    file: str
    line: int
    targets: tuple[str, ...]
    in_order: bool = True


def statements(model: ir.Model, scope: str) -> dict[ir.Node, Statement]:
    """The statement that each node comes from, read off what torch's exporter tells of nodes.

    Args:
        model: As torch's exporter made it; its metadata are still complete.
        scope: The name that the model has as a module.
    """
    found = {}
    for node in model.graph.all_nodes():
        frame = model_frame(stack_trace_of(node))
        if frame is None:
            continue
        first, targets, in_order = _statement(*frame)
        paths, kinds = scopes_of(node) or [], classes_of(node)
        while paths and len(paths) <= len(kinds) and kinds[len(paths) - 1].startswith("torch.nn."):
            paths.pop()  # a layer of torch has no variables that a reader knows
        module = next(filter(is_module_path, reversed(paths)), "")
        found[node] = Statement(strip_scope(module, scope), frame[0], first, targets, in_order)
    return found


@cache
def _statement(file: str, line: int) -> tuple[int, tuple[str, ...], bool]:
    """Where the innermost statement that covers a line begins, the variables that it assigns, and if in order."""
    best: ast.stmt | None = None
    for statement in _simple_statements(file):
        covers = statement.lineno <= line <= (statement.end_lineno or statement.lineno)
        if covers and (best is None or statement.lineno >= best.lineno):
            best = statement
    if best is None:
        return line, (), True
    targets = tuple(_targets(best))
    value = best.value if isinstance(best, ast.Assign) else None
    in_order = len(targets) < 2 or (isinstance(value, ast.Tuple) and len(value.elts) == len(targets))
    return best.lineno, targets, in_order


@cache
def _simple_statements(file: str) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not hasattr(node, "body"))


def _targets(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            yield each.id if isinstance(each, ast.Name) else ""
    elif isinstance(statement, (ast.AugAssign, ast.AnnAssign)) and isinstance(statement.target, ast.Name):
        yield statement.target.id


def name_nodes(model: ir.Model, origins: Mapping[ir.Node, Statement]) -> None:
    """Name every node and every value that a node gives, in place.

    Args:
        model: With the metadata of `provenance`.
        origins: What `statements` found.
    """
    nodes = list(model.graph.all_nodes())
    variables = _variables(nodes, origins)
    fixed = {*model.graph.inputs, *model.graph.outputs}
    used: Counter[str] = Counter(str(value.name) for value in (*fixed, *model.graph.initializers.values()))
    node_names: Counter[str] = Counter()
    for node in nodes:
        name = _node_name(node)
        node.name = fresh_name(name, node_names)
        for index, value in enumerate(node.outputs):
            if value in fixed:
                continue
            own = name if len(node.outputs) == 1 else f"{name}.{index}"
            value.name = fresh_name(variables.get(value, own), used)


def fresh_name(name: str, used: Counter[str]) -> str:
    """The name, counted if there is one like it.

    Args:
        name: As it should be.
        used: How often each name was given, which this name is added to.
    """
    fresh = name
    while fresh in used:
        fresh = f"{name}_{used[name]}"
        used[name] += 1
    used[fresh] += 1
    return fresh


def _node_name(node: ir.Node) -> str:
    facts = node.metadata_props
    kind = node.op_type.lower()
    if BLOCK in facts:
        block, _, path = facts[BLOCK].partition(":")
        return _join(path, block, _written_word(node) or kind)
    if FX in facts:
        return _join(facts.get(MODULE, ""), _operator(facts.get(OPERATOR, ""), facts[FX]))
    stem = _operator(facts.get(OPERATOR, ""), "")
    return _join(facts.get(MODULE, ""), *([stem] if stem and stem != kind else []), kind)


def _written_word(node: ir.Node) -> str:
    """What the lowering of experts called a value, without numbers: `experts_0.3.Gemm_5_0` → `3.gemm`."""
    match = _WRITTEN.match(str(node.outputs[0].name))
    if match is None:
        return ""
    *path, word = match["rest"].split(".")
    return ".".join([*path, _uncounted(word).lower()])


def _uncounted(word: str) -> str:
    """`Gemm_5_0` → `Gemm`."""
    counted = _COUNTED.match(word)
    return counted["word"] if counted is not None else word


def _operator(target: str, other: str) -> str:
    """`aten.silu.default` → `silu`."""
    parts = target.split(".")
    word = parts[1] if len(parts) > 1 else _uncounted(other)
    return word.strip("_") if word and not is_opaque(word) else ""


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part and part != "model") or "node"


def _variables(nodes: Sequence[ir.Node], origins: Mapping[ir.Node, Statement]) -> dict[ir.Value, str]:
    """The variable of the model's code that a value is kept in, with its module's path."""
    groups: dict[Statement, list[ir.Node]] = defaultdict(list)
    for node in nodes:
        if node in origins and origins[node].targets and BLOCK not in node.metadata_props:
            groups[origins[node]].append(node)
    found: dict[ir.Value, str] = {}
    for statement, members in groups.items():
        ends = list(_ends(members))
        makers = {value.producer() for value in ends}
        maker = makers.pop() if len(makers) == 1 else None
        if maker is not None and len(maker.outputs) > 1:
            ends = list(maker.outputs)  # also those that nobody reads
        if len(ends) == len(statement.targets) and (maker is not None or statement.in_order):
            found |= {
                value: _join(statement.module, target)
                for value, target in zip(ends, statement.targets, strict=True)
                if target and target != "_"
            }
    return found


def _ends(members: Iterable[ir.Node]) -> Iterator[ir.Value]:
    """The values that a statement's nodes give to other statements."""
    own = set(members)
    for node in members:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in own for use in value.uses()):
                yield value
