"""The manifest is read as it was written, and says which field is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from moe_export.errors import UsageError
from moe_export.verify.parallel.manifest import find_manifest, read_manifest

SHOWN = {
    "schema": "moe-export/parallel/1",
    "ranks": 2,
    "exchange": "all_reduce",
    "capacity": None,
    "collectives": "runner",
    "whole": None,
    "example": None,
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 4]}],
    "dims": [{"name": "batch", "traced": 2, "minimum": 1, "maximum": None}],
    "layers": [{"module": "moe", "experts": 3, "slots": 2, "placement": [0, 0, 1]}],
    "exchanges": [
        {"kind": "all_reduce", "layer": 0, "after": 0, "back": False, "capacity": None,
         "values": [{"dtype": "float32", "shape": ["batch", 4], "bytes_per_row": 16}]}
    ],
    "graphs": [
        {"rank": rank, "experts": [[0, 1] if rank == 0 else [2]], "stages": [f"net.rank{rank}.stage0.onnx"],
         "exchanges": [{"sends": ["a"], "gives": ["s"], "counts": None, "counted": None}],
         "bytes": 100, "expert_bytes": 50, "tensors": []}
        for rank in range(2)
    ],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write the manifest, changed; empty files stand for its graphs."""

    def write(change=lambda document: None) -> Path:
        document = copy.deepcopy(SHOWN)
        change(document)
        for rank in range(2):
            (tmp_path / f"net.rank{rank}.stage0.onnx").touch()
        path = tmp_path / "net.parallel.json"
        path.write_text(json.dumps(document))
        return path

    return write


def test_it_is_read(write):
    found = read_manifest(write())
    assert (found.ranks, found.exchange, found.in_graph) == (2, "all_reduce", False)
    assert found.layers[0].placement == (0, 0, 1)
    assert found.exchanges[0].row_bytes == (16,)
    assert found.graphs[1].experts == ((2,),)
    assert str(found.inputs[0]) == "x: float32[batch, 4]"


def setter(*path):
    """Set a field of a nested document."""
    *way, last, value = path

    def change(document):
        for step in way:
            document = document[step]
        if value is None:
            del document[last]
        else:
            document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setter("schema", "other/1"), "schema is 'other/1', and this reads 'moe-export/parallel/1'"),
        (setter("ranks", "two"), "ranks is 'two', not a number of 1 or more"),
        (setter("ranks", 3), "graphs has 2 entries, and there are 3 ranks"),
        (setter("ranks", None), "ranks is missing"),
        (setter("exchange", "gossip"), "exchange is 'gossip', not all_reduce or all_to_all"),
        (setter("layers", 0, "placement", [0, 0, 2]), "layers[0].placement is not 3 numbers of ranks, 0 to 1"),
        (setter("layers", 0, "placement", [0, 0, "1"]), "layers[0].placement[2] is '1', not a number"),
        (setter("exchanges", 0, "layer", 4), "exchanges[0].layer is 4 of 1 layers"),
        (setter("exchanges", 0, "kind", None), "exchanges[0].kind is missing"),
        (setter("exchanges", 0, "values", 0, "bytes_per_row", -1), "exchanges[0].values[0].bytes_per_row is -1"),
        (setter("graphs", 1, "stages", ["gone.onnx"]), "graphs[1].stages[0] is gone.onnx, which is not there"),
        (setter("graphs", 0, "exchanges", []), "graphs[0].exchanges has 0 entries, and there are 1 exchanges"),
        (setter("graphs", 0, "exchanges", 0, "gives", []), "graphs[0].exchanges[0].gives has 0 entries"),
        (setter("inputs", 0, "shape", "all"), "inputs[0].shape is a str, not a list"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(write, change, says):
    with pytest.raises(UsageError) as error:
        read_manifest(write(change))
    assert f"net.parallel.json: {says}" in str(error.value)


def test_a_folder_has_one(write, tmp_path):
    path = write()
    assert find_manifest(tmp_path) == path
    (tmp_path / "other.parallel.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds 2 manifests: net\.parallel\.json, other"):
        find_manifest(tmp_path)


def test_what_is_no_manifest(tmp_path):
    path = tmp_path / "x.parallel.json"
    with pytest.raises(UsageError, match="cannot read"):
        read_manifest(path)
    path.write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        read_manifest(path)
    path.write_text("[]")
    with pytest.raises(UsageError, match="it is a list, not an object"):
        read_manifest(path)
