from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.engines.build import has_gpu
from moe_export.verify import Case, OnnxRuntimeRunner, RunFailedError, TensorSpec, compare
from moe_export.verify.reports.reading import read_report
from moe_export.verify.runners.onnxruntime_runner import left_to_the_cpu, record_placement

ADD = "g (float[batch,4] x, int64[4] i) => (float[batch,4] y, int64[4] j) { y = Add(x, x) j = Neg(i) }"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
IDS = np.arange(4)


def test_named_arrays_go_in_and_come_out(graph):
    outputs = graph(ADD).run({"x": X, "i": IDS})
    np.testing.assert_array_equal(outputs["y"], X + X)
    np.testing.assert_array_equal(outputs["j"], -IDS)


def test_specs_come_from_the_graph(graph):
    runner = graph(ADD)
    assert runner.name == "onnxruntime-cpu"
    assert runner.inputs == (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("i", "int64", (4,)))
    assert runner.outputs[1] == TensorSpec("j", "int64", (4,))
    assert graph("g (float[?,4] x) => (float[?,4] y) { y = Neg(x) }").inputs[0].shape == ("x_dim0", 4)


def test_a_scalar_may_come_as_a_number(graph):
    runner = graph("g (float[a,b] x, float s) => (float[a,b] y) { y = Mul(x, s) }")
    assert runner.run({"x": X, "s": np.float32(2)})["y"].shape == (2, 4)
    assert runner.inputs[1] == TensorSpec("s", "float32", ())


def test_a_path_works_as_bytes_do(graph_bytes, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph_bytes(ADD))
    for source in (path, str(path)):
        assert OnnxRuntimeRunner(source).run({"x": X, "i": IDS})["y"][1, 3] == 14


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_bfloat16_goes_in_and_comes_out(graph, shape):
    dims = f"[{','.join('ab'[: len(shape)])}]" if shape else ""
    runner = graph(
        f"g (bfloat16{dims} x, float{dims} w) => (bfloat16{dims} y, float{dims} z)"
        " { y = Identity(x) x32 = Cast<to=1>(x) z = Mul(x32, w) }"
    )
    x = np.full(shape, 1.5, ml_dtypes.bfloat16)
    outputs = runner.run({"x": x, "w": np.full(shape, 2, np.float32)})
    assert (outputs["y"].dtype, outputs["y"].shape) == (x.dtype, shape)
    np.testing.assert_array_equal(outputs["y"].astype(np.float32), x.astype(np.float32))
    np.testing.assert_array_equal(outputs["z"], np.full(shape, 3, np.float32))


def test_a_strided_bfloat16_input_is_read_in_its_order(graph):
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    runner = graph("g (bfloat16[a,b] x) => (bfloat16[a,b] y) { y = Identity(x) }")
    np.testing.assert_array_equal(runner.run({"x": x.T})["y"].astype(int), x.T.astype(int))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X}, "input 'i' is missing"),
        ({"x": X, "i": IDS, "z": X}, "unexpected input 'z'"),
        ({"x": X, "i": IDS.astype(np.int32)}, "input 'i' is int32[4]"),
        ({"x": X[:, :3], "i": IDS}, "input 'x' is float32[2, 3]"),
        ({"x": X[0], "i": IDS}, "input 'x' is float32[4]"),
        ({"X": X, "i": IDS}, "input 'x' is missing; unexpected input 'X'"),
    ],
)
def test_inputs_that_do_not_fit_are_told_what_would(graph, inputs, message):
    with pytest.raises(UsageError) as caught:
        graph(ADD).run(inputs)
    assert caught.value.what == f"{message}; the graph takes x: float32[batch, 4]; i: int64[4]"


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError) as caught:
        OnnxRuntimeRunner(tmp_path / "none.onnx")
    assert caught.value.what == f"no such file: {tmp_path / 'none.onnx'}"
    with pytest.raises(UsageError, match="no such file"):
        OnnxRuntimeRunner(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_truncated_file(graph_bytes, tmp_path, keep, capfd):
    path = tmp_path / "cut.onnx"
    path.write_bytes(graph_bytes(ADD)[:keep])
    with pytest.raises(UsageError) as caught:
        OnnxRuntimeRunner(path)
    assert caught.value.what == "not an ONNX model, or a truncated one"
    assert caught.value.where == str(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [b"import torch\n", b"\x89PNG\r\n\x1a\n" + bytes(99), b"{}"])
def test_a_file_that_is_no_onnx(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not an ONNX model, or a truncated one"):
        OnnxRuntimeRunner(path)


def test_a_graph_that_onnxruntime_refuses_says_why(graph_bytes, capfd):
    data = graph_bytes("g (float[4] x) => (float[4] y) { y = Softplus(x) }").replace(b"Softplus", b"Hardplus")
    with pytest.raises(UsageError) as caught:
        OnnxRuntimeRunner(data)
    assert caught.value.what.startswith("ONNX Runtime refuses the model: ")
    assert "Hardplus" in caught.value.what
    assert "ONNXRuntimeError" not in caught.value.what
    assert caught.value.where == "<bytes>"
    assert capfd.readouterr().err == ""


def test_a_graph_that_fails_on_the_way_says_why_and_prints_nothing(graph, capfd):
    runner = graph("g (float[a] x, float[b] z) => (float[c] y) { y = Add(x, z) }")
    with pytest.raises(RunFailedError) as caught:
        runner.run({"x": np.ones(2, np.float32), "z": np.ones(3, np.float32)})
    assert caught.value.what.startswith("onnxruntime-cpu failed: ")
    assert caught.value.exit_code == 1
    assert capfd.readouterr().err == ""


def test_an_output_that_is_no_tensor_is_refused(graph):
    with pytest.raises(
        UsageError, match=r"output 's' is a seq\(tensor\(float\)\); only tensors can be compared"
    ):
        graph("g (float[4] x) => (seq(float[4]) s) { s = SequenceConstruct(x) }")


def test_an_unknown_provider_is_refused():
    with pytest.raises(UsageError) as caught:
        OnnxRuntimeRunner(b"", provider="tpu")
    assert str(caught.value) == "unknown ONNX Runtime provider 'tpu'\n  hint: use cpu, cuda, tensorrt"


def test_a_build_without_cuda_is_a_missing_backend(graph_bytes, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingBackendError) as caught:
        OnnxRuntimeRunner(graph_bytes(ADD), provider="cuda")
    assert "no cuda provider" in caught.value.what
    assert caught.value.exit_code == 4


def test_two_packages_of_one_import_name_are_named(graph_bytes, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        "importlib.metadata.version", {"onnxruntime": "1.23", "onnxruntime-gpu": "1.24"}.__getitem__
    )
    with pytest.raises(MissingBackendError, match="overwrite each other") as caught:
        OnnxRuntimeRunner(graph_bytes(ADD), provider="cuda")
    assert "onnxruntime 1.23 and onnxruntime-gpu 1.24" in str(caught.value)


def test_a_cuda_that_is_dropped_silently_is_a_missing_backend(graph_bytes, monkeypatch, capfd):
    session, asked = onnxruntime.InferenceSession, []

    def on_the_cpu(source, options, providers, provider_options):
        asked.append(dict(zip(providers, provider_options, strict=True)))
        return session(source, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    with pytest.raises(
        MissingBackendError, match="cannot use cuda here: it fell back to CPUExecutionProvider"
    ):
        OnnxRuntimeRunner(graph_bytes(ADD), provider="cuda")
    assert capfd.readouterr().err == ""
    assert asked[0]["CUDAExecutionProvider"] == {"use_tf32": "0"}


def test_asked_for_cuda_it_runs_there_or_says_quietly_that_it_cannot(graph_bytes, capfd):
    try:
        outcome = OnnxRuntimeRunner(graph_bytes(ADD), provider="cuda").run({"x": X, "i": IDS})["y"].tolist()
    except MissingBackendError as error:
        outcome = error.exit_code
    assert outcome in (4, (X + X).tolist())
    assert capfd.readouterr().err == ""


def test_asked_for_tensorrt_it_runs_there_or_says_quietly_that_it_cannot(graph_bytes, capfd):
    try:
        outcome = (
            OnnxRuntimeRunner(graph_bytes(ADD), provider="tensorrt").run({"x": X, "i": IDS})["y"].tolist()
        )
    except MissingBackendError as error:
        outcome = error.exit_code
    assert outcome in (4, (X + X).tolist())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.is_dir(), reason="the system does not list the threads of a process")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_it_computes_with_as_many_threads_as_were_asked_for(graph_bytes, threads):
    before = set(TASKS.iterdir())
    runner = OnnxRuntimeRunner(graph_bytes(ADD), threads=threads)
    assert len(set(TASKS.iterdir()) - before) == threads - 1  # the caller's is one of them
    np.testing.assert_array_equal(runner.run({"x": X, "i": IDS})["y"], X + X)


def test_what_the_cpu_was_left_with_is_counted(graph_bytes):
    options = onnxruntime.SessionOptions()
    record_placement(options)
    session = onnxruntime.InferenceSession(graph_bytes(ADD), options, providers=["CPUExecutionProvider"])
    assert left_to_the_cpu(session) == "2 of 2 nodes: Add, Neg"
    assert OnnxRuntimeRunner(graph_bytes(ADD)).elsewhere == ""  # it was asked for the CPU


def test_a_report_says_what_the_cpu_was_left_with(graph_bytes):
    candidate = OnnxRuntimeRunner(graph_bytes(ADD))
    candidate.elsewhere = "1 of 1 nodes: Add"  # as a GPU's provider would say
    case = Case("x", 0, {"batch": 2}, {"x": X, "i": IDS})
    report = compare(OnnxRuntimeRunner(graph_bytes(ADD)), candidate, [case])
    assert report.warnings == ("onnxruntime-cpu left 1 of 1 nodes: Add to the CPU",)
    assert "warning: onnxruntime-cpu left 1 of 1 nodes: Add to the CPU" in str(report)
    assert read_report(report.to_json()).warnings == report.warnings


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="the CUDA provider needs a GPU")
def test_the_cuda_provider_runs_on_the_gpu(graph_bytes):
    runner = OnnxRuntimeRunner(graph_bytes(ADD), provider="cuda")
    np.testing.assert_array_equal(runner.run({"x": X, "i": IDS})["y"], X + X)
    assert runner.elsewhere == ""
