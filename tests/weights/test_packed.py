"""Packed weights of a model in files: the model has what they stand for while its graph is held against it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import streamed_moe

from moe_export.export import Options, export_subject, load_subject
from moe_export.export.weights.recipe import Held, Part, Reshaped, Stacked, Stored, Transposed
from moe_export.large.packed_weights import _stored, packed_values


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4])
def test_numbers_of_4_bits_are_read_from_a_file(tmp_path, dtype):
    numbers = np.arange(15).reshape(3, 5) - (8 if dtype is ir.DataType.INT4 else 0)
    tensor = ir.tensor(numbers.astype(dtype.numpy()))
    (tmp_path / "file").write_bytes(b"...." + tensor.tobytes())
    stored = Stored(tmp_path / "file", 4, dtype, (3, 5))
    assert stored.nbytes == 8
    assert stored.array().astype(int).tolist() == numbers.tolist()
    assert stored.read(0, 1, 3).astype(int).tolist() == numbers[1:].tolist()
    assert stored.read(1, 1, 2).astype(int).tolist() == numbers[:, 1:2].tolist()


def test_an_axis_is_followed_to_where_its_weight_is_stored():
    stack = Held(lambda: np.zeros((4, 6, 8), np.float32), ir.DataType.FLOAT, (4, 6, 8))
    one = Reshaped(Part(stack, 0, 2, 3), (6, 8))
    assert list(_stored(one, 0)) == [(stack, 1, 192)]
    assert list(_stored(Transposed(one, (1, 0)), 0)) == [(stack, 2, 192)]
    assert list(_stored(Transposed(stack, (0, 2, 1)), 2)) == [(stack, 1, 768)]
    assert list(_stored(Stacked((one, one)), 1)) == [(stack, 1, 192)] * 2
    assert list(_stored(Part(stack, 1, 0, 3), 1)) == [(stack, None, 384)]  # a part of what is summed
    assert list(_stored(Reshaped(one, (48,)), 0)) == [(stack, None, 192)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A decoder of one layer of two experts, whose weights stay in files, with experts in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    streamed_moe.write_files(folder, (4, 256, 256, 1, 100))
    subject = load_subject(str(folder / "model.py"), memory=1)
    (graph,) = export_subject(subject, Options(opset=21, gates=False, weights_dtype="int4"))
    return subject, graph.quantized


def test_the_model_has_what_its_packed_weights_stand_for_and_then_its_own_again(exported):
    subject, quantized = exported
    items = subject.weights.items
    before = {name: item.recipe for name, item in items.items()}
    packed = {name for name in items if ".experts." in name}
    with packed_values(subject.weights, quantized) as replaced:
        assert replaced
        assert {name for name, item in items.items() if item.recipe is not before[name]} == packed
        for name in packed:
            own, new = (recipe.array().astype(np.float32) for recipe in (before[name], items[name].recipe))
            assert len(np.unique(new)) < new.size / 4  # a few codes, times the scales
            assert 0.05 < np.sqrt(np.square(new - own).sum() / np.square(own).sum()) < 0.12
    assert {name: item.recipe for name, item in items.items()} == before


def test_nothing_is_replaced_if_only_a_part_of_a_weight_is_packed(exported):
    subject, quantized = exported
    fewer = replace(quantized, weights=quantized.weights[1:])  # one expert of a stack stays as it is
    with packed_values(subject.weights, fewer) as replaced:
        assert not replaced
    with packed_values(None, quantized) as replaced:
        assert not replaced
