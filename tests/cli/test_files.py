"""Nobody's file is overwritten: neither what a command reads, nor what moe-export did not write, without `--force`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import onnx
import pytest
from slow_cases import only, slow

from moe_export.own_files import kind_of

MINE = "my own words\n"


@pytest.fixture
def folder(finished, tmp_path, write, texts):
    """A model, its graph, golden tensors, a report and an equation in Python, all to be read or overwritten."""
    for name in ("block.py", "block.onnx", "block.report.json"):
        shutil.copy(finished / name, tmp_path / name)
    (tmp_path / "sums.py").write_text(
        "import torch\n\ndef f(a, b):\n    return torch.einsum('ij,jk->ik', a, b)\n"
    )
    (tmp_path / "foreign.onnx").write_bytes(foreign())
    return tmp_path


def foreign():
    """A graph that somebody else wrote, with an Einsum."""
    x, w, y = (onnx.helper.make_tensor_value_info(name, 1, [2, 2]) for name in "xwy")
    node = onnx.helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")
    graph = onnx.helper.make_graph([node], "sums", [x, w], [y])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return made.SerializeToString()


# What each option is aimed at stands at the end of its command.
VERIFY = "verify block.onnx --against block.py --no-localise"
WRITES = {
    "record": (f"{VERIFY} --record", "golden.safetensors", "tensors"),
    "report": (f"{VERIFY} -o", "report.json", "report"),
    "junit": (f"{VERIFY} -o", "report.xml", "text"),
    "html": (f"{VERIFY} -o", "page.html", "text"),
    "svg": ("view block.onnx -o", "graph.svg", "text"),
    "diff": ("diff block.onnx block.onnx -o", "both.svg", "text"),
    "rewrite": ("rewrite foreign.onnx -o", "rewritten.onnx", "graph"),
}


@pytest.mark.parametrize("name", only(["record", "report", "html", "svg", "rewrite"], WRITES))
@pytest.mark.slow_but_one
def test_a_strangers_file_stays_and_ours_is_replaced(command, folder, listing, name):
    words, file, kind = WRITES[name]
    target = folder / file
    target.write_text(MINE)
    before = listing(folder)
    done = command(*words.split(), file)
    assert done.code == 2
    assert done.err.startswith(f"error: {file} is there, and is no {kind} that moe-export wrote\n")
    assert "--force to overwrite it" in done.err
    assert done.out == ""  # said before anything is run
    assert (target.read_text(), listing(folder)) == (MINE, before)
    assert command(*words.split(), file, "--force").code == 0
    assert kind_of(target) == kind
    assert command(*words.split(), file).code == 0  # our own is replaced
    assert listing(folder) == before
    target.write_bytes(b"")  # nothing is lost
    assert command(*words.split(), file).code == 0


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("verify block.py --record", "block.py"),
        (f"{VERIFY} --record", "block.onnx"),
        slow(("verify block.onnx --against golden.safetensors --no-localise --record", "golden.safetensors")),
        ("judge own.json -o", "own.json"),
        ("rewrite block.onnx -o", "block.onnx"),
        ("rewrite foreign.onnx -o", "foreign.onnx"),
        ("rewrite sums.py -o", "sums.py"),
        ("verify link.onnx --against block.py --no-localise --record", "block.onnx"),
    ],
)
def test_no_command_overwrites_what_it_reads(command, folder, listing, words, file):
    if "golden" in words:
        assert command("verify", "block.py", "--record", "golden.safetensors").code == 0
    if "own.json" in words:
        assert command(*VERIFY.split(), "-o", "own.json").code == 0
    (folder / "link.onnx").symlink_to(folder / "block.onnx")
    content, names = (folder / file).read_bytes(), listing(folder)
    done = command(*words.split(), file)
    assert done.code == 2
    assert f"error: {file} is an input of this command" in done.err
    assert (folder / file).read_bytes() == content
    assert listing(folder) == names


def test_a_graph_of_ours_is_no_place_for_a_report(command, folder):
    """Ours is not enough: it must be of the kind that takes its place."""
    shutil.copy(folder / "block.onnx", folder / "other.onnx")
    content = (folder / "other.onnx").read_bytes()
    done = command(*VERIFY.split(), "-o", "other.onnx")
    assert (done.code, (folder / "other.onnx").read_bytes()) == (2, content)
    assert "a report is a .json, .xml or .html file, not other.onnx" in done.err


@pytest.mark.parametrize("name", [slow("net.onnx"), "net.report.json"])
def test_an_export_beside_strangers(command, write, texts, listing, tmp_path, name):
    path = write(texts["model"], "net.py")
    (tmp_path / name).write_bytes(foreign() if name.endswith("onnx") else b'{"accuracy": 0.9}')
    content, names = (tmp_path / name).read_bytes(), listing(tmp_path)
    done = command(path)
    assert done.code == 2
    assert f"{name} is there" in done.err
    assert "loading" not in done.err  # said before the work is done, not after
    assert ((tmp_path / name).read_bytes(), listing(tmp_path)) == (content, names)
    assert command(path, "--force", "--no-verify").code == 0
    assert command(path, "--no-verify").code == 0


def test_an_export_whose_gate_is_in_the_way(command, write, texts, listing, tmp_path):
    """What the names of all files are is known only when they are made; still nothing is written."""
    (tmp_path / "net.gate.onnx").write_bytes(foreign())
    done = command(write(texts["gate"], "net.py"), "--no-verify", "--no-simplify")
    assert done.code == 2
    assert "net.gate.onnx is there" in done.err
    assert listing(tmp_path) == ["net.gate.onnx", "net.py"]


def test_weights_of_others_beside_a_graph(command, folder, listing):
    """A data file has no room for a mark: it is ours if the graph, which is ours, names it."""
    model = onnx.load(folder / "foreign.onnx")
    weight = onnx.numpy_helper.from_array(__import__("numpy").ones((64, 64), "float32"), "w")
    model.graph.initializer.append(weight)
    del model.graph.input[1]
    for value in (model.graph.input[0], model.graph.output[0]):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = 64
    onnx.save(model, folder / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    (folder / "out.onnx.data").write_text(MINE)
    names = listing(folder)
    done = command("rewrite", "big.onnx", "-o", "out.onnx")
    assert done.code == 2
    assert "out.onnx.data is there" in done.err
    assert ((folder / "out.onnx.data").read_text(), listing(folder)) == (MINE, names)
    assert command("rewrite", "big.onnx", "-o", "out.onnx", "--force").code == 0
    assert command("rewrite", "big.onnx", "-o", "out.onnx").code == 0
    shutil.copy(folder / "out.onnx", folder / "in.onnx")  # reads the same data file
    data = (folder / "out.onnx.data").read_bytes()
    done = command("rewrite", "in.onnx", "-o", "out.onnx")
    assert done.code == 2
    assert "out.onnx.data is an input of this command" in done.err
    assert (folder / "out.onnx.data").read_bytes() == data


def test_python_that_is_written_again_unchanged(command, folder):
    assert command("rewrite", "sums.py", "-o", "written.py").code == 0
    text = (folder / "written.py").read_text()
    assert command("rewrite", "sums.py", "-o", "written.py").code == 0  # nothing is lost
    (folder / "written.py").write_text(f"{text}\n# mine\n")
    done = command("rewrite", "sums.py", "-o", "written.py")
    assert done.code == 2
    assert "# mine" in (folder / "written.py").read_text()
    assert command("rewrite", "sums.py", "--in-place").code == 0


def test_a_reproduction_beside_strangers(command, folder, listing):
    model = onnx.load(folder / "block.onnx")
    weight = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(weight).copy()
    values += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "wrong.onnx")
    words = ["verify", "wrong.onnx", "--against", "block.py", "--case", "example", "--repro", "fault"]
    assert command(*words).code == 1
    kinds = {path.name: kind_of(path) for path in (folder / "fault").iterdir()}
    assert set(kinds.values()) <= {"text", "graph", "arrays", "report"}, kinds
    assert {"run.py", "model.onnx", "inputs.npz", "expected.npz"} <= set(kinds)
    assert command(*words).code == 1  # ours are replaced
    (folder / "fault" / "run.py").write_text(MINE)
    done = command(*words)
    assert (done.code, done.out) == (2, "")
    assert (folder / "fault" / "run.py").read_text() == MINE
    assert command(*words, "--force").code == 1
    run = subprocess.run([sys.executable, "fault/run.py"], cwd=folder, check=False, capture_output=True)
    assert run.returncode == 1


def test_pipes_and_terminals_take_whatever_comes(command, folder):
    done = command(*VERIFY.split(), "--quiet", "-o", "/dev/null")
    assert (done.code, done.err) == (0, "")


def test_a_report_is_whole_or_not_there(command, folder, monkeypatch, listing):
    from moe_export.verify.reports import junit

    names = listing(folder)
    monkeypatch.setattr(junit, "junit", lambda reports: "\ud800")  # no UTF-8
    with pytest.raises(UnicodeEncodeError):
        command(*VERIFY.split(), "-o", "report.xml")
    assert listing(folder) == names


def test_every_file_of_an_export_is_known_as_ours(command, write, texts, tmp_path):
    """Whatever is written carries its mark, or the next export could not replace it."""
    path = write(texts["gate"], "net.py")
    assert command("report", path, "-o", "net.html", "--graphs", "out", "--no-baseline", "--quiet").code == 0
    assert command("routing", path, "-o", "out/net.svg").code == 0
    assert command("routing", path, "-o", "out/net.png").code == 0
    strangers = [file.name for file in (tmp_path / "out").iterdir() if kind_of(file) is None]
    assert strangers == []
    assert kind_of(tmp_path / "net.html") == "text"
    assert kind_of(path) is None
    for name in ("net.svg", "net.png"):
        (tmp_path / name).write_text(MINE)
        done = command("routing", path, "-o", name)
        assert (done.code, (tmp_path / name).read_text()) == (2, MINE)
    (tmp_path / "net.html").write_text(MINE)
    assert command("report", path, "-o", "net.html").code == 2
    assert json.loads((tmp_path / "out" / "net.report.json").read_text())["verdict"] == "equal"
