"""The first faulty node: where a graph starts to give wrong results.

Every node is run on the reference's inputs, all of them in one session: a value that the reference knows is an input of
that session wherever it is read, and an output where it is computed. The error that a node makes then is its own; the
rest of its error in the graph as it is has been inherited. The first node whose own error rounding does not explain
is the first faulty node. Nodes between two known values are judged together.

The body of a faulty Scan, Loop or If is searched in the same way, iteration by iteration, on the inputs of the
reference's iterations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypedDict

import numpy as np
import onnx

from moe_export.verify.bodies import bodies, reads
from moe_export.verify.localise.difference import differences
from moe_export.verify.localise.gap import NONE, Gap, gap
from moe_export.verify.localise.iterations import iterations
from moe_export.verify.localise.level import Cut, Engine, Level, Value
from moe_export.verify.localise.reference import ReferenceValues
from moe_export.verify.reports.report import finite
from moe_export.verify.runner import one_line

MEMORY = 1 << 30
"""Bytes of the values that are held at once, unless asked otherwise; half of them are the reference's."""
_MAX_ITERATIONS = 256
_SECONDS = 5.0


@dataclass(frozen=True)
class NodeError:
    """The error of one value of a graph.

    Args:
        node: Name of the node that computes it; the value's where a node has none.
        op: Its operator; "constant" where the graph has a constant in place of a node.
        value: Name of the value.
        own: Largest absolute error that the node adds itself, on the reference's inputs; NaN if it gives nothing
            that could be compared.
        ratio: Its own error over what rounding explains; above 1 it is too large.
        whole: Largest absolute error of the value in the graph as it is; NaN if it was not computed.
        reason: What is wrong, in words, where a number does not say it.
        module: The module of the model that it comes from.
        source: The model's line.
        also: Nodes whose values the reference does not know and that count as part of this one.
        inside: The nodes whose bodies it stands in, outermost first, with the iteration in which it was found.
        differs: How it differs from the reference's node.
    """

    node: str
    op: str
    value: str
    own: float
    ratio: float
    whole: float = float("nan")
    reason: str | None = None
    module: str = ""
    source: str = ""
    also: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    @property
    def inherited(self) -> float:
        """The part of the whole error that is not its own."""
        return max(self.whole - self.own, 0.0)

    def __str__(self) -> str:
        place = " ".join(filter(None, (self.source, f"(module {self.module})" if self.module else "")))
        where = "".join(f" in {outer}" for outer in reversed(self.inside))
        times = f"{self.ratio:,.0f}" if self.ratio >= 100 else f"{self.ratio:.3g}"
        what = self.reason or f"local error {self.own:.3g}, {times}x the expected rounding"
        inherited = f", inherited {self.inherited:.3g}" if self.inherited == self.inherited else ""
        lines = [f"{self.op} {self.node}{where}{f'  {place}' if place else ''}", f"  {what}{inherited}"]
        if self.also:
            few = ", ".join(self.also)
            many = f"the {len(self.also)} nodes before it, {self.also[0]} to {self.also[-1]}"
            lines.append(f"  judged together with {few if len(self.also) <= 8 else many}")
        lines += [f"  {line}" for line in self.differs]
        return "\n".join(lines)


class Found(TypedDict):
    """The first faulty node, and how long it took to find."""

    faulty_node: Annotated[dict[str, Any] | None, NodeError | None]
    seconds: float


@dataclass(frozen=True)
class Localisation:
    """The result of the search.

    Args:
        faulty: The first node whose own error is too large; None if every node is right by itself.
        nodes: The error of every value that the reference knows, in the graph's order.
        seconds: How long it took.
        cut: The first faulty node cut out, with the reference's inputs of it and the expected outputs.
    """

    faulty: NodeError | None
    nodes: tuple[NodeError, ...]
    seconds: float
    cut: Cut | None = None

    def __str__(self) -> str:
        if self.faulty is not None:
            return f"first faulty node: {self.faulty}"
        if not self.nodes:
            return "no value of the graph is known to the reference"
        most = max(self.nodes, key=lambda node: node.ratio)
        return f"no node is faulty by itself: the largest own error is that of\n{most}"

    def to_dict(self) -> Found:
        """Plain data, for JSON."""
        faulty = None if self.faulty is None else finite(asdict(self.faulty))
        return {"faulty_node": faulty, "seconds": self.seconds}


def find_faulty_node(
    candidate: onnx.ModelProto,
    inputs: Mapping[str, Value],
    reference: ReferenceValues,
    *,
    memory: int = MEMORY,
    level: str = "none",
    engine: Engine | None = None,
) -> Localisation:
    """Find the node that makes a graph wrong.

    Args:
        candidate: The graph, its weights inside.
        inputs: The inputs that it is wrong on, by name.
        reference: Right values.
        memory: Bytes of the values held at once; a graph with more is taken in parts, a session each.
        level: How far onnxruntime optimises the graph that is looked at; what each node does shows at "none".
        engine: What runs the graph, where that is not onnxruntime.

    Raises:
        Exception: onnxruntime fails on the reference. A candidate that fails is a finding.
    """
    start = time.perf_counter()
    search = _Search(Level.of(candidate, engine), reference, inputs, level)
    errors: list[NodeError] = []
    for names in _parts(search.names, reference.sizes(), memory):
        errors += search.errors(names)
    faulty, cut = _first(errors, reference.exact), None
    if faulty is not None:
        faulty, cut = search.described(faulty)
    return Localisation(faulty, tuple(errors), time.perf_counter() - start, cut)


def _parts(names: Sequence[str], sizes: Mapping[str, int], memory: int) -> list[list[str]]:
    """Split a list of values so that those of each part, with the reference's, fit into the memory."""
    parts: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = 2 * sizes.get(name, 0)
        if parts[-1] and held + size > memory:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


def _first(errors: Sequence[NodeError], exact: bool) -> NodeError | None:
    """The first error that is too large; against a reference to the bit, the largest if none is."""
    found = next((error for error in errors if error.ratio > 1), None)
    if found is None and exact and errors:
        largest = max(errors, key=lambda error: error.ratio)
        return largest if largest.ratio > 0 else None
    return found


class _Search:
    """One level of the candidate beside the reference's values for it."""

    def __init__(
        self, level: Level, reference: ReferenceValues, inputs: Mapping[str, Value], optimised: str
    ) -> None:
        self.level = level
        self.reference = reference
        self.inputs = inputs
        self.optimised = optimised
        known = set(reference.names)
        produced = set() if reference.level is None else reference.level.producer.keys()
        self.constant = [name for name in level.constants if name in produced]
        self.names = [*self.constant, *(name for name in level.producer if name in known)]

    def errors(self, names: Sequence[str]) -> list[NodeError]:
        """The own and the whole errors of these values."""
        computed = [name for name in names if name in self.level.producer]
        known = set(self.names)
        _, read = self.level.needed(computed, known)
        wanted = dict.fromkeys([*names, *(name for name in read if name in known)])
        values = {**self.inputs, **self.reference.values(list(wanted))}
        wholes = self._wholes(computed, values)
        owns = own_gaps(self.level, computed, values, self.optimised)
        if not self.reference.exact:
            self._forgive_order(owns, values)
        return [
            *(self._constant_error(name, values[name]) for name in names if name in self.constant),
            *(self._error(name, *owns[name], wholes.get(name)) for name in computed),
        ]

    def _wholes(self, names: Sequence[str], values: Mapping[str, Value]) -> dict[str, Gap]:
        try:
            found = self.level.read(names, self.inputs, self.optimised)
        except Exception:  # a graph that fails has no values to show; its nodes by themselves have
            return {}
        return {name: gap(values[name], found[name]) for name in names}

    def _error(self, name: str, own: Gap, got: Value | None, whole: Gap | None) -> NodeError:
        place = self.level.producer[name]
        node = self.level.graph.node[place]
        places, _ = self.level.needed([name], set(self.names) - {name}) if own.ratio > 1 else ([], None)
        also = [_name(self.level.graph.node[other]) for other in places if other != place]
        largest = float("nan") if whole is None else whole.largest
        return make_error(node, name, own, largest, also)

    def _constant_error(self, name: str, value: Value) -> NodeError:
        array = onnx.numpy_helper.to_array(self.level.constants[name])
        found = gap(value, array)
        reason = found.reason or f"a constant where the reference computes, off by {found.largest:.3g}"
        return NodeError(name, "constant", name, found.largest, found.ratio, found.largest, reason)

    def _forgive_order(self, owns: dict[str, tuple[Gap, Value | None]], values: Mapping[str, Value]) -> None:
        """Of a TopK that finds the same values, neither their order nor the choice within a tie is an error."""
        for node in self.level.graph.node:
            if node.op_type != "TopK" or not all(name in owns for name in node.output):
                continue
            got = owns[node.output[0]][1]
            if got is not None and _sorted_gap(values[node.output[0]], got, node).ratio <= 1:
                for name in node.output:
                    owns[name] = (NONE, owns[name][1])

    def described(self, error: NodeError) -> tuple[NodeError, Cut | None]:
        """The same error with how the node differs from the reference's, or the one in its body; cut out."""
        theirs = self.reference.level
        place = self.level.producer.get(error.value)
        if place is None:
            return error, None
        _, read = self.level.needed([error.value], set(self.names))
        known = self.reference.values([error.value, *(name for name in read if name in self.names)])
        cut = self.level.cut(error.value, {**self.inputs, **known})
        if theirs is None or error.value not in theirs.producer:
            return error, cut
        node = self.level.graph.node[place]
        model = theirs.graph.node[theirs.producer[error.value]]
        if bodies(node) and node.op_type == model.op_type:
            names = [name for name in dict.fromkeys([*reads(model), *reads(node)]) if name]
            values = {**self.inputs, **self.reference.values(names)}
            inner = inside(self.level, theirs, node, model, values)
            if inner is not None:
                return inner
        return replace(error, differs=differences(self.level, node, theirs, model)), cut


def _sorted_gap(reference: Value, got: Value, node: onnx.NodeProto) -> Gap:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
    return gap(np.sort(np.asarray(reference), axis), np.sort(np.asarray(got), axis))


def own_gaps(
    level: Level, names: Sequence[str], values: Mapping[str, Value], optimised: str
) -> dict[str, tuple[Gap, Value | None]]:
    """The own error of each value and what was computed; a session that fails is halved down to the nodes that fail."""
    if not names:
        return {}
    try:
        found = level.own(names, values, optimised)
    except Exception as error:
        if len(names) == 1:
            return {names[0]: (Gap(float("nan"), float("inf"), f"it fails: {one_line(error, 300)}"), None)}
        middle = len(names) // 2
        halves = (names[:middle], names[middle:])
        return {
            name: own for half in halves for name, own in own_gaps(level, half, values, optimised).items()
        }
    return {name: (gap(values[name], found[name]), found[name]) for name in names}


def inside(
    level: Level,
    theirs: Level,
    node: onnx.NodeProto,
    model: onnx.NodeProto,
    values: Mapping[str, Value],
    around: tuple[str, ...] = (),
) -> tuple[NodeError, Cut | None] | None:
    """The first faulty node in a body, and cut out; None if every node is right in every iteration that was run.

    Args:
        level: Where the node stands.
        theirs: Where its counterpart in the reference stands.
        node: The node whose body is looked at.
        model: Its counterpart.
        values: The reference's values around them.
        around: The nodes whose bodies these two stand in.
    """
    start = time.perf_counter()
    try:
        for count, iteration in enumerate(iterations(theirs, model, values)):
            if count >= _MAX_ITERATIONS or time.perf_counter() - start > _SECONDS:
                return None
            mine, other = level.body(iteration.attribute, node), theirs.body(iteration.attribute, model)
            known = {**values, **iteration.values, **dict(zip(mine.inputs, iteration.inputs, strict=True))}
            names = [name for name in mine.producer if name in other.producer]
            owns = own_gaps(mine, names, known, "none")
            errors = [
                make_error(mine.graph.node[mine.producer[name]], name, owns[name][0], float("nan"), ())
                for name in names
            ]
            found = _first(errors, exact=True)
            if found is None:
                continue
            number = "" if iteration.number is None else f", iteration {iteration.number}"
            path = (*around, f"the body of {node.op_type} {_name(node)}{number}")
            faulty = mine.graph.node[mine.producer[found.value]]
            counterpart = other.graph.node[other.producer[found.value]]
            if bodies(faulty) and faulty.op_type == counterpart.op_type:
                deeper = inside(mine, other, faulty, counterpart, known, path)
                if deeper is not None:
                    return deeper
            differs = differences(mine, faulty, other, counterpart)
            return replace(found, inside=path, differs=differs), mine.cut(found.value, known)
    except Exception:  # what cannot be stepped through is judged as a whole
        return None
    return None


def make_error(node: onnx.NodeProto, value: str, own: Gap, whole: float, also: Sequence[str]) -> NodeError:
    """The error of a value that a node computes, with where the node comes from."""
    facts = {entry.key: entry.value for entry in node.metadata_props}
    module, source = facts.get("module", ""), facts.get("source", "")
    return NodeError(
        _name(node),
        node.op_type,
        value,
        own.largest,
        own.ratio,
        whole,
        own.reason,
        module,
        source,
        tuple(also),
    )


def _name(node: onnx.NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)
