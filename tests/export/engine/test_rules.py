"""The rules and TensorRT-RTX say the same of the same graphs: of made ones, and of its whole list of operators."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from moe_export.errors import NotExportableError
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.module import load_module
from moe_export.export.engines.rules import MOST_K, UNKNOWN, find_refusals

LOOP = """g (float[n, 5] x) => (float[m, 5] y) {{
    trips = Constant<value = int64 {{3}}>()
    go = Constant<value = bool {{1}}>()
    y = Loop(trips, go, x) <body = turn (int64 i, bool c, float[k, 5] a) => (bool d, float[l, 5] b) {{
        d = Identity(c)
        {body}
    }}>
}}"""
SCATTER = "g (float[n, 8] x, int64[n, {w}] i, float[n, 8] u) => (float[n, 8] y) {{ y = {op}(x, i, u) }}"
TOPK = """g (float[n, 9000] x) => (float[n, k] v, int64[n, k] y) {{
    k = Constant<value = int64[1] {{{k}}}>()
    v, y = TopK(x, k)
}}"""

# What is refused: the graph, the operator that is to blame, and what the rule says.
REFUSED = {
    "NonZero": ("g (float[n] x) => (int64[1, m] y) { y = NonZero(x) }", "NonZero", "TensorRT-RTX has no NonZero"),
    "Compress": (
        "g (float[n] x, bool[n] m) => (float[k] y) { y = Compress<axis = 0>(x, m) }", "Compress", "has no Compress",
    ),
    "Unique": ("g (float[n] x) => (float[k] y) { y = Unique(x) }", "Unique", "has no Unique"),
    "ScatterElements": (
        SCATTER.format(op='ScatterElements<axis = 0, reduction = "add">', w=8),
        "ScatterElements", "without a reduction only, this is reduction='add'",
    ),
    "ScatterND": (
        SCATTER.format(op='ScatterND<reduction = "mul">', w=1), "ScatterND",
        "without a reduction only, this is reduction='mul'",
    ),
    "TopK": (TOPK.format(k=MOST_K + 1), "TopK", "TopK takes K up to 3840, this is K=3841"),
    "Einsum": (
        'g (int64[n, 9] x, int64[9, 4] w) => (int64[n, 4] y) { y = Einsum<equation = "ab,bc->ac">(x, w) }',
        "Einsum", "Einsum takes floats, this is int64",
    ),
    "MatMul": ("g (int32[n, 9] x, int32[9, 4] w) => (int32[n, 4] y) { y = MatMul(x, w) }", "MatMul", "this is int32"),
    "Gemm": ("g (int32[n, 9] x, int32[9, 4] w) => (int32[n, 4] y) { y = Gemm(x, w) }", "Gemm", "this is int32"),
    "MoE": ("g (float[n, 5] x) => (float[n, 5] y) { y = com.microsoft.MoE(x) }", "com.microsoft.MoE", "no operator"),
    "own domain": ("g (float[n, 5] x) => (float[n, 5] y) { y = my.ops.Thing(x) }", "my.ops.Thing", "no operator"),
    "sequence": (
        "g (float[n, 4] x) => (float[m, 4] y) { s = SequenceEmpty() t = SequenceInsert(s, x) "
        "y = ConcatFromSequence<axis = 0>(t) }",
        "SequenceEmpty", "has no SequenceEmpty",
    ),
    "Loop": (
        LOOP.format(body="b = Concat<axis = 0>(a, a)"), "Loop",
        "loops carry tensors of one shape, 'a' goes from (7, 5) to (14, 5)",
    ),
    "in a Loop": (LOOP.format(body="z = NonZero(a) b = Add(a, a)"), "NonZero", "TensorRT-RTX has no NonZero"),
    "int16": ("g (float[n] x) => (float[n] y) { a = Cast<to = 5>(x) y = Cast<to = 1>(a) }", "Cast", "no int16 tensors"),
    "uint8": ("g (float[n] x) => (float[n] y) { a = Cast<to = 2>(x) y = Cast<to = 1>(a) }", "Cast", "no uint8 tensors"),
    "DFT": ("g (float[n, 8, 1] x) => (float[n, 8, 2] y) { y = DFT(x) }", "DFT", "TensorRT has no DFT"),
    "float8": (
        "g (float8e5m2[n] x) => (float[n] y) { y = Cast<to = 1>(x) }", "input x", "TensorRT has no float8e5m2 tensors",
    ),
    "input": ("g (uint32[n] x) => (float[n] y) { y = Cast<to = 1>(x) }", "input x", "no uint32 tensors"),
    "weight": (
        "g (float[n] x) => (float[n] y) <int16[1] w = {3}> { a = Cast<to = 1>(w) y = Add(a, x) }",
        "weight w", "no int16 tensors",
    ),
    "axes": (
        "g (float[n, 1, 1, 1, 1, 1, 1, 1, 1] x) => (float[n, 1, 1, 1, 1, 1, 1, 1, 1] y) { y = Exp(x) }",
        "input x", "up to 8 axes, this has 9",
    ),
    "NonMaxSuppression": (
        "g (float[1, n, 4] x, float[1, 1, n] s) => (int64[k, 3] y) { y = NonMaxSuppression(x, s) }",
        "NonMaxSuppression", "TensorRT-RTX has no NonMaxSuppression",
    ),
}  # fmt: skip

BUILT = {
    "ScatterElements": SCATTER.format(op="ScatterElements<axis = 0>", w=8),
    "ScatterND": SCATTER.format(op='ScatterND<reduction = "none">', w=1),
    "TopK": TOPK.format(k=MOST_K),
    "unsorted TopK": "g (float[n, 9] x) => (float[n, 2] v, int64[n, 2] y) "
    "{ k = Constant<value = int64[1] {2}>() v, y = TopK<sorted = 0>(x, k) }",
    "Einsum": 'g (float[n, 9] x, float[9, 4] w) => (float[n, 4] y) { y = Einsum<equation = "ab,bc->ac">(x, w) }',
    "CumSum": "g (int64[n, 9] x) => (int64[n, 9] y) { a = Constant<value = int64 {1}>() y = CumSum(x, a) }",
    "OneHot": "g (int64[n] x) => (float[n, 8] y) { d = Constant<value = int64 {8}>() "
    "v = Constant<value = float[2] {0, 1}>() y = OneHot(x, d, v) }",
    "GatherND": "g (float[n, 4, 5] x, int64[n, 3, 1] i) => (float[n, 3, 5] y) { y = GatherND<batch_dims = 1>(x, i) }",
    "Loop": LOOP.format(body="b = Add(a, a)"),
    "Scan": "g (float[n, 5] x, float[5] h) => (float[5] y, float[n, 5] z) { y, z = Scan<num_scan_inputs = 1, "
    "body = turn (float[5] a, float[5] v) => (float[5] o, float[5] q) { o = Add(a, v) q = Identity(o) }>(h, x) }",
    "uint8 at the ends": "g (uint8[n] x) => (uint8[n] y) { a = Cast<to = 1>(x) b = Abs(a) y = Cast<to = 2>(b) }",
    "weights of uint8": "g (float[n] x) => (float[n] y) <uint8[1] w = {3}> { a = Cast<to = 1>(w) y = Add(a, x) }",
    "If": "g (float[n, 5] x, bool t) => (float[n, 5] y) { y = If(t) <then_branch = a () => (float[n, 5] o) "
    "{ o = Add(x, x) }, else_branch = b () => (float[n, 5] p) { p = Mul(x, x) }> }",
}
PLACE = {"source": "model.py:12", "module": "experts.3"}


@pytest.fixture
def made(onnx_graph):
    """A graph whose nodes all come from line 12 of a model."""

    def made(text):
        model = onnx_graph(text)
        for domain in ("com.microsoft", "my.ops"):
            if domain in text:
                model.opset_import.add(domain=domain, version=1)
        graphs = [model.graph]
        while graphs:
            for number, node in enumerate(graphs.pop().node):
                node.name = node.name or f"node_{number}_{node.op_type}"
                del node.metadata_props[:]
                for key, value in PLACE.items():
                    node.metadata_props.add(key=key, value=value)
                graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        return model

    return made


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_rule_refuses_tensorrt_refuses_with_node_and_line(made, name):
    text, operator, rule = REFUSED[name]
    model = made(text)
    refused = find_refusals(ir.from_proto(model)).refused
    found = next(refusal for refusal in refused if refusal.node.startswith(operator))
    assert rule in found.rule
    if not operator.startswith(("input", "weight")):
        assert (found.source, found.module) == ("model.py:12", "experts.3")
    with pytest.raises(NotExportableError) as error:
        build_engines(model, ["sm89"])
    assert found.node in error.value.where
    assert rule in error.value.where
    assert found.hint in str(error.value)


@pytest.mark.parametrize("name", BUILT)
def test_what_no_rule_refuses_is_built(made, name):
    model = made(BUILT[name])
    assert find_refusals(ir.from_proto(model)).refused == ()
    assert build_engines(model, ["sm89"])[0].size > 1000


@pytest.mark.parametrize(
    ("name", "builder", "before"),
    [
        ("NonZero", "tensorrt-rtx", ()),
        ("NonMaxSuppression", "tensorrt-rtx", ()),
        ("ScatterElements", "tensorrt-rtx", ()),
        ("DFT", "tensorrt-rtx, and tensorrt before 11.2", ("10.15.1.29", "11.1.0.106")),
        ("ScatterND", "", ("10.15.1.29", "11.4.0.106", "")),
        ("TopK", "", ("10.15.1.29", "11.4.0.106", "")),
        ("Compress", "", ("10.15.1.29", "11.4.0.106", "")),
    ],
)
def test_a_rule_holds_for_the_tensorrt_that_it_was_seen_in(made, name, builder, before):
    """Full TensorRT as its manual has it, by version; where that is not known, what some refuse is a doubt."""
    model = ir.from_proto(made(REFUSED[name][0]))
    (either,) = find_refusals(model).refused
    assert either.builder == builder
    assert find_refusals(model, "tensorrt-rtx", "1.7.1.116").refused == (either,)
    for version in ("10.15.1.29", "11.1.0.106", "11.2.0.106", "11.4.0.106", ""):
        found = find_refusals(model, "tensorrt", version)
        refused = version in before or (not builder)
        assert found.refused == ((either,) if refused else ())
        assert (either in found.doubts) == (version == "" and "before" in builder)


def test_the_list_of_unknown_operators_is_the_parsers_own():
    module = load_module()
    if not module.version.startswith("1.7."):
        pytest.skip(f"the list is of TensorRT-RTX 1.7, this is {module.version}")
    log = module.log()
    builder = module.trt.Builder(log)
    parser = module.trt.OnnxParser(builder.create_network(0), log)
    operators = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain in {"", "ai.onnx"}}
    assert {name for name in operators if not parser.supports_operator(name)} == UNKNOWN


def test_every_option_that_is_named_exists():
    from moe_export.cli import cli

    names = {option for command in cli.commands.values() for param in command.params for option in param.opts}
    for text, _, _ in REFUSED.values():
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "my.ops": 1]> {text}'
        )
        for refusal in find_refusals(ir.from_proto(model)).refused:
            assert {word.rstrip(",") for word in refusal.hint.split() if word.startswith("--")} <= names


def test_doubts_are_no_refusals(made):
    contrib = made("g (float[n, 5] x) => (float[n, 5] y) { y = com.microsoft.Gelu(x) }")
    computed = made(
        "g (float[n] x) => (float[k] v, int64[k] y) { s = Shape<start = 0, end = 1>(x) v, y = TopK(x, s) }"
    )
    double = made("g (double[n] x) => (double[n] y) { y = Exp(x) }")
    for model, said in (
        (contrib, "reads com.microsoft.Gelu as its own Gelu"),
        (computed, "K is computed"),
        (double, "computes float64 as float32"),
    ):
        findings = find_refusals(ir.from_proto(model))
        assert findings.refused == ()
        assert said in findings.doubts[0].rule
        assert build_engines(model, ["sm89"])[0].size > 1000


def test_sizes_at_which_the_graph_cannot_run_are_refused(made):
    """The builder only warns of them, and the engine fails when it runs."""
    model = made(
        "g (float[n] x) => (float[k] v, int64[k] y) { s = Shape<start = 0, end = 1>(x) v, y = TopK(x, s) }"
    )
    with pytest.raises(NotExportableError, match="cannot run at all sizes") as error:
        build_engines(model, ["sm89"], {"n": (1, 8, 9000)})
    assert "at the greatest sizes of the profile: " in error.value.where
    assert "K exceeds the maximum value" in error.value.where
    assert "TopK node_1_TopK, model.py:12" in error.value.where


def test_bfloat16_is_refused_for_gpus_without_it(made):
    model = made("g (bfloat16[n, 5] x) => (bfloat16[n, 5] y) { y = Add(x, x) }")
    with pytest.raises(NotExportableError) as error:
        build_engines(model, ["sm75"])
    assert "these GPUs have no bfloat16 [sm75]" in error.value.where
    assert "--dtype float16" in error.value.hint
    assert build_engines(model, ["sm80"])[0].size > 1000


def test_a_state_whose_shape_stays_is_no_reason(made):
    body = "s = Shape(a) e = ConstantOfShape(s) b = Where(t, a, e)"
    text = LOOP.format(body=body).replace("(float[n, 5] x)", "(float[n, 5] x, bool[n, 5] t)")
    assert find_refusals(ir.from_proto(made(text))).refused == ()
