"""12.6 GB of weights: exported and verified in 2 to 3 GB of memory, read and written once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamed_moe
import torch

SIZES = (64, 2048, 1920, 8, 32000)
ROOM = 30 * 2**30
GB = 10**9

RUN = """
import re, sys
from pathlib import Path
from moe_export.cli import run

def moved():
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"]), int(counts["wchar"])

before = moved()
code = run(sys.argv[1:])
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
read, written = (now - then for now, then in zip(moved(), before))
print(f"\\n@ {code} {peak} {read} {written}")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The model in files."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < ROOM:
        pytest.skip(f"it needs {ROOM / 2**30:.0f} GiB of disk at {folder}")
    assert streamed_moe.write_files(folder, SIZES) > 12 * GB
    yield folder
    shutil.rmtree(folder)


def measured(*arguments):
    """Exit code, peak bytes, bytes read and bytes written, and the output of a command."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    output, _, figures = done.stdout.rpartition("@ ")
    code, peak, read, written = map(int, figures.split())
    moved = f"{read / GB:.2f} GB read, {written / GB:.2f} GB written"
    print(arguments[0], *arguments[2:], f"code {code}, {peak / GB:.2f} GB, {moved}")
    return code, peak, (read, written), output


@pytest.fixture(scope="module")
def exports(place):
    """Both ways to export, as `(code, peak, (read, written))`, and the sizes of the files of the second."""
    common = ("export", place / "model.py", "--no-gate", "--no-verify", "-q", "-o")
    referring = measured(*common, place, "--weights", "reference")[:3]
    writing = measured(*common, place / "copied")[:3]
    found = sorted(path.stat().st_size for path in (place / "copied").glob("*.data"))
    shutil.rmtree(place / "copied")
    return referring, writing, found


def test_exported(place, exports):
    referring, writing, sizes = exports
    assert (referring[0], writing[0]) == (0, 0)
    assert referring[1] < 2 * GB
    assert writing[1] < 3 * GB
    notes = " ".join(json.loads((place / "model.report.json").read_text())["graphs"][0]["notes"])
    assert "1562 tensors" in notes  # 3 * 64 * 8 of experts, 3 of each layer, the embedding and the head
    assert len(sizes) == 4  # of 4 GB at most
    assert sizes[-1] <= 4 * GB
    assert sum(sizes) > 12 * GB


def test_each_byte_is_moved_once(exports):
    """What a disk allows is one pass over the weights; seconds are for a quiet machine."""
    (*_, referring), (*_, writing), sizes = exports
    assert referring[1] < 0.5 * GB
    assert sum(sizes) <= writing[1] < 1.05 * sum(sizes)
    assert writing[0] < 1.2 * sum(sizes)  # with PyTorch's own files


def test_verified(place, exports):
    model = place / "model.py"
    verify = ("verify", place / "model.onnx", "--against", model, "--json", "-q")
    code, peak, _, output = measured(*verify)
    assert (code, json.loads(output)["verdict"]) == (0, "equal")
    assert peak < 3 * GB

    # The graph is of one file, the model of another: in the graph, one of 64 experts of layer 5 is wrong.
    other = place / "other"
    shutil.copytree(place / "weights", other / "weights")
    shutil.copy(model, other)
    shutil.copy(place / "streamed_moe.py", other)
    spoil(place / "weights/model-00006-of-00009.safetensors", "layers.5.experts.down")
    verify = ("verify", place / "model.onnx", "--against", other / "model.py", "--json", "-q")
    code, peak, _, output = measured(*verify)
    rows = {row["output"]: row["equal"] for row in json.loads(output)["outputs"]}
    assert code == 1
    assert peak < 3 * GB
    assert [name for name, equal in rows.items() if not equal] == ["layers.5"]


def test_packed_in_one_stream(place):
    """Experts in 4 bits are rounded one at a time on their way from the files of the model to that of the graph."""
    asked = ("--no-gate", "--no-verify", "-q", "--weights-dtype", "int4", "-o", place / "packed")
    code, peak, (_, written), _ = measured("export", place / "model.py", *asked)
    size = sum(path.stat().st_size for path in (place / "packed").glob("*.data"))
    shutil.rmtree(place / "packed")
    assert code == 0
    assert peak < 3 * GB
    assert 0.28 * 12 * GB < size < 0.32 * 12.6 * GB  # 4.5 bits of 16, and what is not of experts
    assert written < 1.05 * size


def spoil(path, name):
    """Give one expert of a stack the other sign, unseen: the file keeps its time."""
    state = path.stat()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        size = (end - begin) // entry["shape"][0]
        start = 8 + length + begin + 7 * size
        file.seek(start)
        part = np.frombuffer(file.read(size), np.float16)
        file.seek(start)
        file.write((-part).tobytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def published(folder: Path, width: int) -> int:
    """Write a model of two layers into a folder; the bytes of its weights."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def peak_of(folder: Path, width: int) -> tuple[int, int]:
    """Bytes of the weights, and the most that the export had in memory."""
    size = published(folder, width)
    asked = ("--decoder", "--no-gate", "--weights", "reference", "--memory", "50MB", "-q", "-o", folder)
    code, peak, *_ = measured("export", "--hf", folder, *asked)
    assert code == 0
    notes = " ".join(json.loads((folder / "model.report.json").read_text())["graphs"][0]["notes"])
    assert ("referenced where they are stored" in notes) == (size > 50 * 10**6)
    return size, peak


def test_a_decoder_of_a_folder(tmp_path):
    """PyTorch's pages of the file, and onnxruntime's copy; no copy in float64, and none of a graph on its way."""
    _, least = peak_of(tmp_path / "small", 64)
    size, peak = peak_of(tmp_path / "large", 1536)
    assert size > 300 * 10**6
    assert peak - least < 3 * size
