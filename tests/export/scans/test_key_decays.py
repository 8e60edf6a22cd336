"""`KeyDecays` by itself, in float64: what it writes against sums over products of decays, and with one level spoilt."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from moe_export.export.scans.key_decays import KEY_STEPS, KeyDecays
from moe_export.graph_builder import GraphBuilder

T = KEY_STEPS
SHAPE = (3, 2, T, 5)
LEVELS = T.bit_length() - 1


def decays(strongest: float, seed: int = 0) -> np.ndarray:
    """From exp(-strongest) to exactly 1, (c, g, t, n)."""
    choose = np.random.default_rng(seed)
    return np.exp(-strongest * choose.uniform(size=SHAPE) * (choose.uniform(size=SHAPE) > 0.3))


def written(decay: np.ndarray, new: bool, spoilt: tuple[int, str] | None = None) -> list[np.ndarray]:
    """`pairs`, `from_start`, `to_end` and `whole`, run; with one side of one level multiplied by 1.01."""
    kind = ir.TensorType(ir.DataType.DOUBLE)
    inputs = [ir.Value(name=name, type=kind, shape=ir.Shape(["c", *SHAPE[1:]])) for name in ("q", "k", "a")]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 18})
    builder = GraphBuilder(graph, "keys", typed=True)
    keys = KeyDecays(builder, inputs[2], 3)
    if spoilt is not None:
        level = keys._levels[spoilt[0]]
        wrong = builder.op("Mul", getattr(level, spoilt[1]), builder.constant(np.array(1.01)))
        object.__setattr__(level, spoilt[1], wrong)
    q, k, _ = inputs
    results = [keys.pairs(q, k, new), keys.from_start(q, new), keys.to_end(k), keys.whole()]
    graph.extend(builder.nodes)
    graph.outputs.extend(results)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(model, options)
    feed = dict(zip("qka", (*factors(), decay), strict=True))
    return list(session.run(None, feed))


def factors() -> tuple[np.ndarray, np.ndarray]:
    choose = np.random.default_rng(7)
    return choose.standard_normal(SHAPE), choose.standard_normal(SHAPE)


def wanted(decay: np.ndarray, new: bool) -> list[np.ndarray]:
    """The same, one pair of steps after the other."""
    q, k = factors()
    pairs = np.zeros((*SHAPE[:3], T))
    for t in range(T):
        for s in range(t + new):
            between = decay[:, :, s + 1 : t + new].prod(2)
            pairs[:, :, t, s] = (q[:, :, t] * between * k[:, :, s]).sum(-1)
    starts = np.stack([decay[:, :, : t + new].prod(2) for t in range(T)], 2)
    ends = np.stack([decay[:, :, s + 1 :].prod(2) for s in range(T)], 2)
    return [pairs, q * starts, k * ends, decay.prod(2)[..., None]]


def error(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    assert [one.shape for one in found] == [one.shape for one in exact]
    return max(float(np.abs(one - other).max()) for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("strongest", [0.0, 0.5, 30.0, 1000.0])
def test_pairs_are_sums_of_products_of_decays(strongest: float, new: bool) -> None:
    decay = decays(strongest)
    assert error(written(decay, new), wanted(decay, new)) < 1e-14


@pytest.mark.parametrize("new", [True, False])
def test_decays_of_any_sign_and_above_one(new: bool) -> None:
    decay = np.random.default_rng(3).uniform(-1.2, 1.2, SHAPE)
    assert error(written(decay, new), wanted(decay, new)) < 1e-13


@pytest.mark.parametrize("side", ["read", "stored"])
@pytest.mark.parametrize("level", range(LEVELS))
def test_a_level_that_is_wrong_is_noticed(level: int, side: str) -> None:
    decay = decays(0.5)
    assert error(written(decay, True, (level, side)), wanted(decay, True)) > 1e-4


def test_all_pairs_of_a_chunk_are_in_one_block() -> None:
    """A chunk of ones has products of 1 a key for all earlier steps: none is left out, none counted twice."""
    (pairs, *_), exact = written(np.ones(SHAPE), True), wanted(np.ones(SHAPE), True)
    np.testing.assert_allclose(pairs, exact[0], atol=1e-14)
