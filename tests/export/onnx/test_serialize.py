"""Whole files or none, whatever happens."""

from __future__ import annotations

import errno
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from moe_export.errors import UsageError
from moe_export.export.onnx import serialize
from moe_export.export.onnx.serialize import staging, write_model


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_appear_together_at_the_end(tmp_path):
    folder = tmp_path / "a" / "b"
    with staging(folder) as temporary:
        (temporary / "one").write_text("1")
        assert files(folder) == [temporary.name, f"{temporary.name}/one"]
    assert files(folder) == ["one"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_older_files_untouched(tmp_path, error):
    (tmp_path / "model.onnx").write_text("good")

    def write_half():
        with staging(tmp_path) as temporary:
            (temporary / "model.onnx").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert files(tmp_path) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "good"


def test_a_folder_made_for_nothing_is_unmade_with_its_parents(tmp_path):
    with pytest.raises(ValueError), staging(tmp_path / "a" / "b"):  # noqa: PT011
        raise ValueError
    assert files(tmp_path) == []


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError) as caught, staging(tmp_path / "out"):
        pass
    assert f"cannot write to {tmp_path / 'out'}: File exists" in str(caught.value)
    assert "choose another folder with -o" in str(caught.value)


def test_a_full_disk(tmp_path):
    (tmp_path / "model.onnx").write_text("good")
    with pytest.raises(UsageError, match="No space left on device"), staging(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert files(tmp_path) == ["model.onnx"]


def model_of(array):
    value = ir.Value(name="w", const_value=ir.tensor(array, name="w"), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.FLOAT)
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", value.type, value.shape
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(serialize, "_INLINE_LIMIT", 1000)
    array = np.arange(1000, dtype=np.float32)
    with staging(tmp_path) as temporary:
        write_model(model_of(array), temporary / "big.onnx")
    graph, data = files(tmp_path)
    assert graph == "big.onnx"
    assert re.fullmatch(r"big\.onnx\.[0-9a-f]{12}\.0\.data", data)
    loaded = onnx.load(tmp_path / "big.onnx")
    assert np.array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), array)


def test_small_weights_stay_inside(tmp_path):
    write_model(model_of(np.ones(4, dtype=np.float32)), tmp_path / "small.onnx")
    assert files(tmp_path) == ["small.onnx"]


def test_what_others_put_into_a_new_folder_stays(tmp_path):
    def fail():
        with staging(tmp_path / "build" / "onnx" / "fp32") as temporary:
            (temporary / "model.onnx").write_text("half")
            (tmp_path / "build" / "notes.txt").write_text("mine")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files(tmp_path) == ["build", "build/notes.txt"]


def test_two_exports_into_the_same_new_folder_of_which_the_first_fails(tmp_path):
    def first():
        with staging(tmp_path / "build" / "onnx"):
            with staging(tmp_path / "build" / "onnx") as other:
                (other / "b.onnx").write_text("b")
            raise ValueError("a")

    with pytest.raises(ValueError, match="a"):
        first()
    assert files(tmp_path) == ["build", "build/onnx", "build/onnx/b.onnx"]


def test_two_exports_into_the_same_new_folder_of_which_the_second_fails(tmp_path):
    def second():
        with staging(tmp_path / "build") as temporary:
            (temporary / "b.onnx").write_text("half")
            raise ValueError("b")

    with staging(tmp_path / "build") as first:
        with pytest.raises(ValueError, match="b"):
            second()
        (first / "a.onnx").write_text("a")
    assert files(tmp_path) == ["build", "build/a.onnx"]


def test_a_folder_that_another_export_unmakes_just_now_is_made_again(tmp_path, monkeypatch):
    makes, taken = serialize.tempfile.mkdtemp, []

    def make(*args, **options):
        if not taken:
            taken.append(True)
            (tmp_path / "build").rmdir()
        return makes(*args, **options)

    monkeypatch.setattr(serialize.tempfile, "mkdtemp", make)
    with staging(tmp_path / "build") as temporary:
        (temporary / "a.onnx").write_text("a")
    assert files(tmp_path) == ["build", "build/a.onnx"]
