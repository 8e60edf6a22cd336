"""Models whose weights lie in files, from the command line: the graphs, the memory, faults that are found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import streamed_moe
import torch
from safetensors import safe_open

from moe_export.cli import run
from moe_export.errors import NotExportableError
from moe_export.export.frontend.load import load_subject

SIZES = (4, 128, 96, 2, 600)
"""Experts, hidden, inner, layers, vocabulary: no large weight is under the 64 KiB that are simply read."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in files, and its graphs: by reference, verified in blocks; copied in shards; read as a whole."""
    folder = tmp_path_factory.mktemp("stacked")
    streamed_moe.write_files(folder, SIZES)
    common = ["export", str(folder / "model.py"), "--no-gate", "-q"]
    lazy = [*common, "--memory", "1KB"]
    assert run([*lazy, "-o", str(folder), "--weights", "reference"]) == 0
    assert run([*lazy, "-o", str(folder / "copied"), "--no-verify", "--shard-size", "300KB"]) == 0
    assert run([*common, "-o", str(folder / "whole"), "--no-simplify", "--no-verify"]) == 0
    return folder


def outputs(path, ids):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids})[0]


def report(folder):
    return json.loads((folder / "model.report.json").read_text())


def test_all_ways_give_the_same_graph(place):
    ids = np.arange(21, dtype=np.int64).reshape(3, 7)
    expected = outputs(place / "whole/model.onnx", ids)
    assert np.array_equal(outputs(place / "model.onnx", ids), expected)
    assert np.array_equal(outputs(place / "copied/model.onnx", ids), expected)
    model = load_subject(str(place / "model.py")).module
    with torch.no_grad():
        right = model(torch.from_numpy(ids)).numpy()
    assert np.abs(right.astype(np.float32) - expected.astype(np.float32)).max() < 2e-2


def test_the_report_says_that_all_were_referenced_those_of_linear_layers_too(place):
    notes = report(place)["graphs"][0]["notes"]
    assert any(re.search(r"28 tensors of .* referenced where they are stored", note) for note in notes)
    assert not any("copied" in note for note in notes)


def test_references_point_into_the_files(place):
    model = onnx.load(place / "model.onnx", load_external_data=False)
    found = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert {name for name in found if name.startswith("weights/")} == {
        f"weights/model-0000{number}-of-00003.safetensors" for number in range(3)
    }


def test_copies_are_sharded(place):
    sizes = [path.stat().st_size for path in (place / "copied").glob("*.data")]
    assert len(sizes) > 3
    assert max(sizes) <= 300_000


def test_block_by_block_says_so(place):
    found = report(place)
    verification = found["graphs"][0]["verification"]
    assert found["verdict"] == "equal"
    assert [row["output"] for row in verification["outputs"]] == [
        "before layers.0", "layers.0", "layers.1", "logits",
    ]  # fmt: skip
    assert verification["candidate"] == "onnxruntime-cpu, block by block"
    assert verification["about"]["blocks"] == (
        "2 blocks and what is before and after them checked, block by block; the whole was not run at once"
    )


def test_a_fault_in_one_expert_of_one_layer_is_found_and_its_block_named(place, tmp_path, capsys):
    """The model's own file has another number in expert 2 of layer 1 than the graph."""
    streamed_moe.write_files(tmp_path, SIZES)
    spoil(tmp_path / "weights/model-00002-of-00003.safetensors", "layers.1.experts.down", expert=2)
    command = ["verify", str(place / "copied/model.onnx"), "--against", str(tmp_path / "model.py")]
    assert run([*command, "--memory", "1KB", "--json", "-q"]) == 1
    rows = {row["output"]: row["equal"] for row in json.loads(capsys.readouterr().out)["outputs"]}
    assert rows == {"before layers.0": True, "layers.0": True, "layers.1": False, "logits": True}


@pytest.mark.slow
def test_a_changed_data_file_is_refused_and_an_unnoticed_change_is_found(place, tmp_path, capsys):
    streamed_moe.write_files(tmp_path, SIZES)
    file = tmp_path / "weights/model-00001-of-00003.safetensors"
    graph = tmp_path / "model.onnx"
    arguments = [str(tmp_path / "model.py"), "--no-gate", "-q", "-o", str(tmp_path)]
    assert run(["export", *arguments, "--memory", "1KB", "--weights", "reference", "--no-verify"]) == 0
    before = file.stat()
    spoil(file, "layers.0.experts.up", expert=1)
    command = ["verify", str(graph), "--against", str(place / "model.py"), "--memory", "1KB", "--json", "-q"]
    capsys.readouterr()
    assert run(command) == 2
    assert "model-00001-of-00003.safetensors has changed since model.onnx" in capsys.readouterr().err
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(command) == 1
    rows = {row["output"]: row["equal"] for row in json.loads(capsys.readouterr().out)["outputs"]}
    assert [name for name, equal in rows.items() if not equal] == ["layers.0"]


def spoil(path, name, expert):
    """Change one expert of a stack in a safetensors file."""
    with safe_open(path, "pt") as file:
        assert name in file.keys()  # noqa: SIM118  (it is no dict)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])[name]
    size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
    start = 8 + length + entry["data_offsets"][0] + expert * size
    part = np.frombuffer(bytes(content[start : start + size]), np.float16)
    content[start : start + size] = (-part).tobytes()
    path.write_bytes(content)


@pytest.mark.slow
def test_whole_verification_of_weights_that_fit(place, tmp_path):
    """Referenced files are seen from where the graph stands while it is verified, and are not moved."""
    before = sorted(path.name for path in (place / "weights").iterdir())
    streamed_moe.write_files(tmp_path, SIZES)
    command = ["export", str(tmp_path / "model.py"), "-o", str(tmp_path), "--weights", "reference", "-q"]
    assert run([*command, "--gate", "layers.0"]) == 0
    assert report(tmp_path)["verdict"] == "equal"
    assert "blocks" not in report(tmp_path)["graphs"][0]["verification"]["about"]
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == before


@pytest.mark.slow
def test_experts_in_a_list(tmp_path):
    streamed_moe.write_files(tmp_path, SIZES, form="Listed")
    command = ["export", str(tmp_path / "model.py"), "-o", str(tmp_path / "out"), "--memory", "1KB", "-q"]
    assert run([*command, "--no-gate", "--experts", "loop"]) == 0
    found = report(tmp_path / "out")
    assert found["verdict"] == "equal"
    assert any("copied into 1 file" in note for note in found["graphs"][0]["notes"])
    model = onnx.load(tmp_path / "out/model.onnx")
    stacks = [tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 3]
    assert len(stacks) == 6  # gate, up and down of two layers
    assert {stack[0] for stack in stacks} == {4}


@pytest.mark.slow
def test_half_precision_is_a_step_of_the_recipe(tmp_path):
    streamed_moe.write_files(tmp_path, SIZES)
    text = (tmp_path / "model.py").read_text()
    (tmp_path / "model.py").write_text(text.replace(".half()", ""))  # float32, of float16 files
    command = ["export", str(tmp_path / "model.py"), "-o", str(tmp_path), "--weights", "reference", "-q"]
    assert run([*command, "--no-gate", "--memory", "1KB"]) == 0
    notes = report(tmp_path)["graphs"][0]["notes"]
    assert any("25 cast" in note and "3 cast and transposed" in note for note in notes)


LIVE = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
example_inputs = (torch.randn(4, 3, 128),)
"""


def test_a_large_live_model_is_streamed_from_its_own_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_export.export.onnx.recipes.STREAMED", 1000)
    (tmp_path / "live.py").write_text(LIVE)
    assert run(["export", str(tmp_path / "live.py"), "-o", str(tmp_path), "-q"]) == 0
    model = onnx.load(tmp_path / "live.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) == 2
    assert not any(node.op_type == "Transpose" for node in model.graph.node)


LOOP = """
import torch
from torch import nn


class Recurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(256, 256, bias=False)

    def forward(self, x):
        state, seen = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = torch.tanh(self.mix(state) + x[:, step])
            seen.append(state)
        return torch.stack(seen, 1)


with torch.device("meta"):
    model = Recurrence()
weights = "w.safetensors"
example_inputs = (torch.randn(2, 8, 256),)
"""


def test_loops_that_need_the_weights_to_be_folded_say_so(tmp_path):
    from safetensors.torch import save_file

    from moe_export.export.pipeline import Options, export_subject

    save_file({"mix.weight": torch.randn(256, 256) / 16}, tmp_path / "w.safetensors")
    (tmp_path / "model.py").write_text(LOOP)
    subject = load_subject(str(tmp_path / "model.py"), memory=1)
    (graph,) = export_subject(subject, Options())
    assert any("proved by running the model, and its weights are not in memory" in n for n in graph.notes)
    with pytest.raises(NotExportableError, match="its weights are not in memory"):
        export_subject(subject, Options(recurrence="scan"))


PEAKS = """
import re, sys
from pathlib import Path
from moe_export.cli import run

for arguments in [line.split("|") for line in sys.argv[1:]]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    code = run(arguments)
    status = Path("/proc/self/status").read_text()
    print(code, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_does_not_grow_with_the_weights(tmp_path):
    """Two more layers of 50 MB each are never in memory at once: not exported, and not verified, layer by layer.

    The first of two runs fills what a process keeps (libraries, tables of the exporter). What stays is when the 32 MB
    that files are read ahead through are in use: beside the export of large files, before that of small ones.
    """
    small, large = tmp_path / "small", tmp_path / "large"
    added = -streamed_moe.write_files(small, (16, 512, 1024, 1, 1000))
    added += streamed_moe.write_files(large, (16, 512, 1024, 3, 1000))
    assert added > 100e6

    def export(folder, *options):
        common = ["export", str(folder / "model.py"), "-o", str(folder), "-q", "--no-gate"]
        return "|".join([*common, "--memory", "1MB", *options])

    commands = [
        export(small),
        export(small),
        export(large, "--weights", "reference", "--no-verify"),
        export(large),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *commands], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [code for code, _ in found] == [0, 0, 0, 0]
    _, (_, base), (_, exported), (_, verified) = found
    room = added // 2**20 // 2  # PyTorch and onnxruntime would take all of it, or twice
    assert exported < base + room, found
    assert verified < base + room, found


def test_experts_that_were_written_as_one_are_no_blocks(tmp_path, capsys):
    """A model whose only list is one of experts has no layers to be verified by: it is one part."""
    model = Path(__file__).resolve().parents[2] / "models" / "sparse_moe.py"
    assert run([str(model), "-o", str(tmp_path), "--compare", "layers", "--quiet"]) == 0, (
        capsys.readouterr().err
    )
    report = json.loads((tmp_path / "sparse_moe.report.json").read_text(encoding="utf-8"))
    assert "it was compared in one part" in json.dumps(report)
