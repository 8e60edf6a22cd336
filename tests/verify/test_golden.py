"""Golden files: what is stored comes back bit by bit, and what is no golden file is said to be none."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_export.errors import UsageError
from moe_export.verify import Case, Choice, RoutingPair, compare
from moe_export.verify.golden import Golden, GoldenCase, Recorder, load_golden, read_inputs, save_golden


def golden():
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(2, 3)).astype(np.float32),
        "half": rng.normal(size=4).astype(ml_dtypes.bfloat16),
        "mask": np.array([True, False]),
        "scalar": np.array(3, np.int64),
        "none": np.zeros((0, 4), np.float32),
    }
    outputs = {"y": np.array([1.0, np.nan, np.inf]), "ids": np.array([[1, 2]])}
    choice = Choice(np.array([[1]]), np.array([[0.1, 0.9]], np.float32))
    cases = (
        GoldenCase(Case("example", 7, {"n": 2}, inputs), outputs, (choice,)),
        GoldenCase(
            Case("zeros", 7, {"n": 2}, {k: np.zeros_like(v) for k, v in inputs.items()}, regime="zeros"),
            outputs,
        ),
    )
    return Golden("torch", cases, (RoutingPair("ids", None, None),), {"reference": "model.py"})


def test_what_is_stored_comes_back_bit_by_bit(tmp_path):
    save_golden(golden(), tmp_path / "g.safetensors")
    found = load_golden(tmp_path / "g.safetensors")
    assert (found.engine, found.routing, found.about) == (
        "torch",
        (RoutingPair("ids", None, None),),
        {"reference": "model.py"},
    )
    for mine, theirs in zip(golden().cases, found.cases, strict=True):
        assert (mine.case.label, mine.case.seed, mine.case.sizes, mine.case.regime) == (
            theirs.case.label,
            theirs.case.seed,
            theirs.case.sizes,
            theirs.case.regime,
        )
        for arrays, others in ((mine.case.inputs, theirs.case.inputs), (mine.outputs, theirs.outputs)):
            assert arrays.keys() == others.keys()
            for name, array in arrays.items():
                assert (array.dtype, array.shape) == (others[name].dtype, others[name].shape)
                assert array.tobytes() == others[name].tobytes()
    assert found.cases[0].choices[0].scores.tolist() == golden().cases[0].choices[0].scores.tolist()
    assert found.cases[1].choices == ()


def test_it_is_an_engine_for_the_inputs_that_it_holds():
    stored = golden()
    copied = {name: array.copy() for name, array in stored.cases[1].case.inputs.items()}
    assert stored.run(copied).keys() == {"y", "ids"}
    with pytest.raises(UsageError, match="holds no outputs for these inputs"):
        stored.run(copied | {"x": np.ones((2, 3), np.float32)})
    report = compare(stored, stored, (case.case for case in stored.cases), routing=stored.routing)
    assert report.exit_code == 0


def test_a_recorder_keeps_what_ran():
    class Engine:
        name = "engine"

        def run(self, inputs):
            if inputs["x"].size > 2:
                raise ValueError("too many")
            return {"y": inputs["x"] * 2}

    recorder = Recorder()
    runner = recorder.on(Engine())
    made = [Case(f"n={n}", 0, {"n": n}, {"x": np.ones(n, np.float32)}) for n in (1, 2, 3)]
    report = compare(runner, Engine(), recorder.watch(iter(made)), other_sizes=1)
    assert report.exit_code == 0
    assert [kept.case.label for kept in recorder.recorded] == ["n=1", "n=2"]
    assert recorder.engine == "engine"


def test_what_is_no_golden_file(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_golden(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UsageError, match="no safetensors file"):
        load_golden(tmp_path / "text.safetensors")
    save_file({"x": np.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="holds no golden tensors"):
        load_golden(tmp_path / "plain.safetensors")
    save_file(
        {"x": np.ones(2)},
        tmp_path / "old.safetensors",
        {"moe_export.golden": json.dumps({"schema": "moe-export/golden/0"})},
    )
    with pytest.raises(UsageError, match="holds moe-export/golden/0, not moe-export/golden/1"):
        load_golden(tmp_path / "old.safetensors")
    with pytest.raises(UsageError, match="nothing to record"):
        save_golden(Golden("torch", ()), tmp_path / "empty.safetensors")


def test_inputs_of_the_user(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "a.npz", x=x, more=np.ones(1))
    save_file({"x": x}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        np.testing.assert_array_equal(read_inputs(tmp_path / name, ["x"])["x"], x)
        with pytest.raises(UsageError, match="lacks the input 'ids'"):
            read_inputs(tmp_path / name, ["x", "ids"])
    (tmp_path / "bad.npz").write_text("hello")
    with pytest.raises(UsageError, match="cannot read"):
        read_inputs(tmp_path / "bad.npz", ["x"])
    with pytest.raises(UsageError, match="no such file"):
        read_inputs(tmp_path / "none.npz", ["x"])


def test_bfloat16_inputs_of_the_user(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    tensor = torch.randn(3, 2).bfloat16()
    save_torch({"x": tensor}, tmp_path / "b.safetensors")
    found = read_inputs(tmp_path / "b.safetensors", ["x"])["x"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())
