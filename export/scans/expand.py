"""`expand_loops`: the loop regions of a translated model become ONNX `Scan` nodes, in place.

    before   h = State(h0)   x = Element(xs)   …body…   last, ys = End(h, x, h', y)
    after    last, ys = Scan(h0, xs) { (h, x) => (h', y): …body… }

Whatever does not depend on a state or an element stays outside and is computed once; the body reads it, and the
weights, from the graph around it.

Source: https://onnx.ai/onnx/operators/onnx__Scan.html (since opset 16 without sequence lengths)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moe_export.errors import Code, NotExportableError, RefusedError
from moe_export.export.onnx.provenance import mark_block, source_location
from moe_export.export.scans.chunked import expand_chunked
from moe_export.export.scans.in_two import first_and_second, in_two
from moe_export.export.scans.inputs import move_inwards
from moe_export.export.scans.layout import widest_last
from moe_export.export.scans.linear_attention import DOMAIN as CONTRIB
from moe_export.export.scans.linear_attention import expand_linear_attention
from moe_export.export.scans.loop_region import LoopRegion, integer, read_region
from moe_export.export.scans.products import small_products_first
from moe_export.export.scans.results import results_inwards
from moe_export.export.scans.unrolled import several_steps
from moe_export.export.tracing.traced_loops import DOMAIN, END, STATE


@dataclass(frozen=True)
class Expansion:
    """How loops are written.

    Attributes:
        form: `scan`, step by step; `chunked`, as products over chunks, where that is exact; `auto`, chunked where
            it is exact and computes less, else `scan`; `contrib`, ONNX Runtime's own operator where it computes the
            same, else as `auto`.
        unroll: Steps that an iteration of a `Scan` takes. More than one was not faster (docs/recurrence.md).
        if_possible: Steps that it takes where `unroll` is 1 and the loop can take several.
        single_steps: The graph runs single steps, too: `auto` keeps a form in which one is quick.
    """

    form: str = "auto"
    unroll: int = 1
    if_possible: int = 1
    single_steps: bool = False


def expand_loops(model: ir.Model, lowering: Expansion | None = None) -> list[str]:
    """Replace every loop region, in graph order and in place.

    Returns:
        Notes for the report: which form, and why.

    Raises:
        NotExportableError: The form `chunked` or `contrib` was asked for, and no loop can take it; or a loop cannot
            take several steps per iteration.
    """
    lowering = lowering or Expansion()
    forms = _forms(lowering)
    notes, refused, taken = [], [], 0
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == END:
            mark_block(node, "recurrence")
            results_inwards(model.graph, node)
            move_inwards(model.graph, node)
            small_products_first(read_region(model.graph, node))
            for form, note, reasons in _expand(model.graph, node, forms, lowering):
                refused += [(source_location(node), reason) for reason in reasons[:1]]
                taken += form == 0
                if form is not None or lowering.form == "contrib":
                    why = _why(reasons[:1] if lowering.form == "contrib" else ())
                    notes.append(f"loop {integer(node, 'loop')}: {note}{why}")
    if lowering.form in ("chunked", "contrib") and refused and not taken:
        where, why = refused[0]
        raise NotExportableError(
            f"the loop has no {lowering.form} form: {why}",
            code=Code.LOOP_FORM,
            where=where,
            hint="use --recurrence auto, or scan",
        )
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    return notes


@dataclass(frozen=True)
class _Form:
    """A form that computes all steps at once: how it is written, and what the report calls it."""

    write: Callable[[LoopRegion], str | None]
    note: str


_CHUNKS = "products over chunks of {} steps"


def _forms(lowering: Expansion) -> tuple[_Form, ...]:
    """The forms to try before a `Scan`, in this order."""
    where_it_pays = _Form(
        partial(expand_chunked, only_if_it_pays=True, single_steps=lowering.single_steps),
        f"a decay for many entries of the state; {_CHUNKS}",
    )
    contrib = _Form(expand_linear_attention, f"{CONTRIB}.LinearAttention")
    forms: dict[str, tuple[_Form, ...]] = {
        "auto": (where_it_pays,),
        "chunked": (_Form(expand_chunked, _CHUNKS),),
        "contrib": (contrib, where_it_pays),
    }
    return forms.get(lowering.form, ())


_Written = tuple[int | None, str, list[str]]
"""Which form a loop was written in, None for a `Scan`; what the report calls it; why the forms before refuse it."""


def _expand(graph: ir.Graph, end: ir.Node, forms: Sequence[_Form], lowering: Expansion) -> list[_Written]:
    """Write a loop in the first of these forms that does not refuse it, or its last states in one, or as a `Scan`."""
    form, note, reasons = _at_once(graph, end, forms)
    ahead: list[_Written] = []
    if form is None and forms and (parts := _second_at_once(graph, end, forms)) is not None:
        first, (form, note, more) = parts
        if form is not None:
            note, ahead = f"{note}, with what its first states give", _expand(graph, first, forms, lowering)
        else:
            reasons = [f"{why}; its other states: {late}" for why, late in zip(reasons, more, strict=True)]
    if form is None:
        loop = _laid_out(graph, read_region(graph, end))
        _write(graph, _with_iterations(graph, loop, lowering))
    return [(form, note, reasons), *(one for one in ahead if one[0] is not None)]


def _second_at_once(graph: ir.Graph, end: ir.Node, forms: Sequence[_Form]) -> tuple[ir.Node, _Written] | None:
    """Write a loop as two, the second one in the first of these forms that does not refuse it.

    Returns:
        The end of the first one, and how the second one is written; the loop stays as it is where no form takes that.
        None if it cannot be two.
    """
    loop, before = read_region(graph, end), set(graph)
    if (parts := in_two(graph, loop)) is None:
        return None
    first, second = parts
    outputs = first_and_second(loop, first, second)
    for old, new in zip(end.outputs, outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    written = _at_once(graph, second, forms)
    if written[0] is None:
        for old, new in zip(end.outputs, outputs, strict=True):
            new.replace_all_uses_with(old, replace_graph_outputs=True)
        graph.remove([node for node in graph if node not in before], safe=True)
    return first, written


def _at_once(graph: ir.Graph, end: ir.Node, forms: Sequence[_Form]) -> _Written:
    """Write a loop in the first of these forms that does not refuse it."""
    reasons: list[str] = []
    for place, form in enumerate(forms):
        try:
            steps = form.write(read_region(graph, end))
        except RefusedError as reason:
            reasons.append(str(reason))
        else:
            return place, form.note.format(steps), reasons
    return None, "a Scan", reasons


def _why(reasons: Sequence[str]) -> str:
    return f" (not {CONTRIB}.LinearAttention: {reasons[0]})" if reasons else ""


def _laid_out(graph: ir.Graph, loop: LoopRegion) -> LoopRegion:
    """The loop with the longest axis of its states last; unchanged where that is not possible."""
    try:
        return read_region(graph, widest_last(loop))
    except RefusedError:
        return loop


def _with_iterations(graph: ir.Graph, loop: LoopRegion, lowering: Expansion) -> LoopRegion:
    """The loop with as many steps per iteration as were asked for.

    Raises:
        NotExportableError: An operator of the step cannot be computed for several steps at once.
    """
    steps = lowering.if_possible if lowering.unroll == 1 else lowering.unroll
    if steps == 1:
        return loop
    try:
        return read_region(graph, several_steps(loop, steps))
    except RefusedError as reason:
        if lowering.unroll == 1:
            return loop
        raise NotExportableError(
            f"the loop cannot take {lowering.unroll} steps per iteration: {reason}",
            code=Code.LOOP_FORM,
            where=source_location(loop.end),
            hint="leave out --unroll",
        ) from reason


def _write(graph: ir.Graph, loop: LoopRegion) -> None:
    end, boundaries = loop.end, (*loop.states, *loop.elements)
    inputs = [_body_input(boundary, place) for place, boundary in enumerate(boundaries)]
    for boundary, value in zip(boundaries, inputs, strict=True):
        boundary.outputs[0].replace_all_uses_with(value)
    nodes = list(loop.body)
    graph.remove(nodes)
    outputs = _body_outputs(end.inputs[len(boundaries) :], nodes)
    body = ir.Graph(inputs, outputs, nodes=nodes, name=f"loop_{loop.number}")
    scan = _scan(end, boundaries, len(loop.states), body)
    graph.insert_before(end, scan)
    for old, new in zip(end.outputs, scan.outputs, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([end, *boundaries], safe=False)


def _body_input(boundary: ir.Node, place: int) -> ir.Value:
    old = boundary.outputs[0]
    kind = "state" if boundary.op_type == STATE else "element"
    return ir.Value(name=f"{kind}_{integer(boundary, 'loop')}_{place}", shape=old.shape, type=old.type)


def _body_outputs(results: Sequence[ir.Value | None], nodes: list[ir.Node]) -> list[ir.Value]:
    """A value of its own for every output: inputs, outer values and values returned twice are copied."""
    made = {value for node in nodes for value in node.outputs}
    outputs: list[ir.Value] = []
    for result in results:
        assert result is not None
        value = result
        if value not in made or value in outputs:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            nodes.append(copy)
            value = copy.outputs[0]
        outputs.append(value)
    return outputs


def _scan(end: ir.Node, boundaries: Sequence[ir.Node], states: int, body: ir.Graph) -> ir.Node:
    elements = boundaries[states:]
    collected = len(end.outputs) - states
    axes = list(end.attributes["axes"].as_ints())[:collected]
    backwards = list(end.attributes["backwards"].as_ints())[:collected]
    attributes: dict[str, Any] = {
        "body": body,
        "num_scan_inputs": len(elements),
        "scan_input_axes": [integer(boundary, "axis") for boundary in elements],
        "scan_input_directions": [integer(boundary, "backwards") for boundary in elements],
    }
    if collected:
        attributes |= {"scan_output_axes": axes, "scan_output_directions": backwards}
    scan = ir.node(
        "Scan",
        [boundary.inputs[0] for boundary in boundaries],
        attributes={key: value for key, value in attributes.items() if not _is_default(key, value)},
        num_outputs=len(end.outputs),
    )
    for old, new in zip(end.outputs, scan.outputs, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
    scan.metadata_props.update(end.metadata_props)
    return scan


def _is_default(key: str, value: object) -> bool:
    """Whether an attribute is what `Scan` assumes without it: axes and directions that are all 0."""
    return key.startswith("scan_") and isinstance(value, list) and not any(value)
