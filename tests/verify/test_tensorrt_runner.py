"""Engines as something to compare with. What needs a GPU is marked so; the rest is what is said where none is."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest

from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.engines.build import build_engines, has_gpu
from moe_export.export.engines.module import load_module
from moe_export.export.engines.settings import Settings
from moe_export.running.engines import compare_with_graph, graph_of, open_engine, run_status
from moe_export.verify.runners.engine_header import read_header
from moe_export.verify.runners.engine_loading import read_engine
from moe_export.verify.runners.tensorrt_runner import TensorRtRunner

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
GRAPH = """linear (float[rows, 4] x, int64[rows, 1] shift) => (float[rows, 4] y, int64[rows, 1] z)
    <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>
    { y = MatMul(x, w) z = Add(shift, shift) }"""
without_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU here")


@functools.cache
def plan(capability):
    """An engine of the graph, built once for a capability."""
    (engine,) = build_engines(onnx.parser.parse_model(HEAD + GRAPH), [capability], {"rows": (1, 4, 16)})
    return engine.plan


@pytest.fixture
def built(tmp_path):
    """A graph and its engine for a capability."""

    def built(capability):
        onnx.save(onnx.parser.parse_model(HEAD + GRAPH), tmp_path / "linear.onnx")
        path = tmp_path / f"linear.{capability}.engine"
        path.write_bytes(plan(capability))
        return path

    return built


def test_an_engine_says_who_built_it_and_for_which_gpus(built):
    for capability in ("sm75", "sm86", "sm89", "sm120"):
        plan = built(capability).read_bytes()
        header = read_header(plan[:64])
        assert (header.version, header.size, header.gpus) == (load_module().version, len(plan), (capability,))
        assert header.runs_on(capability)
        assert not header.runs_on("sm80")
        assert header.runs_on("sm999")  # not known here: TensorRT is asked
    portable = read_header(built("portable").read_bytes())
    assert portable.gpus == ("sm80", "sm86", "sm89", "sm120", "sm121")
    assert read_header(b"no engine at all, but long enough to have a version" * 2) is None
    assert read_header(b"vtrt") is None


def test_an_engine_for_other_gpus_is_refused_before_it_is_loaded(built):
    path = built("sm89")
    assert read_engine(path, load_module(), "sm89") == path.read_bytes()
    with pytest.raises(
        UsageError, match=r"linear\.sm89\.engine was built for sm89, and this GPU is sm120"
    ) as error:
        read_engine(path, load_module(), "sm120")
    assert error.value.hint == "build it for this GPU: --engine sm120"


def test_an_engine_of_the_other_tensorrt_is_refused(built):
    with pytest.raises(UsageError, match="is an engine of TensorRT-RTX, which tensorrt cannot load") as error:
        read_engine(built("sm89"), replace(load_module(), name="tensorrt"), None)
    assert "--backend tensorrt-rtx" in error.value.hint


def test_an_engine_that_was_cut_off_is_refused(built):
    path = built("sm89")
    plan = path.read_bytes()
    path.write_bytes(plan[:-7])
    with pytest.raises(UsageError, match=f"is damaged: it has {len(plan) - 7} bytes of {len(plan)}"):
        open_engine(path)


def test_an_engine_of_another_version_is_refused(built):
    path = built("sm89")
    plan = bytearray(path.read_bytes())
    plan[24:28] = bytes([1, 2, 0, 36])
    path.write_bytes(plan)
    with pytest.raises(UsageError, match=r"was built by tensorrt-rtx 1\.2\.0\.36, and this is ") as error:
        open_engine(path)
    assert "build it again here, or install tensorrt-rtx 1.2.0.36" in error.value.hint


def test_what_is_no_engine_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        open_engine(tmp_path / "nowhere.engine")
    (tmp_path / "text.engine").write_text("this is no engine" * 10)
    with pytest.raises(UsageError, match="is no engine of TensorRT-RTX"):
        TensorRtRunner(tmp_path / "text.engine", load_module())


@without_gpu
def test_without_a_gpu_an_engine_is_not_run(built):
    path = built("sm89")
    with pytest.raises(MissingBackendError, match="built, not run: no GPU"):
        open_engine(path)
    assert run_status(path, graph_of(path), "sm89", "tensorrt-rtx") == ("built, not run: no GPU", None)


def test_the_graph_of_an_engine_stands_beside_it(built, tmp_path):
    path = built("sm89")
    assert graph_of(path) == tmp_path / "linear.onnx"
    assert graph_of(tmp_path / "linear.portable.engine") == tmp_path / "linear.onnx"
    assert graph_of(tmp_path / "linear.engine") == tmp_path / "linear.onnx"
    assert graph_of(tmp_path / "other.sm89.engine") is None


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
def test_an_engine_computes_what_its_graph_does(built):
    path = built("current")
    runner = open_engine(path)
    assert [str(spec) for spec in runner.inputs] == ["x: float32[rows, 4]", "shift: int64[rows, 1]"]
    assert [(dim.name, dim.minimum, dim.traced, dim.maximum) for dim in runner.dims] == [("rows", 1, 4, 16)]
    found = runner.run({"x": np.eye(4, dtype=np.float32), "shift": np.arange(4)[:, None]})
    np.testing.assert_array_equal(found["y"], np.arange(1, 17, dtype=np.float32).reshape(4, 4))
    np.testing.assert_array_equal(found["z"], 2 * np.arange(4)[:, None])
    assert compare_with_graph(runner, graph_of(path)).verdict == "equal"


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
def test_sizes_outside_the_profile_are_refused(built):
    runner = open_engine(built("current"))
    with pytest.raises(UsageError, match="input x has rows = 17, the engine's profile takes 1 to 16"):
        runner.run({"x": np.zeros((17, 4), np.float32), "shift": np.zeros((17, 1), np.int64)})


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
def test_an_engine_for_other_gpus_is_refused(built):
    import torch

    here = "sm{}{}".format(*torch.cuda.get_device_capability())
    other = next(name for name in ("sm75", "sm120") if name != here)
    path = built(other)
    assert run_status(path, graph_of(path), other, "tensorrt-rtx")[0] == f"built, not run: this GPU is {here}"
    with pytest.raises(UsageError, match=f"this GPU (is |\\()?{here}") as error:
        open_engine(path)
    assert f"--engine {here}" in error.value.hint


GATHERED = """g (float[past, 4] old, float[n, 4] new, int64[2] s) => (float[total, 4] all, float[a, b] y)
    { all = Concat<axis = 0>(old, new) y = Reshape(new, s) }"""
PACKED = """g (float[n, 4] x) => (float8e4m3fn[n, 4] y, int64[2] s)
    <float scale = {0.5}, float8e4m3fn zero = {0}> { y = QuantizeLinear(x, scale, zero) s = Shape(x) }"""


@pytest.fixture
def run_here(tmp_path):
    """A graph's text, built for the GPU that is here and opened."""

    def run_here(text, ranges, opset=17, **settings):
        graph = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{text}')
        onnx.save(graph, tmp_path / "g.onnx")
        (engine,) = build_engines(tmp_path / "g.onnx", ["current"], ranges, settings=Settings(**settings))
        (tmp_path / "g.current.engine").write_bytes(engine.plan)
        return open_engine(tmp_path / "g.current.engine")

    return run_here


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
def test_values_decide_shapes_and_a_cache_may_be_empty(run_here):
    ranges = {"past": (0, 4, 16), "n": (1, 3, 16), "s_0": (2, 6, 32), "s_1": (2, 2, 2)}
    runner = run_here(GATHERED, ranges)
    new = np.arange(12, dtype=np.float32).reshape(3, 4)
    given = {"old": np.zeros((0, 4), np.float32), "new": new, "s": np.array([6, 2])}
    found = runner.run(given)
    np.testing.assert_array_equal(found["all"], new)
    np.testing.assert_array_equal(found["y"], new.reshape(6, 2))
    with pytest.raises(UsageError, match=r"input s is \[33, 2\], the engine's profile takes"):
        runner.run(given | {"s": np.array([33, 2])})


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
def test_8_bit_floats_and_sizes_come_out(run_here):
    found = run_here(PACKED, {"n": (1, 2, 8)}, opset=21).run({"x": np.full((2, 4), 1.5, np.float32)})
    assert found["y"].dtype.name == "float8_e4m3fn"
    np.testing.assert_array_equal(found["y"].astype(np.float32), np.full((2, 4), 3.0))
    np.testing.assert_array_equal(found["s"], [2, 4])


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
@pytest.mark.parametrize("settings", [{"strip_weights": True}, {"refit": True}])
def test_an_engine_without_weights_gets_those_of_its_graph(run_here, settings):
    runner = run_here(GRAPH, {"rows": (1, 4, 16)}, **settings)
    given = {"x": np.eye(4, dtype=np.float32), "shift": np.zeros((4, 1), np.int64)}
    np.testing.assert_array_equal(runner.run(given)["y"], np.arange(1, 17, dtype=np.float32).reshape(4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="running an engine needs a GPU")
def test_kernels_are_kept_for_the_next_process(built, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {"x": np.eye(4, dtype=np.float32), "shift": np.zeros((4, 1), np.int64)}
    first = open_engine(built("current")).run(given)
    (file,) = (tmp_path / "cache" / "moe-export" / "kernels").iterdir()
    assert file.stat().st_size > 0
    second = open_engine(tmp_path / "linear.current.engine").run(given)
    np.testing.assert_array_equal(first["y"], second["y"])
