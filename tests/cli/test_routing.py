"""`moe-export routing`: a picture and a table; errors that say what to do."""

from __future__ import annotations

import json
import sys

import pytest


def test_a_picture_and_a_table(command, write, texts, listing, tmp_path):
    model = write(texts["gate"], "moe.py")
    done = command("routing", model)
    assert done.code == 0
    assert "gate at " in done.out
    assert "6 tokens, 4 experts" in done.out
    assert listing(tmp_path) == ["moe.py", "moe.routing.svg"]
    (gate,) = json.loads(command("routing", model, "-o", "moe.png", "--json").out)
    assert gate["module"] == "gate"
    assert sum(gate["loads"]) == 12
    assert [len(row) for row in gate["indices"]] == [2] * 6
    assert (tmp_path / "moe.png").exists()


def test_without_matplotlib_the_table_alone(command, write, texts, listing, tmp_path, monkeypatch):
    """Who asks for a file is told that there is none."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = write(texts["gate"], "moe.py")
    done = command("routing", model)
    assert done.code == 0
    assert "6 tokens, 4 experts" in done.out
    assert "no picture: pictures need matplotlib; pip install 'moe-export[pictures]'" in done.out
    done = command("routing", model, "-o", "moe.svg")
    assert (done.code, "pictures need matplotlib" in done.err) == (4, True)
    assert listing(tmp_path) == ["moe.py"]


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("model", (), "no gate was recognised in this model"),
        ("gate", ("--gate", "router"), "no gate in module 'router'"),
        ("gate", ("-o", "moe.gif"), "a picture is a .png or a .svg file, not moe.gif"),
        ("gate", ("--capacity", "0"), "0 is not in the range x>=1"),
    ],
)
def test_what_is_refused(command, write, texts, listing, tmp_path, text, args, message):
    done = command("routing", write(texts[text], "net.py"), *args)
    assert done.code == 2
    assert message in done.err
    assert listing(tmp_path) == ["net.py"]
