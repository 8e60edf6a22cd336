"""Each kind of picture, drawn by a program that is no browser: the colours are those that were meant."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from matplotlib.image import imread

from moe_export.export.gates.dispatch import Dispatch
from moe_export.export.gates.picture import draw
from moe_export.export.parallel.picture import draw as draw_flows
from moe_export.export.parallel.picture import flow
from moe_export.pictures.colours import LIGHT
from moe_export.pictures.picture import svg_of
from moe_export.pictures.sketch import Link, Part, Sketch

try:
    import cairosvg
except (ImportError, OSError) as error:  # the library that it loads is the system's
    pytest.skip(f"CairoSVG does not load here: {error}", allow_module_level=True)


def pixels(svg: str) -> Counter[str]:
    """How many pixels have each colour."""
    drawn = imread(io.BytesIO(cairosvg.svg2png(bytestring=svg.encode(), background_color="#ff00ff")))
    colours = (drawn[..., :3].reshape(-1, 3) * 255).round().astype(int)
    return Counter("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours)


def sketch() -> Sketch:
    kinds = ("input", "module", "loose", "experts", "recurrence", "output")
    parts = tuple(Part(kind, kind, f"a part called {kind}", (), kind, kind) for kind in kinds)
    links = tuple(Link(one, other, "batch × 8", "x") for one, other in itertools.pairwise(kinds))
    return Sketch("model.onnx", "6 nodes", parts, links, "blocks")


def test_a_graph():
    found = pixels(svg_of([sketch()]))
    assert found.most_common(1)[0][0] == LIGHT["paper"]
    for name in ("module", "loose", "io", "experts", "recurrence", "line"):
        assert found[LIGHT[name]] > 20, name
    assert found["#000000"] == found["#ff00ff"] == 0


def test_two_graphs_side_by_side():
    found = pixels(svg_of([sketch(), sketch()], [{"module": "only here"}, {"loose": "differs"}]))
    assert found.most_common(1)[0][0] == LIGHT["paper"]
    for name in ("only", "differs"):
        assert found[LIGHT[name]] > 20, name
    assert found["#000000"] == found["#ff00ff"] == 0


def test_a_routing(tmp_path):
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(4)[:2] for _ in range(6)])
    draw([Dispatch("moe", None, 4, indices)], tmp_path / "routing.svg")
    found = pixels((tmp_path / "routing.svg").read_text())
    assert found.most_common(1)[0][0] == "#ffffff"
    for colour in ("#0072b2", "#d55e00", "#009e73", "#cc79a7"):
        assert found[colour] > 20, colour


def test_rows_between_ranks():
    one = flow(("moe", "all_to_all", (0, 0, 1, 1), 2), np.array([[0, 2], [1, 3], [2, 3], [0, 1]]), 2, (8, 8))
    found = pixels(draw_flows([one]))
    assert found.most_common(1)[0][0] == "#ffffff"
    for colour in ("#0072b2", "#d55e00"):
        assert found[colour] > 20, colour
    assert found["#ff00ff"] == 0
