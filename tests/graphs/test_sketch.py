"""What a picture shows: modules as boxes, no circle among them, weights as words, sizes left out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moe_export.errors import UsageError
from moe_export.export.onnx.functions import as_functions, without_functions
from moe_export.pictures.groups import groups_of, path_of, reads, sizes_of
from moe_export.pictures.sketch import MOST, Sketch, count_of, sketch_of


def parsed(text: str, modules: dict[str, str] | None = None) -> ir.Model:
    """A graph in ONNX's text form; `modules` by the name of a node's first output."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    onnx.checker.check_model(proto, full_check=True)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        if modules and node.outputs[0].name in modules:
            node.metadata_props["module"] = modules[node.outputs[0].name]
    return model


def titles(sketch: Sketch) -> list[str]:
    return [part.title for part in sketch.parts]


def leads_forward(sketch: Sketch) -> bool:
    place = {part.key: number for number, part in enumerate(sketch.parts)}
    return all(place[link.source] < place[link.target] for link in sketch.links)


def test_hybrid_is_its_blocks(hybrid):
    sketch = sketch_of(hybrid, "hybrid.onnx")
    assert sketch.level == "blocks"
    kinds = {part.title: part.kind for part in sketch.parts}
    assert kinds["input_ids"] == "input"
    assert kinds["logits"] == "output"
    assert kinds["moe.experts"] == "experts"
    assert kinds["mamba"] == "recurrence"
    assert kinds["attention"] == kinds["moe.gate"] == "module"
    mamba = next(part for part in sketch.parts if part.title == "mamba")
    count, operators = mamba.lines[0].split(" nodes: ")
    assert int(count) == sum(count for _, count in mamba.operators)
    assert operators == "Scan, 5 MatMul, Conv, …"
    assert mamba.lines[1] == "8,384 parameters"
    assert "mamba.py:" in mamba.about
    assert leads_forward(sketch)
    assert "batch × sequence × 32" in {link.label for link in sketch.links}


def test_what_computes_sizes_is_no_block(hybrid):
    sizes = sizes_of(hybrid.graph)
    assert {node.op_type for node in sizes} == {"Shape", "Size", "Concat"}
    groups = groups_of(hybrid.graph)
    drawn = [node for group in groups for node in group.nodes]
    assert {group.path for group in groups if group.sizes} == {"mamba", "attention", "moe.experts"}
    assert set(drawn) == set(hybrid.graph) - sizes
    assert len(drawn) == len(set(drawn))


def test_a_graph_of_functions_is_drawn_written_out(hybrid):
    expected = titles(sketch_of(hybrid, "g"))
    copy = ir.from_proto(ir.to_proto(hybrid))
    as_functions(copy)
    assert titles(sketch_of(without_functions(copy), "g")) == expected


def test_every_node_of_a_small_graph_is_drawn_with_its_weights():
    numbers = ", ".join(["1"] * 32)
    model = parsed(
        f"g (float[n, 8] x) => (float[n, 4] y) <float[8, 4] w = {{{numbers}}}> {{ a = MatMul(x, w) y = Relu(a) }}"
    )
    sketch = sketch_of(model, "small")
    assert titles(sketch) == ["x", "MatMul", "Relu", "y"]
    assert sketch.parts[1].lines == ("a", "w 8 × 4")
    assert [link.label for link in sketch.links] == ["n × 8", "n × 4", "n × 4"]
    assert sketch.subtitle == "2 nodes · 32 parameters · opset 17"


CROSSED = """g (float[4] x) => (float[4] y) {
    a = Relu(x)
    b = Exp(a)
    c = Neg(b)
    y = Abs(c)
}"""


def test_blocks_never_feed_each_other_in_a_circle():
    model = parsed(CROSSED, {"a": "inner", "b": "other", "c": "inner", "y": "other"})
    groups = groups_of(model.graph)
    assert [group.path for group in groups] == ["inner", "other", "inner", "other"]
    assert leads_forward(sketch_of(model, "g", "blocks"))


def test_nodes_of_a_module_that_no_other_parts_are_one_block():
    model = parsed(CROSSED, {"a": "inner", "b": "inner.one", "c": "inner.two", "y": "inner"})
    assert [(group.path, len(group.nodes)) for group in groups_of(model.graph)] == [("inner", 4)]


def test_a_node_that_tells_nothing_is_where_its_neighbours_are():
    model = parsed(CROSSED, {"a": "inner", "c": "inner", "y": ""})
    assert [(group.path, len(group.nodes)) for group in groups_of(model.graph)] == [("inner", 3), ("", 1)]


@pytest.mark.parametrize(
    ("facts", "name", "path"),
    [
        ({"module": "layers.0.moe"}, "n", ("layers", "0", "moe")),
        ({"module": "model"}, "n", ()),
        ({"module": "moe.gate", "block": "experts:moe"}, "n", ("moe", "experts")),
        ({"pkg.torch.onnx.name_scopes": "['', 'moe', 'moe.gate', 'linear']"}, "n", ("moe", "gate")),
        ({"pkg.torch.onnx.name_scopes": "['', 'add']"}, "n", ()),
        ({}, "/layers.0/moe/gate/MatMul", ("layers", "0", "moe", "gate")),
        ({}, "MatMul_7", None),
    ],
)
def test_modules_are_read_off_what_exporters_write(facts, name, path):
    node = ir.node("MatMul", [], name=name)
    node.metadata_props.update(facts)
    assert path_of(node) == path


def test_what_a_body_reads_from_outside_is_a_link():
    model = parsed("""g (bool c, float[4] x) => (float[4] y) {
        a = Relu(x)
        b = Exp(x)
        y = If (c) <
            then_branch = t () => (float[4] p) { p = Neg(a) },
            else_branch = e () => (float[4] q) { q = Identity(b) }
        >
    }""")
    choice = model.graph[-1]
    assert {str(value.name) for value in reads(choice)} == {"c", "a", "b"}
    sketch = sketch_of(model, "g")
    assert {link.source for link in sketch.links if link.target == "part 2"} == {"in c", "part 0", "part 1"}
    assert dict(sketch.parts[4].operators) == {"If": 1, "Neg": 1, "Identity": 1}


def test_one_value_is_labelled_once():
    model = parsed("g (float[4] x) => (float[4] y) { a = Relu(x) b = Exp(a) c = Neg(a) y = Add(b, c) }")
    labels = [link.label for link in sketch_of(model, "g").links if link.source == "part 0"]
    assert labels == ["4", ""]


def test_a_large_graph_without_modules_is_refused_with_a_reason():
    body = " ".join(f"v{n} = Relu(v{n - 1})" for n in range(1, MOST + 1))
    model = parsed(f"g (float[4] v0) => (float[4] y) {{ {body} y = Neg(v{MOST}) }}")
    with pytest.raises(UsageError, match=f"{MOST + 1} nodes are too many") as told:
        sketch_of(model, "large.onnx")
    assert "no modules" in str(told.value)


def experts(chained: bool) -> ir.Model:
    """Four numbered modules, whose results are added up one by one; each reads the input, or the one before it."""
    lines, total = [], "x"
    for place in range(4):
        source = f"b{place - 1}" if chained and place else "x"
        lines += [f"a{place} = Exp({source})", f"b{place} = Neg(a{place})"]
        lines += [f"c{place} = Add({total}, b{place})"]
        total = f"c{place}"
    text = f"g (float[4] x) => (float[4] y) {{ {' '.join(lines)} y = Relu(c3) }}"
    own = {f"{letter}{place}": f"moe.experts.{place}" for letter in "ab" for place in range(4)}
    return parsed(text, own | {f"c{place}": "moe" for place in range(4)} | {"y": "moe.last"})


def test_boxes_that_repeat_each_other_are_one():
    opened = {(), ("moe",), ("moe", "experts")}
    sketch = sketch_of(experts(chained=False), "g", "blocks", opened)
    assert titles(sketch) == ["x", "4 × moe.experts.…", "Add", "moe.last", "y"]
    assert dict(sketch.parts[1].operators) == {"Exp": 4, "Neg": 4}
    assert leads_forward(sketch)


def test_layers_stay_apart():
    opened = {(), ("moe",), ("moe", "experts")}
    sketch = sketch_of(experts(chained=True), "g", "blocks", opened)
    assert [title for title in titles(sketch) if "experts" in title] == [f"moe.experts.{n}" for n in range(4)]
    assert leads_forward(sketch)


@pytest.mark.parametrize(
    ("name", "array", "counts"),
    [
        ("layer.weight", np.ones((2, 3), np.float32), True),
        ("layer.bias", np.zeros(3, np.float32), True),
        ("val_6", np.arange(6, dtype=np.float32).reshape(2, 3), True),
        ("packed", np.arange(6, dtype=np.int8).reshape(2, 3), True),
        ("val_159", np.zeros((2, 3), np.float32), False),
        ("constant.2x3", np.arange(6, dtype=np.float32).reshape(2, 3), False),
        ("loop_0.constant_2x3", np.arange(6, dtype=np.float32).reshape(2, 3), False),
        ("mask", np.tri(3) > 0, False),
        ("axes", np.arange(3), False),
        ("scale", np.float32(2), False),
    ],
)
def test_what_counts_as_a_parameter(name, array, counts):
    value = ir.Value(name=name, const_value=ir.tensor(array))
    assert count_of([value]) == (array.size if counts else 0)
