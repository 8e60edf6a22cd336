"""Runs of engines without a GPU, on doubles of TensorRT: what is handed over, and every step that may fail."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from tensorrt_doubles import Backend, HostCuda, Product, Tensor, module
from tensorrt_names import used

from moe_export.cli import cli
from moe_export.errors import MissingBackendError, UsageError
from moe_export.running.engines import compare_with_graph
from moe_export.verify.inputs.cases import cases
from moe_export.verify.inputs.known import Known
from moe_export.verify.runner import RunFailedError
from moe_export.verify.runners import engine_loading, tensorrt_runner
from moe_export.verify.runners.tensorrt_buffers import dtype_of, from_bytes, host_memory, on_host, to_bytes
from moe_export.verify.runners.tensorrt_runner import TensorRtRunner
from moe_export.verify.specs import numpy_dtype

FLOATS = Product(
    inputs={"x": Tensor("FLOAT", (-1, 2), ((0, 2), (4, 2), (16, 2)))},
    outputs={"y": Tensor("FLOAT", (-1, 2))},
    compute=lambda given: {"y": 2 * given["x"]},
)
RESHAPED = Product(
    inputs={
        "x": Tensor("FLOAT", (-1, 6), ((1, 6), (4, 6), (8, 6))),
        "s": Tensor("INT64", (2,), ((1, 2), (4, 6), (8, 6)), on_host=True),
    },
    outputs={"y": Tensor("FLOAT", (-1, -1)), "twice": Tensor("INT64", (2,), on_host=True)},
    compute=lambda given: {"y": given["x"].reshape(given["s"]), "twice": 2 * given["s"]},
)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """A runner of a double."""
    monkeypatch.setattr(tensorrt_runner, "present_gpu", lambda: "sm89")
    monkeypatch.setattr(tensorrt_runner, "Cuda", HostCuda)
    monkeypatch.setattr(engine_loading, "read_engine", lambda path, backend, gpu: b"plan")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def opened(product, name="tensorrt", **options):
        return TensorRtRunner(tmp_path / "m.engine", Backend(name, module(product, name)), **options)

    return opened


def own(product, *fails, **changes):
    """A product of its own, whose steps fail."""
    return replace(product, fails=frozenset(fails), told=[], **changes)


def test_a_double_has_no_function_that_tensorrt_has_not():
    known = used()
    for kind in module(FLOATS, "tensorrt-rtx").doubles:
        theirs = {name for name in vars(kind) if not name.startswith("_")}
        assert theirs <= set(known[kind.__name__]), kind


def test_arrays_go_in_and_come_out(opened):
    runner = opened(own(FLOATS))
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)
    assert [str(spec) for spec in runner.inputs + runner.outputs] == [
        "x: float32[x_dim0, 2]",
        "y: float32[y_dim0, 2]",
    ]


def test_an_empty_input_has_an_address(opened):
    """A cache at past = 0: TensorRT refuses an input whose address is null."""
    found = opened(own(FLOATS)).run({"x": np.zeros((0, 2), np.float32)})
    assert found["y"].shape == (0, 2)


def test_values_that_decide_shapes_are_read_on_the_host_and_held_to_the_profile(opened):
    runner = opened(own(RESHAPED))
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    found = runner.run({"x": x, "s": np.array([4, 3])})
    np.testing.assert_array_equal(found["y"], x.reshape(4, 3))
    np.testing.assert_array_equal(found["twice"], [8, 6])
    with pytest.raises(
        UsageError, match=r"input s is \[4, 7\], the engine's profile takes \[1, 2\] to \[8, 6\]"
    ):
        runner.run({"x": x, "s": np.array([4, 7])})


def test_cases_stay_within_the_values_of_a_profile(opened):
    runner = opened(own(RESHAPED))
    example = {"x": np.zeros((4, 6), np.float32), "s": np.array([4, 6])}
    made = list(cases(runner.inputs, runner.dims, example, known=Known(limits=runner.profile.limits)))
    assert len(made) > 5
    for case in made:
        assert (case.inputs["s"] >= [1, 2]).all()
        assert (case.inputs["s"] <= [8, 6]).all()
        assert case.inputs["s"].dtype == np.int64


COUNTED = Product(
    inputs={
        "x": Tensor("FLOAT", (-1, 2), ((1, 2), (4, 2), (16, 2))),
        "k": Tensor("INT64", (), ((3,), (5,), (9,)), on_host=True),
    },
    outputs={"y": Tensor("FLOAT", (-1, 2)), "r": Tensor("INT64", (-1,))},
    compute=lambda given: {"y": 2 * given["x"], "r": np.arange(given["k"])},
)
COUNTING = """g (float[n, 2] x, int64 k) => (float[n, 2] y, int64[a] r) {
    zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>()
    y = Add(x, x) r = Range(zero, k, one)
}"""


@pytest.mark.parametrize("fault", [0, 1])
def test_an_engine_is_compared_with_its_graph_at_values_that_it_takes(opened, tmp_path, fault):
    onnx.save(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {COUNTING}'), tmp_path / "m.onnx"
    )
    tried = []

    def compute(given):
        tried.append(int(given["k"]))
        found = COUNTED.compute(given)
        return found | {"r": found["r"] + fault * (given["k"] != 5)}

    runner = opened(own(COUNTED, compute=compute), shapes={"x": ("n", 2)})
    report = compare_with_graph(runner, tmp_path / "m.onnx")
    assert report.verdict == "equal" if not fault else report.verdict != "equal"
    assert {5} < set(tried) <= set(range(3, 10))


def test_verify_stays_within_the_profile_of_an_engine(opened, tmp_path, monkeypatch):
    onnx.save(
        onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {COUNTING}'), tmp_path / "m.onnx"
    )
    (tmp_path / "m.sm89.engine").write_bytes(b"plan")
    tried = set()

    def compute(given):
        tried.add(int(given["k"]))
        return COUNTED.compute(given)

    runner = opened(own(COUNTED, compute=compute), shapes={"x": ("n", 2)})
    monkeypatch.setattr("moe_export.running.engines.open_engine", lambda path, module: runner)
    done = CliRunner().invoke(
        cli, ["verify", str(tmp_path / "m.sm89.engine"), "--against", str(tmp_path / "m.onnx")]
    )
    assert done.exit_code == 0, done.output
    assert "tensorrt matches onnxruntime-cpu" in done.output
    assert {5} < tried <= set(range(3, 10))


STEPS = {
    "create_runtime_config": "it cannot be prepared for a run: create_runtime_config was told to fail",
    "create_execution_context": "it cannot be prepared for a run: create_execution_context was told to fail",
    "set_input_shape": r"it takes no x of shape \[1, 6\]: set_input_shape was told to fail",
    "set_tensor_address": "it takes no memory for x: set_tensor_address was told to fail",
    "set_output_allocator": "it takes no memory for output y: set_output_allocator was told to fail",
    "get_max_output_size": "the size of output twice is not known: get_max_output_size was told to fail",
    "execute_async_v3": "it did not run: execute_async_v3 was told to fail",
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_an_error_with_the_reason(opened, step):
    with pytest.raises(RunFailedError, match=f"^tensorrt: {STEPS[step]}") as error:
        opened(own(RESHAPED, step)).run({"x": np.zeros((1, 6), np.float32), "s": np.array([1, 6])})
    assert error.value.where.endswith("m.engine")


def test_without_memory_an_output_is_refused(opened, monkeypatch):
    def memory(self, count):
        raise torch.OutOfMemoryError("no memory")

    runner = opened(own(FLOATS))
    monkeypatch.setattr(HostCuda, "memory", memory)
    with pytest.raises(RunFailedError, match="it did not run: no memory for output y"):
        runner.run({"x": np.zeros((1, 2), np.float32)})


def test_an_engine_that_cannot_be_loaded_says_why(opened):
    with pytest.raises(
        UsageError, match=r"cannot load .*m\.engine on this GPU \(sm89\): deserialize"
    ) as error:
        opened(own(FLOATS, "deserialize_cuda_engine"))
    assert "--engine sm89" in error.value.hint


def test_without_a_driver_the_constructor_raises_and_that_is_a_missing_backend(opened):
    with pytest.raises(MissingBackendError, match=r"built, not run: tensorrt .* finds no driver") as error:
        opened(own(FLOATS, "Runtime"))
    assert "CUDA initialization failure" in str(error.value)


def test_plugins_are_known_before_an_engine_is_loaded(opened):
    product = own(FLOATS)
    opened(product)
    assert product.told.index("plugins") < product.told.index("deserialize_cuda_engine")
    with pytest.raises(MissingBackendError, match="plugins was told to fail"):
        opened(own(FLOATS, "plugins"))
    rtx = own(FLOATS)
    opened(rtx, "tensorrt-rtx")
    assert "plugins" not in rtx.told


def test_a_profile_that_there_is_not_is_wrong_use(opened):
    with pytest.raises(UsageError, match="has no profile 3 that is free"):
        opened(own(FLOATS), profile=3)


@contextmanager
def graph_file(path):
    yield path


def test_weights_that_were_left_out_are_put_back(opened, tmp_path):
    product = own(FLOATS, stripped=400)
    opened(product, weights=lambda: graph_file(tmp_path / "m.onnx"))
    assert ("weights of", str(tmp_path / "m.onnx")) in product.told
    assert product.told.index("refit_cuda_engine") < product.told.index("create_execution_context")
    whole = own(FLOATS)
    opened(whole, weights=lambda: graph_file(tmp_path / "m.onnx"))
    assert "refit_cuda_engine" not in whole.told


def test_weights_that_cannot_be_put_back_are_an_error(opened, tmp_path):
    with pytest.raises(UsageError, match="was built without its weights") as error:
        opened(own(FLOATS, stripped=400))
    assert "model.onnx beside model.sm89.engine" in error.value.hint
    for step, said in (
        ("refit_from_file", r"cannot be read from m\.onnx: no initializer of that name"),
        ("refit_cuda_engine", r"does not take the weights of m\.onnx: it misses layer\.weight"),
    ):
        with pytest.raises(UsageError, match=said):
            opened(own(FLOATS, step, stripped=400), weights=lambda: graph_file(tmp_path / "m.onnx"))


def test_tensorrt_rtx_waits_for_its_kernels_and_keeps_them_for_the_next_process(opened, tmp_path):
    first, x = own(FLOATS), np.zeros((1, 2), np.float32)
    runner = opened(first, "tensorrt-rtx")
    (config,) = [told[1] for told in first.told if told[0] == "config"]
    assert config.dynamic_shapes_kernel_specialization_strategy == "EAGER"
    assert config.cache is not None
    runner.run({"x": x})
    (file,) = (tmp_path / "cache" / "moe-export" / "kernels").iterdir()
    kept = file.read_bytes()
    runner.run({"x": x})  # nothing is compiled for a shape that was run before
    second = own(FLOATS)
    opened(second, "tensorrt-rtx")
    assert ("kernels", kept) in second.told


@pytest.mark.parametrize("step", ["create_runtime_cache", "set_runtime_cache", "serialize"])
def test_kernels_that_cannot_be_kept_are_no_error(opened, step, tmp_path):
    runner = opened(own(FLOATS, step), "tensorrt-rtx")
    assert runner.run({"x": np.zeros((1, 2), np.float32)})["y"].shape == (1, 2)
    assert not (tmp_path / "cache").exists()


def test_kernels_of_another_gpu_are_replaced(opened, tmp_path):
    opened(own(FLOATS), "tensorrt-rtx").run({"x": np.zeros((1, 2), np.float32)})
    (file,) = (tmp_path / "cache" / "moe-export" / "kernels").iterdir()
    file.write_bytes(b"kernels of another GPU")
    runner = opened(own(FLOATS), "tensorrt-rtx")
    runner.run({"x": np.zeros((1, 2), np.float32)})
    assert file.read_bytes().startswith(b"kernels of this GPU")


def test_full_tensorrt_has_no_kernels_to_keep_and_may_load_its_own_runtime(opened, tmp_path):
    product = own(FLOATS)
    opened(product).run({"x": np.zeros((1, 2), np.float32)})
    assert ("host code", True) in product.told
    assert not (tmp_path / "cache").exists()
    rtx = own(FLOATS)
    opened(rtx, "tensorrt-rtx")
    assert ("host code", False) in rtx.told


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (1,)])
@pytest.mark.parametrize("dtype", ["int4", "float4_e2m1fn", "float8_e4m3fn", "bfloat16", "bool", "int64"])
def test_every_type_goes_through_bytes(dtype, shape):
    values = (np.arange(int(np.prod(shape))) % 8 - 4).astype(np.float32).reshape(shape)
    array = values.astype(numpy_dtype(dtype))
    found = from_bytes(on_host(to_bytes(array)), dtype, shape)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found.astype(np.float32), array.astype(np.float32))


def test_inputs_that_may_not_be_written_are_copied_and_results_stay():
    """PyTorch takes no read-only array, and the inputs of cases are read-only."""
    array = np.arange(4, dtype=np.float32)
    assert np.shares_memory(to_bytes(array), array)
    array.setflags(write=False)
    assert not np.shares_memory(to_bytes(array), array)
    memory = on_host(to_bytes(array))
    found = from_bytes(memory, "float32", (4,))
    memory.zero_()
    np.testing.assert_array_equal(found, array)


def test_types_of_four_bits_are_two_to_a_byte_the_first_below():
    assert to_bytes(np.array([1, -2, 3], ml_dtypes.int4)).tolist() == [0xE1, 0x03]


def test_memory_of_the_host_is_aligned_as_tensorrt_asks():
    for count in (0, 1, 300):
        memory = host_memory(count)
        assert memory.data_ptr() % 256 == 0
        assert memory.numel() == max(count, 1)


def test_types_of_tensorrt_have_numpys_names():
    assert [dtype_of("x", name) for name in ("FP8", "INT4", "FP4", "E8M0")] == [
        "float8_e4m3fn",
        "int4",
        "float4_e2m1fn",
        "float8_e8m0fnu",
    ]
    with pytest.raises(UsageError, match="x is FP6, a type that cannot be exchanged"):
        dtype_of("x", "FP6")


def test_every_type_of_tensorrt_is_known():
    from moe_export.export.engines.module import load_module

    for name in load_module().trt.DataType.__members__:
        numpy_dtype(dtype_of("x", name))
