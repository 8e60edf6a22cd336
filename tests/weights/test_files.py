"""Weights are opened without being read, whatever they are stored as; what is wrong with a file is said."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.load import load_subject
from moe_export.export.gates.dispatch import find_dispatches
from moe_export.export.weights.files import open_weights
from moe_export.export.weights.lazy import SMALL, absent_among, attach_weights, filled, lazy_weight_of
from moe_export.export.weights.zero import ZeroProducts


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "b": torch.randn(2, 5).half(),
        "c": torch.randn(7).bfloat16(),
        "d": torch.arange(6).view(2, 3),
        "e": torch.tensor(2.5),
        "f": torch.randn(4, 3).t(),
    }


def same(recipes, state):
    assert set(recipes) == set(state)
    for name, tensor in state.items():
        found = recipes[name].array()
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_safetensors(tmp_path, state):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    same(open_weights(tmp_path / "w.safetensors"), state)


def test_an_index_and_the_folder_it_is_in(tmp_path, state):
    names = list(state)
    where = {}
    for number, part in enumerate((names[:2], names[2:])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name].contiguous() for name in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    same(open_weights(index), state)
    same(open_weights(tmp_path), state)


@pytest.mark.parametrize("inner", [False, True])
def test_a_checkpoint_of_torch(tmp_path, state, inner):
    torch.save({"state_dict": state, "epoch": 3} if inner else state, tmp_path / "w.pt")
    recipes = open_weights(tmp_path / "w.pt")
    same(recipes, state)
    assert recipes["a"].byte_range().file == tmp_path / "w.pt"
    assert recipes["f"].steps() == ("transposed",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="cannot be opened as weights"):
        open_weights(tmp_path / "w.pt")


def header(entries, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"123", "no safetensors file"),
        (header({}, 2**40), "no safetensors file"),
        (struct.pack("<Q", 4) + b"{{{{", "no safetensors file"),
        (
            header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
            "is cut off: it ends before a",
        ),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}) + b"12345678", "8 bytes"),
        (header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}) + b"1", "a is X9"),
        (header({"a": {"shape": [1]}}), "does not say where a is"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, content, says):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        open_weights(tmp_path / "w.safetensors")


def test_an_index_stays_in_its_folder(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UsageError, match="lie beside it"):
        open_weights(index)


class Tied(nn.Module):
    """Large and small weights, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 128)
        self.small = nn.Linear(4, 4)
        self.head = nn.Linear(128, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.fixture
def tied(tmp_path):
    torch.manual_seed(1)
    full = Tied()
    stored = {name: tensor for name, tensor in full.state_dict().items() if name != "head.weight"}
    save_file(stored, tmp_path / "w.safetensors")
    with torch.device("meta"):
        empty = Tied()
    return full, empty, tmp_path / "w.safetensors"


def test_a_module_gets_its_weights_without_their_bytes(tied):
    full, empty, path = tied
    weights = attach_weights(empty, path, 0, path)
    assert weights.absent
    assert weights.nbytes == 300 * 128 * 4 > SMALL
    assert empty.head.weight is empty.embed.weight
    assert torch.equal(empty.small.weight, full.small.weight)  # it is small, so it is read
    assert not empty.embed.weight.any()
    assert absent_among([empty.head.weight.detach()])
    with filled([empty.head.weight.detach()]):
        assert torch.equal(empty.embed.weight, full.embed.weight)
        assert not weights.absent
    assert not empty.embed.weight.any()


def test_weights_that_fit_are_read(tied):
    full, empty, path = tied
    weights = attach_weights(empty, path, 2**30, path)
    assert not weights.absent
    assert torch.equal(empty.head.weight, full.head.weight)
    assert lazy_weight_of(empty.head.weight) is not None  # and still known by where they are stored


def test_weights_that_are_missing_or_have_another_shape(tied, tmp_path):
    _, empty, path = tied
    save_file({"small.weight": torch.ones(4, 4)}, tmp_path / "less.safetensors")
    with pytest.raises(UsageError, match=r"less.safetensors has no embed.weight and 2 more"):
        attach_weights(empty, tmp_path / "less.safetensors", 0, path)
    state = {"embed.weight": torch.ones(2, 2), "small.weight": torch.ones(4, 4), "small.bias": torch.ones(4)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"embed.weight is \[2, 2\] in other.safetensors, and \[300, 128\]"):
        attach_weights(empty, tmp_path / "other.safetensors", 0, path)


def test_products_with_absent_weights_are_zeros_of_the_right_form(tied):
    full, empty, path = tied
    attach_weights(empty, path, 0, path)
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad(), ZeroProducts():
        found = empty(ids)
    assert (found.shape, found.dtype) == (full(ids).shape, torch.float32)
    assert not found.any()


def test_biases_are_still_added(tmp_path):
    save_file({"weight": torch.ones(256, 128), "bias": torch.arange(256.0)}, tmp_path / "w.safetensors")
    with torch.device("meta"):
        layer = nn.Linear(128, 256)
    attach_weights(layer, tmp_path / "w.safetensors", 0, tmp_path)
    with torch.no_grad(), ZeroProducts():
        assert np.array_equal(layer(torch.ones(2, 128))[1].numpy(), np.arange(256.0))


def test_what_asks_for_values_is_refused_without_them(tmp_path):
    save_file({"0.weight": torch.ones(300, 128)}, tmp_path / "w0.safetensors")
    source = tmp_path / "model.py"
    source.write_text(MODEL)
    subject = load_subject(str(source), memory=0)
    with pytest.raises(UsageError, match="runs the model as a whole, and its weights are not in memory"):
        subject.call_named(subject.inputs)
    with pytest.raises(UsageError, match="not in memory"):
        find_dispatches(subject)
    assert load_subject(str(source)).call_named(subject.inputs)[0].any()


MODEL = """
import torch
from torch import nn

with torch.device("meta"):
    model = nn.Sequential(nn.Embedding(300, 128), nn.ReLU())
weights = "w0.safetensors"
example_inputs = (torch.arange(4),)
"""
