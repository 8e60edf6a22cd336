"""What only one side of a decision needs moves into a branch, and what is computed stays the same."""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from moe_export.export.onnx import sides
from moe_export.export.onnx.sides import LEAST, sides_in_branches

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def model(body: str, *, weights: dict[str, np.ndarray], outputs: str = "y") -> ir.Model:
    outs = ", ".join(f"float[N, 8] {name}" for name in outputs.split())
    text = f"{HEADER} g (float[N, 8] x, bool c, bool d, bool[N, 1] v) => ({outs}) {{ {body} }}"
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(found: ir.Model, **given: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a random program may leave its weights unused
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    names = {each.name for each in session.get_inputs()}
    return session.run(None, {name: value for name, value in given.items() if name in names})


def given(c: bool, d: bool = True) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    return {"x": x, "c": np.array(c), "d": np.array(d), "v": np.array([[True], [False], [True]])}


def kinds(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def branches(node: ir.Node) -> list[list[str]]:
    return [kinds(node.attributes[name].as_graph()) for name in ("then_branch", "else_branch")]


LARGE = {"w": np.full((8, 512), 0.01), "u": np.full((512, 8), 0.02)}


@pytest.mark.parametrize(("inner", "count"), [(255, 0), (256, 1), (257, 1)])
def test_a_side_with_enough_weights_is_a_branch(inner: int, count: int) -> None:
    assert LEAST == 2 * 8 * 256
    found = model(
        "a = MatMul(x, w) b = MatMul(a, u) y = Where(c, b, x)",
        weights={"w": np.full((8, inner), 0.01), "u": np.full((inner, 8), 0.02)},
    )
    before = [run(found, **given(c)) for c in (True, False)]
    assert sides_in_branches(found) == count
    for c, wanted in zip((True, False), before, strict=True):
        np.testing.assert_array_equal(run(found, **given(c))[0], wanted[0])


def test_one_condition_is_one_if_and_what_both_need_stays() -> None:
    found = model(
        "s = Relu(x) a = MatMul(s, w) b = MatMul(a, u) k = Tanh(s) y = Where(c, b, k) z = Where(c, x, s)",
        weights=LARGE,
        outputs="y z",
    )
    before = [run(found, **given(c)) for c in (True, False)]
    assert sides_in_branches(found) == 1
    assert kinds(found.graph) == ["Relu", "If"]
    assert branches(list(found.graph)[-1]) == [["MatMul", "MatMul", "Identity"], ["Tanh", "Identity"]]
    for c, wanted in zip((True, False), before, strict=True):
        for one, other in zip(run(found, **given(c)), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul(x, w) b = MatMul(a, u) y = Where(v, b, x)",  # row by row
        "a = MatMul(x, w) b = MatMul(a, u) y = Where(c, b, row)",  # broadcast
        "a = MatMul(x, w) y0 = MatMul(a, u) y1 = Where(c, y0, x) y = Add(y1, y0)",  # read elsewhere, too
        "a = Add(x, x) y = Where(c, a, x)",  # nothing costly
    ],
)
def test_left_as_it_is(body: str) -> None:
    found = model(body, weights={**LARGE, "row": np.ones((1, 8))})
    before = kinds(found.graph)
    assert sides_in_branches(found) == 0
    assert kinds(found.graph) == before


def test_what_fails_on_the_side_that_is_not_taken_is_not_computed() -> None:
    body = "a = MatMul(x, w) b = MatMul(a, u) t = Constant<value_ints = [3, 8]>() m = Reshape(b, t) y = Where(c, m, x)"
    found = model(body, weights=LARGE)
    (reshaped,) = (node for node in found.graph if node.op_type == "Reshape")
    reshaped.outputs[0].shape = ir.Shape(["N", 8])  # of three rows, that is right
    assert sides_in_branches(found) == 1
    x = np.ones((4, 8), np.float32)  # four rows are no three
    np.testing.assert_array_equal(run(found, **{**given(False), "x": x})[0], x)


def _random_body(rng: random.Random) -> str:
    values, lines = ["x"], []
    for number in range(rng.randint(4, 14)):
        name = f"t{number}"
        one, other = rng.choice(values[-4:]), rng.choice(values)
        kind = rng.choice(["MatMul", "Tanh", "Add", "Where", "Where"])
        if kind == "MatMul":
            lines.append(f"{name} = MatMul({one}, q)")
        elif kind == "Tanh":
            lines.append(f"{name} = Tanh({one})")
        elif kind == "Add":
            lines.append(f"{name} = Add({one}, {other})")
        else:
            lines.append(f"{name} = Where({rng.choice('cdcdv')}, {one}, {other})")
        values.append(name)
    return " ".join([*lines, f"y = Add({values[-1]}, {values[-2]})", f"z = Tanh({rng.choice(values)})"])


@pytest.mark.slow
def test_random_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "LEAST", 1)
    rng, count = random.Random(0), 0
    for _ in range(300):
        found = model(_random_body(rng), weights={"q": np.eye(8) * 0.5 + 0.1}, outputs="y z")
        answers = [(c, d) for c in (True, False) for d in (True, False)]
        before = [run(found, **given(c, d)) for c, d in answers]
        count += sides_in_branches(found)
        for (c, d), wanted in zip(answers, before, strict=True):
            for one, other in zip(run(found, **given(c, d)), wanted, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert count >= 50
