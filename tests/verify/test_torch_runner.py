import ml_dtypes
import numpy as np
import pytest
import torch

from moe_export.errors import UsageError
from moe_export.verify import TorchRunner

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_named_arrays_go_in_and_come_out():
    runner = TorchRunner(lambda t: (t["x"] + 1, t["x"].argmax(-1)), ["y", "best"])
    outputs = runner.run({"x": X})
    np.testing.assert_array_equal(outputs["y"], X + 1)
    np.testing.assert_array_equal(outputs["best"], [2, 2])
    assert (runner.name, list(outputs), outputs["best"].dtype) == ("torch", ["y", "best"], np.int64)


def test_a_single_tensor_is_one_output():
    assert TorchRunner(lambda t: t["x"].sum(), ["y"]).run({"x": X})["y"] == 15


def test_no_gradients_are_kept():
    seen = []
    weight = torch.nn.Parameter(torch.ones(3))
    TorchRunner(lambda t: seen.append(t["x"] * weight) or seen[0], ["y"]).run({"x": X})
    assert not seen[0].requires_grad


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_that_numpy_lacks_survive_the_way_in_and_out(name):
    array = np.array([[0.5, -2, 0], [1, 4, 0.25]]).astype(getattr(ml_dtypes, name))
    seen = []
    outputs = TorchRunner(lambda t: seen.append(t["x"].dtype) or t["x"], ["y"]).run({"x": array})
    assert seen == [getattr(torch, name)]
    assert outputs["y"].dtype == array.dtype
    np.testing.assert_array_equal(outputs["y"].astype(float), array.astype(float))


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int32", "bool"])
def test_numpys_own_types_survive_too(dtype):
    array = np.array([0, 1, 1]).astype(dtype)
    found = TorchRunner(lambda t: t["x"], ["y"]).run({"x": array})["y"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_empty_scalar_and_strided_arrays():
    runner = TorchRunner(lambda t: t["x"].mT if t["x"].ndim == 2 else t["x"], ["y"])
    assert runner.run({"x": np.zeros((0, 3), np.float32)})["y"].shape == (3, 0)
    assert runner.run({"x": np.float32(3).reshape(())})["y"].shape == ()
    np.testing.assert_array_equal(runner.run({"x": X.T})["y"], X)
    bits = np.zeros((0, 3), ml_dtypes.bfloat16)
    assert runner.run({"x": bits})["y"].dtype == bits.dtype


def test_a_model_that_writes_into_its_input_does_not_write_into_ours():
    x = X.copy()
    x.setflags(write=False)
    outputs = TorchRunner(lambda t: t["x"].add_(1), ["y"]).run({"x": x})
    np.testing.assert_array_equal(outputs["y"], X + 1)
    np.testing.assert_array_equal(x, X)


def test_an_output_that_is_a_buffer_is_not_changed_by_a_later_run():
    state = torch.zeros(3)
    runner = TorchRunner(lambda t: state.add_(t["x"].sum()), ["h"])
    first = runner.run({"x": X})["h"]
    runner.run({"x": X})
    np.testing.assert_array_equal(first, [15, 15, 15])


def test_floats_are_cast_and_integers_are_not():
    seen = {}
    runner = TorchRunner(
        lambda t: seen.update({n: v.dtype for n, v in t.items()}) or t["x"], ["y"], "torch-64", "float64"
    )
    assert runner.run({"x": X, "i": np.arange(2)})["y"].dtype == np.float64
    assert seen == {"x": torch.float64, "i": torch.int64}
    assert runner.name == "torch-64"


def test_wrong_numbers_and_kinds_of_outputs_are_refused():
    with pytest.raises(UsageError, match=r"torch returned 2 outputs, but the names are: y$"):
        TorchRunner(lambda t: (t["x"], t["x"]), ["y"]).run({"x": X})
    with pytest.raises(UsageError, match="output 'loss' of torch is a int, not a tensor"):
        TorchRunner(lambda t: (t["x"], 0), ["y", "loss"]).run({"x": X})


def test_what_the_model_raises_comes_through():
    def call(tensors):
        raise ValueError("length must be a multiple of 64")

    with pytest.raises(ValueError, match="a multiple of 64"):
        TorchRunner(call, ["y"]).run({"x": X})
