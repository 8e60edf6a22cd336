"""Weights are written as a stream or referenced; a graph never stands beside another's data, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from moe_export.disk import PAGE
from moe_export.errors import UsageError
from moe_export.export.onnx.external_weights import Storage, Streamed, data_facts, stream_weights
from moe_export.export.onnx.serialize import rename_model, staging, write_model
from moe_export.export.weights.recipe import RecipeTensor, Stored, Transposed
from moe_export.external_data import check_external_data


def graph_of(recipes):
    """A model that returns its weights."""
    values, nodes = [], []
    for name, recipe in recipes.items():
        value = ir.Value(
            name=name,
            shape=ir.Shape(recipe.shape),
            type=ir.TensorType(recipe.dtype),
            const_value=RecipeTensor(recipe, name),
        )
        node = ir.node("Identity", [value])
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{name}_out", value.type, value.shape
        values.append(value)
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


@pytest.fixture
def weights(tmp_path):
    """A file of three tensors, their recipes (one of them turned), and the arrays."""
    arrays = [np.arange(20000, dtype=np.float32).reshape(100, 200) + number for number in range(3)]
    file = tmp_path / "out" / "w.bin"
    file.parent.mkdir()
    file.write_bytes(b"".join(array.tobytes() for array in arrays))
    stored = [Stored(file, 80000 * number, ir.DataType.FLOAT, (100, 200)) for number in range(3)]
    recipes = {"a": stored[0], "b": Transposed(stored[1], (1, 0)), "c": stored[2]}
    return file.parent, recipes, {"a": arrays[0], "b": arrays[1].T, "c": arrays[2]}


def write(folder, recipes, **storage):
    model = graph_of(recipes)
    with staging(folder) as temporary:
        found = stream_weights(model, temporary / "m.onnx", Storage(folder=folder, **storage))
        model.metadata_props.update({f"moe_export.{key}": text for key, text in data_facts(model).items()})
        write_model(model, temporary / "m.onnx", Storage(folder=folder))
    return found


def loaded(folder, name="m.onnx"):
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(folder / name).graph.initializer
    }


def places(folder):
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
    }


def test_copied(weights):
    folder, recipes, arrays = weights
    found = write(folder, recipes)
    assert found.copied == (3, 240000)
    assert all(np.array_equal(array, arrays[name]) for name, array in loaded(folder).items())
    assert all(int(place["offset"]) % PAGE == 0 for place in places(folder).values())


def test_referenced_where_used_as_stored(weights):
    folder, recipes, arrays = weights
    found = write(folder, recipes, mode="reference")
    assert (found.referenced, found.copied, found.reasons) == ((2, 160000), (1, 80000), {"transposed": 1})
    assert found.notes("reference")[1].endswith("(1 transposed)")
    assert all(np.array_equal(array, arrays[name]) for name, array in loaded(folder).items())
    assert places(folder)["c"] == {"location": "w.bin", "offset": "160000", "length": "80000"}


def products(weights, readers):
    """`readers`: for each node its operator, and its inputs: `x` (3, 200), or a weight of `weights`."""
    recipes = {"w": Transposed(weights[1]["a"], (1, 0)), "v": Transposed(weights[1]["c"], (1, 0))}
    inputs = {
        name: ir.Value(name=name, shape=ir.Shape(recipe.shape), type=ir.TensorType(recipe.dtype))
        for name, recipe in recipes.items()
    }
    for name, recipe in recipes.items():
        inputs[name].const_value = RecipeTensor(recipe, name)
    kind = ir.TensorType(ir.DataType.FLOAT)
    inputs["x"] = ir.Value(name="x", shape=ir.Shape([3, 200]), type=kind)
    nodes = [ir.node(operator, [inputs[name] for name in names]) for operator, *names in readers]
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"y{number}", kind
    used = {name for _, *names in readers for name in names}
    held = [inputs[name] for name in ("w", "v") if name in used]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([inputs["x"]], outputs, nodes=nodes, initializers=held, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


READERS = {
    "a product": ([("MatMul", "x", "w")], 1),
    "Gemm": ([("Gemm", "x", "w")], 1),
    "two products with one": ([("MatMul", "x", "w"), ("MatMul", "x", "w")], 1),
    "two with two": ([("MatMul", "x", "w"), ("MatMul", "x", "v")], 2),
    "its elements": ([("MatMul", "x", "w"), ("Identity", "w")], 0),
    "from the left": ([("MatMul", "w", "x")], 0),
    "one of two": ([("MatMul", "x", "w"), ("Identity", "v")], 1),
}


@pytest.mark.parametrize("case", READERS)
def test_what_a_product_takes_turned_stays_in_its_file(weights, case):
    """What is read in another way, too, is copied; either way the numbers are those of the weights."""
    folder, _, arrays = weights
    readers, referenced = READERS[case]
    arrays = {"w": arrays["a"].T, "v": arrays["c"].T}
    x = np.random.default_rng(0).standard_normal((3, 200), np.float32)
    model = products(weights, readers)
    if case == "from the left":
        x = x[:, :100]
        model.graph.inputs[0].shape = ir.Shape([100, 3])
        x = np.ascontiguousarray(x.T)
    with staging(folder) as temporary:
        found = stream_weights(model, temporary / "m.onnx", Storage(mode="reference", folder=folder))
        model.metadata_props.update({f"moe_export.{key}": text for key, text in data_facts(model).items()})
        write_model(model, temporary / "m.onnx", Storage(folder=folder))
    assert found.referenced == (referenced, 80000 * referenced)
    session = onnxruntime.InferenceSession(str(folder / "m.onnx"), providers=["CPUExecutionProvider"])
    known = {"x": x, **arrays}
    for (operator, *names), result in zip(readers, session.run(None, {"x": x}), strict=True):
        given = [known[name] for name in names]
        expected = given[0] if operator == "Identity" else given[0].astype(float) @ given[1].astype(float)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-1)


def test_files_of_another_folder_are_copied_with_the_reason(weights, tmp_path):
    folder, recipes, arrays = weights
    found = write(tmp_path / "elsewhere", recipes, mode="reference")
    assert found.referenced == (0, 0)
    assert found.reasons["outside the output folder, where no engine reads"] == 2
    link = folder / "link.bin"
    link.symlink_to("w.bin")
    linked = {"a": Stored(link, 0, ir.DataType.FLOAT, (100, 200))}
    assert (
        "behind a link, which onnxruntime does not follow" in write(folder, linked, mode="reference").reasons
    )
    assert np.array_equal(loaded(folder)["a"], arrays["a"])


def test_shards(weights):
    folder, recipes, arrays = weights
    found = write(folder, recipes, shard=170000)
    assert len(found.files) == 2
    assert all((folder / name).stat().st_size <= 170000 for name in found.files)
    assert all(np.array_equal(array, arrays[name]) for name, array in loaded(folder).items())
    assert len(write(folder, recipes, shard=10).files) == 3  # a tensor is never cut
    assert len(list(folder.glob("*.data"))) == 3  # those of the first graph are gone


def test_the_same_weights_make_the_same_files(weights):
    folder, recipes, _ = weights
    write(folder, recipes)
    first = {path.name: path.read_bytes() for path in folder.glob("m.onnx*.data")}
    write(folder, recipes)
    assert {path.name: path.read_bytes() for path in folder.glob("m.onnx*.data")} == first


def test_data_that_another_graph_names_stays(weights):
    folder, recipes, arrays = weights
    write(folder, recipes)
    (folder / "kept.onnx").write_bytes((folder / "m.onnx").read_bytes())
    write(folder, {"a": recipes["a"]})
    assert all(np.array_equal(array, arrays[name]) for name, array in loaded(folder, "kept.onnx").items())


def test_a_graph_is_renamed_with_its_data(weights):
    folder, recipes, arrays = weights
    write(folder, recipes)
    rename_model(folder / "m.onnx", "m.rejected.onnx")
    check_external_data(folder / "m.rejected.onnx")
    assert not list(folder.glob("m.onnx*"))
    found = loaded(folder, "m.rejected.onnx")
    assert all(np.array_equal(array, arrays[name]) for name, array in found.items())


def change(file, where=100):
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("mode", ["copy", "reference"])
def test_changed_files_are_refused(weights, mode):
    folder, recipes, _ = weights
    write(folder, recipes, mode=mode)
    file = next(folder.glob("*.data")) if mode == "copy" else folder / "w.bin"
    check_external_data(folder / "m.onnx")
    os.utime(file)  # another time, the same content: read once, and right
    check_external_data(folder / "m.onnx")
    change(file)
    with pytest.raises(UsageError, match=f"{file.name} has changed since m.onnx was written"):
        check_external_data(folder / "m.onnx")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match="is cut off"):
        check_external_data(folder / "m.onnx")
    file.unlink()
    with pytest.raises(UsageError, match="which is not there"):
        check_external_data(folder / "m.onnx")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin", "link.bin"])
def test_paths_that_leave_the_folder_are_refused(weights, location):
    folder, recipes, _ = weights
    write(folder, recipes)
    (folder.parent / "secret.bin").write_bytes(b"x" * 240000)
    (folder / "link.bin").symlink_to("../secret.bin")
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
    onnx.save(model, folder / "bad.onnx")
    with pytest.raises(UsageError, match="outside its folder"):
        check_external_data(folder / "bad.onnx")


def test_too_little_room_is_said_before_anything_is_written(weights, monkeypatch):
    folder, recipes, _ = weights
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Free)
    with pytest.raises(UsageError, match=r"the weights take 0.0 GiB, and 0.0 GiB are free"):
        write(folder, recipes)


class _Free:
    free = 1000


WRITER = """
import resource
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_writing import *
folder = Path({folder!r})
number = int(sys.argv[1])
stored = {{name: Stored(folder / f"source{{number}}.bin", 0, ir.DataType.FLOAT, (2000, 2000)) for name in "ab"}}
recipes = {{"a": stored["a"], "b": Transposed(stored["b"], (1, 0))}}
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
print("ready", flush=True)
write(folder, recipes)
"""


@pytest.fixture
def writer(tmp_path):
    """A script that writes a graph of one of two sources; each has one value throughout."""
    folder = tmp_path / "out"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"source{number}.bin").write_bytes(np.full(4 * 10**6, number, np.float32).tobytes())
    script = tmp_path / "writer.py"
    script.write_text(WRITER.format(here=str(Path(__file__).parent), folder=str(folder)))
    return script, folder


def consistent(folder):
    """The number that all weights of the graph have; None if there is no graph."""
    if not (folder / "m.onnx").exists():
        return None
    check_external_data(folder / "m.onnx")
    found = {float(number) for array in loaded(folder).values() for number in np.unique(array)}
    assert len(found) == 1
    return found.pop()


def killed_at(script, number, seconds):
    process = subprocess.Popen([sys.executable, script, str(number)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_killed_at_any_moment(writer):
    script, folder = writer
    before = None
    for turn in range(24):
        killed_at(script, 1 + turn % 2, 0.004 * turn)
        now = consistent(folder)
        assert now in {before, 1.0 + turn % 2}
        before = now
    subprocess.run([sys.executable, script, "1"], check=True)
    assert consistent(folder) == 1.0
    left = sorted(path.name for path in folder.iterdir() if not path.name.startswith("source"))
    assert len(left) == 2, left  # the graph and its data; nothing of the runs that were killed


def test_what_a_killed_run_left_is_taken_away_and_what_a_living_one_has_is_not(tmp_path):
    dead, others = tmp_path / ".moe-export-unfinished-a1b2c3d4", tmp_path / ".moe-export-notes"
    for folder in (dead, others):
        folder.mkdir()
        (folder / "half").write_text("")
    with staging(tmp_path) as mine:
        assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, mine.name]
        with staging(tmp_path) as other:
            (other / "b").write_text("2")
        (mine / "a").write_text("1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "a", "b"]


def test_a_disk_that_is_full_on_the_way(writer):
    """The limit on the size of a file stands for a full disk: writing fails in the middle of the data."""
    script, folder = writer
    subprocess.run([sys.executable, script, "1"], check=True)
    done = subprocess.run(
        [sys.executable, script, "2", str(25 * 10**6)], capture_output=True, text=True, check=False
    )
    assert "cannot write to" in done.stderr
    assert "File too large" in done.stderr
    assert consistent(folder) == 1.0
    assert len(list(folder.iterdir())) == 4


def test_an_old_report_goes_before_new_graphs_come(tmp_path, monkeypatch):
    (tmp_path / "m.report.json").write_text('{"schema": "moe-export/export-report/1"}')

    def stop(source, target):
        raise KeyboardInterrupt

    def move():
        with staging(tmp_path) as temporary:
            (temporary / "m.report.json").write_text('{"schema": "moe-export/export-report/1", "n": 1}')
            (temporary / "m.onnx").write_text("new")
            monkeypatch.setattr("os.replace", stop)

    with pytest.raises(KeyboardInterrupt):
        move()
    assert list(tmp_path.iterdir()) == []


def test_weights_that_came_as_tensors_are_not_referenced_and_it_is_said():
    nothing = Streamed((0, 0), (0, 0))
    assert nothing.notes("copy") == ()
    assert nothing.notes("reference") == (
        "weights: none is referenced, because they came as tensors and not in files",
    )
