"""Weights that were quantized before and are floats again are packed as they were: bit for bit, and no larger."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir import tensor_adapters
from quantized_layouts import LAYOUTS, mxfp4
from safetensors.torch import save_file

from moe_export.export.quantize.earlier_grid import exact_scales, steps
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.rounding import fitted
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.weights.files import open_weights
from moe_export.export.weights.layouts import quantized_weights
from moe_export.verify import OnnxRuntimeRunner

OWN = [layout for layout in LAYOUTS if layout()[2]]
NARROW = [(layout, torch.float16) for layout in OWN if layout()[1].dtype is torch.float16]
NARROW += [(layout, torch.bfloat16) for layout in OWN if "float8" in layout()[2]]  # as such models are used
NARROW += [(mxfp4, torch.bfloat16)]


def scheme_of(options):
    words = options.split()
    block = int(words[words.index("--block-size") + 1]) if "--block-size" in words else None
    return Scheme.of(words[1], block, zero_points="--zero-points" in words)


def product(weight):
    """A graph of one product with a weight (K, N)."""
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[n, k] x, float[k, n] w) => (float[n, n2] y) { y = MatMul(x, w) }"""
    model = ir.from_onnx_text(text)
    x, value = model.graph.inputs
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(weight, name="w")
    value.shape, value.type = ir.Shape(weight.shape), ir.TensorType(value.const_value.dtype)
    for each in (x, model.graph.outputs[0]):
        each.shape, each.type = ir.Shape([None, None]), value.type
    model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize(("layout", "dtype"), [*((layout, torch.float32) for layout in OWN), *NARROW])
def test_each_layout_is_kept_as_it_is(tmp_path, layout, dtype):
    """In float32, as read from a file, and in the type that its library computes in: every bit, and no more bytes."""
    tensors, w, options = layout()
    if dtype is torch.float32:
        save_file(tensors, tmp_path / "model.safetensors")
        (stored,) = quantized_weights(open_weights(tmp_path), tmp_path).values()
        w = torch.from_numpy(stored.recipe.array())
    w = w[0].T if w.dim() == 3 else w  # one expert of a stack
    weight = tensor_adapters.TorchTensor(w.to(dtype).T.contiguous()).numpy()
    scheme = scheme_of(options)
    found = quantize(product(weight), scheme, "linear")
    held = {
        name.rpartition(".")[2]: value.const_value for name, value in found.model.graph.initializers.items()
    }
    codes, scales = held[scheme.packing].numpy().astype(np.float32), held["scale"].numpy()
    block = scheme.block or len(weight)

    def spread(array):
        return np.repeat(array.astype(np.float32).reshape(-1, codes.shape[1]), block, 0)[: len(codes)]

    values = (codes - (spread(held["zero"].numpy()) if scheme.zero_points else 0)) * spread(scales)
    assert (values.astype(weight.dtype) == weight).all()
    assert held[scheme.packing].nbytes == weight.size * (0.5 if scheme.packing == "int4" else 1)
    assert scales.size == -(-len(weight) // block) * weight.shape[1]
    assert found.weights[0].grid.errors()[0][0] == 0
    if dtype is torch.float32:
        one = np.eye(len(weight), dtype=np.float32)
        got = OnnxRuntimeRunner(ir.to_proto(found.model).SerializeToString()).run({"x": one})
        assert (got["y"] == weight).all()


def test_what_is_no_grid_is_not_taken_for_one():
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    for scheme in (Scheme.of("int4", 32), Scheme.of("int8", None), Scheme.of("float8e4m3", 128)):
        assert fitted(weight, 0, scheme).exact == 0


def test_a_step_is_the_greatest_that_all_values_are_multiples_of():
    values = np.array([[6, 10, 15, 0], [4, 8, -12, 6]], np.float32)  # two outputs; no two differ by one step
    found = steps(values.T[None] * np.float32(0.37), 40)
    np.testing.assert_allclose(found, [[0.37, 0.74]], rtol=1e-5)


def test_a_scale_is_found_to_the_last_bit():
    generator = np.random.default_rng(1)
    codes = generator.integers(-7, 8, (1, 32, 500)).astype(np.float32)
    scale = generator.uniform(1e-3, 1, (1, 500)).astype(np.float32)
    near = scale * np.float32(1 + 3e-7)
    kind = np.dtype(np.float32)
    found, exact = exact_scales(codes * scale[:, None], codes, near, kind, kind)
    assert exact.all()
    assert (found[:, None] * codes == scale[:, None] * codes).all()
    _, exact = exact_scales(codes * scale[:, None] + 1e-3, codes, near, kind, kind)
    assert not exact.any()


@pytest.mark.parametrize(
    ("dtype", "options", "least"),
    [
        (np.float32, "int4 --block-size 32 --zero-points", 1),
        (np.float32, "int8 --block-size 32 --zero-points", 1),
        (np.float32, "int8 --block-size 128", 1),
        (np.float16, "int4 --block-size 32", 1),
        (np.float16, "int8 --block-size 32 --zero-points", 1),
        (np.float16, "int8", 1),
        (ml_dtypes.bfloat16, "int4 --block-size 32", 1),
        (ml_dtypes.bfloat16, "int4 --block-size 32 --zero-points", 1),
        (ml_dtypes.bfloat16, "int8", 1),
        (ml_dtypes.bfloat16, "int8 --zero-points", 0.94),
        (ml_dtypes.bfloat16, "int8 --block-size 32", 0.97),
        (ml_dtypes.bfloat16, "int8 --block-size 32 --zero-points", 0.88),
    ],
)
def test_how_many_blocks_come_back(dtype, options, least):
    """Codes as rounding with an error feedback leaves them: the extremes of a block are any."""
    generator = np.random.default_rng(0)
    scheme = scheme_of(f"--weights-dtype {options}")
    (low, high), block = scheme.bounds, scheme.block or 512
    weight = generator.standard_normal((512 // block, block, 128)).astype(np.float32)
    span = (weight.max(1) - weight.min(1)) if scheme.zero_points else 2 * np.abs(weight).max(1)
    scale = span / (high - low) * generator.uniform(0.6, 1, span.shape)
    scale = scale.astype(dtype).astype(np.float32)[:, None]
    zero = np.clip(np.rint(-weight.min(1, keepdims=True) / scale), low, high) if scheme.zero_points else 0
    codes = np.rint(weight / scale) + zero + generator.integers(-1, 2, weight.shape)
    weight = ((np.clip(codes, low, high) - zero) * scale).reshape(512, 128).astype(dtype)
    found = fitted(weight, 0, scheme)
    assert found.exact >= least * found.count
