"""Which rank holds which expert."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from moe_export.errors import UsageError
from moe_export.export.parallel.placement import Layer, Placement, even, place

LAYERS = (Layer("layers.0", 4, "net.py:10"), Layer("layers.1", 6, "net.py:10"))


@pytest.mark.parametrize(
    ("experts", "ranks", "placed"),
    [
        (4, 1, (0, 0, 0, 0)),
        (8, 4, (0, 0, 1, 1, 2, 2, 3, 3)),
        (6, 4, (0, 0, 1, 1, 2, 3)),
        (2, 4, (0, 1)),
        (7, 3, (0, 0, 0, 1, 1, 2, 2)),
    ],
)
def test_even(experts, ranks, placed):
    assert even(experts, ranks) == placed


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 64, 4096])
def test_an_even_placement_differs_by_one_at_most(ranks):
    placed = Counter(even(60, ranks))
    sizes = [placed[rank] for rank in range(ranks)]
    assert sum(sizes) == 60
    assert max(sizes) - min(sizes) <= 1


def test_a_list_is_for_all_layers(tmp_path):
    file = tmp_path / "placement.json"
    file.write_text("[1, 0, 1, 1]")
    assert place(LAYERS[:1], 2, file) == Placement(2, ((1, 0, 1, 1),))


def test_layers_by_number_and_by_module(tmp_path):
    file = tmp_path / "placement.json"
    file.write_text(json.dumps({"layers.1": [1] * 6}))
    assert place(LAYERS, 2, file).layers == ((0, 0, 1, 1), (1,) * 6)
    file.write_text(json.dumps({"0": [1, 1, 1, 0]}))
    found = place(LAYERS, 2, file)
    assert found.experts_of(0, 1) == (0, 1, 2)
    assert found.experts_of(0, 0) == (3,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[0, 1, 0]", "the list has 3 entries, and there are 4 experts, the experts of layer 0"),
        ("[0, 1, 2, 0]", "the list[2]: 2 is no rank"),
        ('[0, 1, "1", 0]', "the list[2]: '1' is no rank"),
        ('{"layers.7": []}', "'layers.7' is no layer of experts"),
        ('{"0": 3}', "0 has a int, and there are 4 experts"),
        ("7", "a placement is a list of ranks, or an object"),
        ("{", "is no JSON"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, text, says):
    file = tmp_path / "placement.json"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        place(LAYERS, 2, file)
    assert says in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot read the placement"):
        place(LAYERS, 2, tmp_path / "nothing.json")
