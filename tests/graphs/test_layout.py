"""Every edge leads down, nothing covers anything else, and what can be straight is straight."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.pictures.layout import Box, Edge, Placed, place


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Box], list[Edge]]:
    count = draw(st.integers(1, 12))
    boxes = [
        Box(f"b{n}", draw(st.integers(20, 160)), draw(st.integers(20, 60)), top=draw(st.booleans()))
        for n in range(count)
    ]
    pairs = draw(st.sets(st.sampled_from(list(combinations(range(count), 2)) or [(0, 0)]), max_size=20))
    edges = [
        Edge(f"b{a}", f"b{b}", wide := draw(st.sampled_from([0, 40, 90])), 14.0 if wide else 0.0)
        for a, b in sorted(pairs)
        if a != b and not boxes[b].top
    ]
    return boxes, edges


def areas(boxes: list[Box], edges: list[Edge], placed: Placed) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of every box and every label."""
    sized = [(*placed.boxes[box.key], box.width, box.height) for box in boxes]
    sized += [
        (*point, edge.width, edge.height)
        for edge, point in zip(edges, placed.labels, strict=True)
        if edge.width
    ]
    return [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in sized]


@settings(max_examples=120, deadline=None)
@given(graphs())
def test_nothing_covers_anything_and_edges_lead_down(graph):
    boxes, edges = graph
    placed = place(boxes, edges)
    near = 1e-6
    for (l1, t1, r1, b1), (l2, t2, r2, b2) in combinations(areas(boxes, edges, placed), 2):
        assert r1 <= l2 + near or r2 <= l1 + near or b1 <= t2 + near or b2 <= t1 + near
    for left, top, right, bottom in areas(boxes, edges, placed):
        assert -near <= left
        assert right <= placed.width + near
        assert -near <= top
        assert bottom <= placed.height + near
    for line in placed.lines:
        heights = [y for _, y in line]
        assert heights == sorted(heights)
    sizes = {box.key: box for box in boxes}
    for edge, line in zip(edges, placed.lines, strict=True):
        for key, (x, y), side in ((edge.source, line[0], 1), (edge.target, line[-1], -1)):
            assert abs(x - placed.boxes[key][0]) <= sizes[key].width / 2
            assert abs(y - placed.boxes[key][1] - side * sizes[key].height / 2) < near


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_a_line_passes_beside_the_boxes_between_its_ends(graph):
    boxes, edges = graph
    placed = place(boxes, edges)
    for edge, line in zip(edges, placed.lines, strict=True):
        for (x1, y1), (x2, y2) in pairwise(line[1:-1]):
            if x1 != x2:  # a curve between two layers
                continue
            for box in boxes:
                x, y = placed.boxes[box.key]
                across = abs(x1 - x) < box.width / 2 and y1 < y + box.height / 2 and y2 > y - box.height / 2
                assert not across or box.key in (edge.source, edge.target)


def test_a_chain_is_straight_and_a_long_edge_has_no_kinks():
    keys = [f"b{n}" for n in range(8)]
    boxes = [Box(key, 60 + 10 * n, 30) for n, key in enumerate(keys)]
    edges = [Edge(a, b, 40, 14) for a, b in pairwise(keys)] + [Edge("b0", "b7")]
    placed = place(boxes, edges)
    assert len({round(placed.boxes[key][0], 3) for key in keys}) == 1
    assert len({round(x, 3) for x, _ in placed.lines[-1][1:-1]}) == 1


def test_a_tangle_that_can_be_undone_is_undone():
    boxes = [Box(key, 50, 30) for key in ("a", "b", "c", "x", "y", "z")]
    edges = [Edge("a", "z"), Edge("b", "y"), Edge("c", "x")]
    placed = place(boxes, edges)
    order = [placed.boxes[key][0] for key in "abc"]
    assert [placed.boxes[key][0] for key in "zyx"] == order


def test_what_no_input_leads_to_stands_right_above_its_reader():
    boxes = [
        Box("in", 50, 30, top=True),
        *(Box(f"b{n}", 50, 30) for n in range(4)),
        Box("mask", 50, 30),
        Box("last", 50, 30),
    ]
    chain = ["in", *(f"b{n}" for n in range(4)), "last"]
    edges = [Edge(a, b) for a, b in pairwise(chain)] + [Edge("mask", "last")]
    placed = place(boxes, edges)
    assert placed.boxes["mask"][1] == placed.boxes["b3"][1]


def test_nothing_to_place():
    assert place([], []) == Placed({}, (), (), 0.0, 0.0)


def test_a_large_graph_takes_seconds():
    keys = [f"b{n}" for n in range(600)]
    edges = [Edge(a, b, 40, 14) for a, b in pairwise(keys)]
    edges += [Edge(keys[n], keys[n + 7]) for n in range(0, 590, 3)]
    assert place([Box(key, 80, 40) for key in keys], edges).height > 600 * 40
