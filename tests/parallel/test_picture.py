"""The picture of ranks: whose tokens go where, and the bytes; well-formed, and the same numbers as text."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from parallel_stack import STACK

from moe_export.cli import run
from moe_export.export.parallel.picture import draw, flow, lines

INDICES = np.array([[0, 1], [0, 2], [3, 0], [1, 2]])  # 4 tokens, 2 a row of the batch
PLACED = (0, 0, 1, 1)


def test_rows_between_ranks_with_tokens_of_their_own():
    found = flow(("moe", "all_to_all", PLACED, 2), INDICES, 2, (20, 16))
    assert found.tokens == (2, 2)
    assert found.rows.tolist() == [[2, 1, 1, 0], [1, 1, 1, 1]]
    assert found.between.tolist() == [[3, 1], [2, 2]]
    assert found.bytes == 3 * 36


def test_partial_sums():
    found = flow(("moe", "all_reduce", PLACED, 2), INDICES, 2, (16, 0))
    assert found.rows.tolist() == [[3, 2, 2, 1]]
    assert found.bytes == 2 * 4 * 16


def test_a_pair_of_no_expert_goes_nowhere():
    found = flow(("moe", "all_to_all", PLACED, 2), np.array([[-1], [3]]), 2, (20, 16))
    assert found.rows.sum() == 1


@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all"])
def test_the_picture_is_well_formed_and_tells_the_numbers(kind):
    found = flow(("a <b> & c", kind, PLACED, 3), INDICES, 2, (20, 16))
    tree = ElementTree.fromstring(draw([found, found]))
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert any("a <b> & c" in text for text in texts)
    assert any(f"{found.bytes} bytes in all" in text for text in texts)
    assert texts.count("expert 3") == 2
    assert "rank 1" in texts
    bands = [
        element for element in tree.iter("{http://www.w3.org/2000/svg}path") if element.get("fill") == "none"
    ]
    assert len(bands) == 2 * int((found.rows > 0).sum())
    box = [float(number) for number in tree.get("viewBox").split()]
    for element in tree.iter("{http://www.w3.org/2000/svg}rect"):
        if element.get("y"):
            assert float(element.get("y")) + float(element.get("height")) <= box[3]


def test_the_same_as_text():
    found = lines([flow(("moe", "all_to_all", PLACED, 2), INDICES, 2, (20, 16))])
    assert found == [
        "moe: 4 tokens, 4 experts, all_to_all",
        "  rank 0 has experts (rows) 0:3 1:2",
        "  rank 1 has experts (rows) 2:2 3:1",
        "  rank 0 sends 3 1 rows to ranks 0 to 1",
        "  rank 1 sends 2 2 rows to ranks 0 to 1",
        "  exchanged: 108 bytes",
    ]


@pytest.mark.slow
def test_the_command_draws_the_example(exports, tmp_path, capsys):
    path = exports.of("--expert-parallel", "4", "--exchange", "all_to_all")
    source = tmp_path / "stack.py"
    source.write_text(STACK)
    picture = tmp_path / "ranks.svg"
    assert run(["routing", str(source), "--ranks", str(path), "-o", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.count("4 ranks") + out.count("all_to_all") >= 2
    ElementTree.parse(picture)
    assert run(["routing", str(source), "--ranks", str(path), "-o", str(tmp_path / "ranks.png")]) == 2
    assert "is an .svg file" in capsys.readouterr().err
