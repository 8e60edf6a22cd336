"""Einsum nodes wherever they stand in a file, and what is kept of the file."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from onnx_models import compute, integers, model_of, problem

from moe_export.einsum_rewrite import proof
from moe_export.einsum_rewrite.onnx_model import STACK_TRACE, Options, Rewriting, rewrite_onnx
from moe_export.einsum_rewrite.proof import ProofError
from moe_export.errors import EquationError, NotExportableError


def _parse(body: str, opset: int = 17) -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "mine" : 1]> {body}')


def _ops(graph: onnx.GraphProto) -> list[str]:
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _ops(attribute.g)
    return found


def _same(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    onnx.checker.check_model(after, full_check=True)
    for want, got in zip(
        ReferenceEvaluator(before).run(None, feeds), ReferenceEvaluator(after).run(None, feeds), strict=True
    ):
        np.testing.assert_array_equal(got, want)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_the_branches_of_an_if() -> None:
    model = _parse("""g (float[M,K] x, bool c) => (float[K,K] y) {
        y = If(c) <
            then_branch = a () => (float[K,K] t) { t = Einsum<equation="mk,mj->kj">(x, x) },
            else_branch = b () => (float[K,K] e) { u = Neg(x)  e = Einsum<equation="mj,mk->jk">(u, x) }
        >
    }""")
    after = rewrite_onnx(model)
    assert "Einsum" not in _ops(after.graph)
    for condition in (True, False):
        _same(model, after, {"x": X, "c": np.array(condition)})


def test_the_body_of_a_scan() -> None:
    model = _parse("""g (float[L,D] x, float[D] h) => (float[D] last, float[L,D] y) {
        last, y = Scan<num_scan_inputs = 1, body = b (float[D] s, float[D] t) => (float[D] n, float[D] o) {
            n = Einsum<equation="d,d->d">(s, t)
            o = Einsum<equation="d,e->e">(n, t)
        }>(h, x)
    }""")
    after = rewrite_onnx(model)
    assert "Einsum" not in _ops(after.graph)
    _same(model, after, {"x": X, "h": np.ones(3, np.float32)})


def test_the_body_of_a_loop_in_a_branch() -> None:
    model = _parse("""g (float[M,M] x, bool c, int64 n) => (float[M,M] y) {
        y = If(c) <
            then_branch = a () => (float[M,M] t) {
                go = Constant<value = bool {1}>()
                t = Loop(n, go, x) <body = b (int64 i, bool k, float[M,M] v) => (bool k2, float[M,M] w) {
                    k2 = Identity(k)
                    w = Einsum<equation="ij,jk->ki">(v, x)
                }>
            },
            else_branch = e () => (float[M,M] f) { f = Identity(x) }
        >
    }""")
    after = rewrite_onnx(model)
    assert "Einsum" not in _ops(after.graph)
    feeds = {"x": X[:, :2].copy(), "c": np.array(True), "n": np.array(3)}
    _same(model, after, feeds)


FUNCTION = """g (float[B,L,D] x, float[D,N] w) => (float[B,N,L] y) { y = mine.project(x, w) }
    <domain: "mine", opset_import: ["" : 17]> project (x, w) => (y) {
        y = Einsum<equation="bld,dn->bnl">(x, w)
    }"""


def test_functions_have_no_initializers_so_constants_are_nodes() -> None:
    feeds = {"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "w": np.ones((4, 5), np.float32)}
    model = _parse(FUNCTION)
    after = rewrite_onnx(model)
    assert [node.op_type for node in after.functions[0].node] == ["MatMul", "Transpose"]
    _same(model, after, feeds)
    product = _parse(FUNCTION.replace("bld,dn->bnl", "bld,dn->bdln").replace("[B,N,L] y", "[B,D,L,N] y"))
    after = rewrite_onnx(product)
    assert "Constant" in {node.op_type for node in after.functions[0].node}
    _same(product, after, feeds)


def test_an_ellipsis_of_unknown_rank_stays_with_the_reason() -> None:
    model = _parse(FUNCTION.replace("bld,dn->bnl", "...ld,dn->...nl"))
    report = Rewriting()
    after = rewrite_onnx(model, report=report)
    assert after.functions[0].node[0].op_type == "Einsum"
    assert len(report.refused) == 1
    assert "nothing is known of the shape of operand 0 ('x')" in str(report.refused[0])
    with pytest.raises(NotExportableError, match="nothing is known of the shape of operand 0"):
        rewrite_onnx(model)


def test_one_rewritten_einsum_tells_the_next_its_rank() -> None:
    """The first result's rank follows from the equation; ONNX's inference knows nothing of either."""
    model = _parse("""g (float[A,B] x, float[B,C] w) => (float[A] y) {
        s = Shape(x)  u = Reshape(x, s)  n = mine.unknown(u)
        t = Einsum<equation="ab,bc->ac">(n, w)
        y = Einsum<equation="...c->...">(t)
    }
    <domain: "mine", opset_import: ["" : 17]> unknown (x) => (y) { y = Identity(x) }""")
    report = Rewriting()
    after = rewrite_onnx(model, report=report)
    assert not report.refused
    assert "Einsum" not in _ops(after.graph)


def test_names_metadata_and_documentation_are_kept() -> None:
    model = model_of([problem("bld,nd->bln", [["B", 4, 3], [5, 3]])], TensorProto.FLOAT)
    node = model.graph.node[0]
    node.doc_string = "the projection"
    node.metadata_props.add(key="where", value="block.0")
    model.graph.doc_string, model.producer_name = "a graph", "somebody"
    model.metadata_props.add(key="license", value="mit")
    model.graph.value_info.append(helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["B", 4, 5]))
    untouched = model.SerializeToString()
    after = rewrite_onnx(model)
    assert model.SerializeToString() == untouched
    assert after.graph.output[0].name == "y0"
    assert (after.graph.name, after.graph.doc_string) == ("einsums", "a graph")
    assert (after.producer_name, after.metadata_props[0].value) == ("somebody", "mit")
    assert after.graph.node[-1].name == "einsum0"
    for new in after.graph.node:
        assert new.doc_string == "the projection"
        assert new.metadata_props[0].value == "block.0"
    assert len({new.name for new in after.graph.node}) == len(after.graph.node)


def test_the_site_names_the_user_s_line(tmp_path: pytest.TempPathFactory) -> None:
    file = tmp_path / "block.py"  # type: ignore[operator]
    file.write_text("def forward(x, w):\n    return einsum(x, w, 'batch d, d n -> batch n')\n")
    model = model_of([problem("ab,bc->ac", [[2, 3], [3, 4]])])
    model.graph.node[0].metadata_props.add(
        key=STACK_TRACE, value=f'File "{file}", line 2, in forward\n    return einsum(...)'
    )
    report = Rewriting()
    rewrite_onnx(model, report=report)
    assert str(report.sites[0]) == f"{file}:2: 'batch d, d n -> batch n' became matmul"
    plain = Rewriting()
    rewrite_onnx(model_of([problem("ab,bc->ac", [[2, 3], [3, 4]])]), report=plain)
    assert str(plain.sites[0]) == "node 'einsum0': 'ab,bc->ac' became matmul"


def _with_weight(weight_is_input: bool = False, used_twice: bool = False) -> onnx.ModelProto:
    second = 'z = Einsum<equation="nd,nd->n">(w, w)' if used_twice else "z = Identity(x)"
    outputs = "float[B,N] y, float[N] z" if used_twice else "float[B,N] y, float[B,D] z"
    more = ", float[4,3] w" if weight_is_input else ""
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[B,3] x{more}) => ({outputs}) {{ y = Einsum<equation="bd,nd->bn">(x, w) {second} }}"""
    )
    model.graph.initializer.append(
        numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    )
    return model


def test_a_constant_is_transposed_once_and_for_all() -> None:
    after = rewrite_onnx(_with_weight())
    assert _ops(after.graph) == ["MatMul", "Identity"]
    assert {tensor.name: list(tensor.dims) for tensor in after.graph.initializer} == {"w_transpose": [3, 4]}
    _same(_with_weight(), after, {"x": X})


def test_a_constant_that_others_use_stays() -> None:
    after = rewrite_onnx(_with_weight(used_twice=True))
    assert {"w", "w_transpose"} <= {tensor.name for tensor in after.graph.initializer}
    _same(_with_weight(used_twice=True), after, {"x": X})


def test_a_default_value_of_an_input_is_no_constant() -> None:
    after = rewrite_onnx(_with_weight(weight_is_input=True))
    assert "Transpose" in _ops(after.graph)
    assert [tensor.name for tensor in after.graph.initializer] == ["w"]
    _same(_with_weight(weight_is_input=True), after, {"x": X, "w": np.ones((4, 3), np.float32)})


def test_external_weights_of_a_proto_stay_external() -> None:
    model = _with_weight()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="nowhere.bin")
    after = rewrite_onnx(model)
    assert _ops(after.graph) == ["Transpose", "MatMul", "Identity"]
    assert after.graph.initializer[0].external_data[0].value == "nowhere.bin"


def test_models_of_onnx_ir() -> None:
    model = ir.from_proto(_with_weight())
    after = rewrite_onnx(model)
    assert isinstance(after, ir.Model)
    assert [node.op_type for node in model.graph] == ["Einsum", "Identity"]
    assert [node.op_type for node in after.graph] == ["MatMul", "Identity"]


def test_old_files_whose_initializers_must_be_inputs() -> None:
    model = model_of([problem("bd,b->bd", [["B", 3], ["B"]])], TensorProto.FLOAT, opset=13)
    model.ir_version = 3
    after = rewrite_onnx(model)
    assert _ops(after.graph) == ["Constant", "Unsqueeze", "Mul"]
    assert not after.graph.initializer


BREAK_OTHERS = (
    ("...i,...i->...", [[4], [2, 3, 4]]),
    ("...i,...ij->...j", [[3, 1, 4], [2, 3, 2, 4, 5]]),
    ("...i,i->i", [[2, 3, 4], [4]]),
    ("...ij,j->", [[2, 3, 4], [4]]),
    ("ii...,i->i...", [[3, 3, 2], [3]]),
)


@pytest.mark.parametrize(("equation", "shapes"), BREAK_OTHERS)
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("opset", [13, 17, 22])
def test_equations_that_break_other_tools(
    equation: str, shapes: list[list[int]], dtype: int, dynamic: bool, opset: int
) -> None:
    told = [[1 if n == 1 else None for n in shape] for shape in shapes] if dynamic else shapes
    model = model_of([problem(equation, told)], dtype, opset)
    arrays = integers(shapes)
    numbers = helper.tensor_dtype_to_np_dtype(dtype)
    want = proof.brute_force(proof.Equation.parse(equation), arrays)
    for target in ("onnxruntime-cpu", "tensorrt"):
        after = rewrite_onnx(model, Options(target=target))
        onnx.checker.check_model(after, full_check=True)
        feeds = {f"x0_{k}": x.astype(numbers) for k, x in enumerate(arrays)}
        got = ReferenceEvaluator(after).run(None, feeds)[0]
        np.testing.assert_array_equal(np.asarray(got).astype(np.int64), want)
        if dtype == TensorProto.FLOAT:
            np.testing.assert_array_equal(compute(after, [list(feeds.values())])[0], want)


def test_bfloat16_runs_on_onnx_runtime_s_cpu() -> None:
    """It has no arithmetic in bfloat16, so the steps stand between two casts."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]> g (float[4] x, float[2,3,4] y) => (float[2,3] z) {
            a = Cast<to = 16>(x)  b = Cast<to = 16>(y)
            c = Einsum<equation="...i,...i->...">(a, b)
            z = Cast<to = 1>(c)
        }"""
    )
    x, y = (array.astype(np.float32) for array in integers([[4], [2, 3, 4]]))
    after = rewrite_onnx(model)
    import onnxruntime as ort

    session = ort.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x, "y": y})[0], (x * y).sum(-1))


def test_bfloat16_below_opset_13_is_refused() -> None:
    model = model_of([problem("ab,b->a", [[2, 3], [3]])], TensorProto.BFLOAT16, opset=12)
    with pytest.raises(NotExportableError, match="opset 12 has no operator for bfloat16"):
        rewrite_onnx(model)


@pytest.mark.parametrize("name", ["INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64", "UINT64"])
@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("equation", ["ab,bc->ac", "ab,ab->a", "ab,a->ba", "ab->ba"])
def test_integers_wrap_as_they_would_have(name: str, opset: int, equation: str) -> None:
    dtype = getattr(TensorProto, name)
    shapes = [[3, 3]] * equation.count(",") + [[3] if equation == "ab,a->ba" else [3, 3]]
    model = model_of([problem(equation, shapes)], dtype, opset)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    arrays = [np.arange(x.size).reshape(x.shape).astype(kind) * kind.type(13) for x in integers(shapes)]
    after = rewrite_onnx(model)
    onnx.checker.check_model(after, full_check=True)
    want = np.einsum(equation, *arrays)
    if "UINT" in name and "8" not in name and opset == 12 and name != "UINT16":
        return  # ONNX Runtime has no Mul of them at opset 12; the checker agreed
    got = compute(after, [arrays])[0]
    assert got.dtype == kind
    np.testing.assert_array_equal(got, want)


def test_a_failed_proof_names_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_export.einsum_rewrite import onnx_numpy

    monkeypatch.setitem(onnx_numpy.OPERATORS, "MatMul", lambda x, y: np.matmul(x, y) + 1)
    proof._prove_onnx.cache_clear()
    with pytest.raises(ProofError) as caught:
        rewrite_onnx(model_of([problem("ab,bc->ac", [[2, 3], [3, 4]])]))
    proof._prove_onnx.cache_clear()
    assert "where: node 'einsum0'" in str(caught.value)
    assert "computes other numbers, at a=2, b=3, c=5" in str(caught.value)


def test_sizes_that_do_not_fit_are_refused() -> None:
    model = model_of([problem("ab,bc->ac", [[2, 3], [4, 4]])])
    with pytest.raises(NotExportableError, match="label 'b' is 3 in operand 0 and 4 in operand 1"):
        rewrite_onnx(model)


def test_an_unknown_target() -> None:
    with pytest.raises(EquationError, match="there is no target 'tpu'"):
        Options(target="tpu")


def test_the_users_transpose_before_a_matrix_times_a_vector() -> None:
    """ONNX Runtime 1.31 fuses it into a MatMul and then forgets it, if the right operand is a vector."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]> g (float[K,M] x, float[K] v) => (float[M] y) {
            t = Transpose<perm = [1, 0]>(x)
            y = Einsum<equation="mk,k->m">(t, v)
        }"""
    )
    import onnxruntime as ort

    session = ort.InferenceSession(
        rewrite_onnx(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    v = np.array([1, 10], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": X, "v": v})[0], X.T @ v)


def test_keeping_matrix_products_is_the_user_s_choice() -> None:
    several = [
        problem("ab,bc->ac", [[2, 3], [3, 4]]),
        problem("abc,adc->abd", [[2, 3, 4], [2, 5, 4]]),
        problem("ab,ab->a", [[2, 3], [2, 3]]),
        problem("ab,bc->abc", [[2, 3], [3, 4]]),
        problem("ab,bc,cd->ad", [[2, 3], [3, 4], [4, 5]]),
    ]
    report = Rewriting()
    after = rewrite_onnx(model_of(several), Options(keep_einsum=True), report)
    assert [site.kept for site in report.sites] == [True, True, False, False, False]
    assert [proved is None for proved in report.proofs] == [True, True, False, False, False]
    assert _ops(after.graph).count("Einsum") == 2
    half = rewrite_onnx(model_of(several[:1], TensorProto.BFLOAT16), Options(keep_einsum=True))
    assert "Einsum" not in _ops(half.graph)  # it would not be valid in bfloat16


def test_no_intermediate_above_the_limit() -> None:
    b, c, t, s, h, n, p = 1, 16, 256, 256, 24, 128, 64
    shapes = [[b, c, t, h, n], [b, c, s, h, n], [b, h, c, t, s], [b, c, s, h, p]]
    model = model_of([problem("bclhn,bcshn,bhcls,bcshp->bclhp", shapes)], TensorProto.FLOAT)
    report = Rewriting()
    rewrite_onnx(model, Options(max_intermediate=h * c * t * s * 4), report)
    # 100.7 MB in units of 10**6 bytes, 96 MiB: the third operand itself is as large.
    assert [site.largest.number for site in report.sites] == [b * h * c * t * s]
    with pytest.raises(
        NotExportableError, match=r"every plan has an intermediate of more than 25,000,000 elem"
    ):
        rewrite_onnx(model, Options(max_intermediate=100_000_000))
