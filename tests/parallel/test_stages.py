"""A graph is cut where ranks exchange; what lives across a cut is handed on; nothing is computed twice."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from moe_export.errors import NotExportableError
from moe_export.export.parallel.stages import cut

HEAD = '<ir_version: 9, opset_import: ["" : 17, "moe_export" : 1]>\n'


def model(text: str) -> ir.Model:
    found = ir.from_proto(onnx.parser.parse_model(HEAD + text))
    for node in found.graph:
        for value in node.outputs:
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 4])
    return found


def names(values) -> list[str]:
    return [value.name for value in values]


def run(staged, **inputs):
    """Each exchange gives twice what it takes: two ranks that are the same."""
    values = dict(inputs)
    for number, stage in enumerate(staged.stages):
        onnx.checker.check_model(ir.to_proto(stage), full_check=True)
        feeds = {name: values[name] for name in names(stage.graph.inputs)}
        outputs = ReferenceEvaluator(ir.to_proto(stage)).run(None, feeds)
        values.update(zip(names(stage.graph.outputs), outputs, strict=True))
        for exchange in staged.exchanges:
            if exchange.after == number:
                (sent,), (given,) = exchange.sends, exchange.gives
                values[given] = 2 * values[sent]
    return values


CHAIN = """g (float[n, 4] x) => (float[n, 4] y) <float w = {2.0}> {
    kept = Neg(x)
    a = Mul(x, w)
    s = moe_export.AllReduce<layer = 0>(a)
    b = Add(s, kept)
    t = moe_export.AllReduce<layer = 1>(b)
    y = Mul(t, w)
}"""


def test_a_chain_of_exchanges():
    staged = cut(model(CHAIN))
    assert [names(stage.graph.inputs) for stage in staged.stages] == [["x"], ["kept", "s"], ["t"]] or [
        sorted(names(stage.graph.inputs)) for stage in staged.stages
    ] == [["x"], ["kept", "s"], ["t"]]
    assert [(one.layer, one.after, one.sends, one.gives) for one in staged.exchanges] == [
        (0, 0, ("a",), ("s",)),
        (1, 1, ("b",), ("t",)),
    ]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(run(staged, x=x)["y"], 2 * (2 * (2 * x) - x) * 2)


def test_a_weight_stands_in_every_stage_that_reads_it_and_in_no_other():
    staged = cut(model(CHAIN))
    assert [list(stage.graph.initializers) for stage in staged.stages] == [["w"], [], ["w"]]


def test_exchanges_that_do_not_wait_for_one_another_happen_together():
    staged = cut(
        model("""g (float[n, 4] x) => (float[n, 4] y) {
            a = Neg(x)
            s = moe_export.AllReduce<layer = 0>(a)
            b = Abs(x)
            t = moe_export.AllReduce<layer = 1>(b)
            y = Add(s, t)
        }""")
    )
    assert [one.after for one in staged.exchanges] == [0, 0]
    assert len(staged.stages) == 2


def test_an_output_that_is_a_sum_keeps_its_name():
    staged = cut(
        model("g (float[n, 4] x) => (float[n, 4] y) { a = Neg(x) y = moe_export.AllReduce<layer = 0>(a) }")
    )
    assert names(staged.stages[1].graph.outputs) == ["y"]
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run(staged, x=x)["y"], -2 * x)


def test_an_output_may_be_made_before_the_last_stage():
    staged = cut(
        model("""g (float[n, 4] x) => (float[n, 4] early, float[n, 4] y) {
            early = Neg(x)
            s = moe_export.AllReduce<layer = 0>(early)
            y = Add(s, x)
        }""")
    )
    assert "early" in names(staged.stages[0].graph.outputs)
    found = run(staged, x=np.ones((1, 4), np.float32))
    assert (found["early"][0, 0], found["y"][0, 0]) == (-1, -1)


def test_what_is_computed_from_weights_alone_goes_to_the_stage_that_reads_it():
    staged = cut(
        model("""g (float[n, 4] x) => (float[n, 4] y) <float w = {2.0}> {
            double = Mul(w, w)
            a = Neg(x)
            s = moe_export.AllReduce<layer = 0>(a)
            y = Mul(s, double)
        }""")
    )
    assert [node.op_type for node in staged.stages[1].graph] == ["Mul", "Mul"]
    assert names(staged.stages[1].graph.inputs) == ["s"]


def test_a_body_reads_across_a_cut():
    staged = cut(
        model("""g (float[n, 4] x, bool c) => (float[n, 4] y) {
            a = Neg(x)
            s = moe_export.AllReduce<layer = 0>(a)
            y = If(c) <
                then_branch = yes () => (float[n, 4] p) { p = Add(s, a) },
                else_branch = no () => (float[n, 4] q) { q = Identity(s) }
            >
        }""")
    )
    assert set(names(staged.stages[1].graph.inputs)) == {"c", "s", "a"}
    found = run(staged, x=np.ones((1, 4), np.float32), c=np.array(True))
    assert found["y"][0, 0] == -3


def test_an_exchange_in_a_body_is_refused_with_its_line():
    found = model("""g (float[n, 4] x, bool c) => (float[n, 4] y) {
        y = If(c) <
            then_branch = yes () => (float[n, 4] p) { p = moe_export.AllReduce<layer = 0>(x) },
            else_branch = no () => (float[n, 4] q) { q = Identity(x) }
        >
    }""")
    for node in found.graph.all_nodes():
        node.metadata_props["source"] = "net.py:7"
    with pytest.raises(NotExportableError) as error:
        cut(found)
    assert "inside the body of a loop" in str(error.value)
    assert "net.py:7" in str(error.value)
