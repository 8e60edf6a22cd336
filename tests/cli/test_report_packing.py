"""The section on packed weights of a report's page."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from moe_export.reports.packing import error_map, packing_of

WEIGHTS = {
    "layers.0.up.0.weight": 0.02,
    "layers.0.up.2.weight": 0.08,
    "layers.0.down[1]": 0.04,
    "head.weight": 0.01,
}
GRAPH = {
    "file": "model.onnx",
    "packing": {
        "scheme": "int4, blocks of 32",
        "outputs": {"<out>": 0.0312},
        "routers": [
            {"module": "layers.0", "tokens": 40, "flipped": 2, "gap": 0.0123, "unused": [3, 5]},
            {"module": "layers.1", "tokens": 40, "flipped": 0, "gap": 0.0, "unused": []},
        ],
        "weights": WEIGHTS,
    },
}


def test_a_graph_without_packed_weights_has_no_section():
    assert list(packing_of({"file": "model.onnx"})) == []


def test_the_section_says_what_packing_did():
    text = "\n".join(packing_of(GRAPH))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    assert cells[:2] == ["<code>&lt;out&gt;</code>", "3.12%"]
    assert cells[2:7] == ["<code>layers.0</code>", "40", "2", "0.0123", "3, 5"]
    assert cells[7:] == ["<code>layers.1</code>", "40", "0", "", ""]


def test_the_map_has_a_row_a_weight_and_a_column_an_expert():
    root = ET.fromstring(error_map(WEIGHTS))
    cells = {cell[0].text: cell.attrib for cell in root.iter("rect")}
    assert list(cells) == [
        "head.weight: 1.00%",
        "layers.0.down[1]: 4.00%",
        "layers.0.up.0.weight: 2.00%",
        "layers.0.up.2.weight: 8.00%",
    ]
    assert [cell["fill-opacity"] for cell in cells.values()] == ["0.12", "0.50", "0.25", "1.00"]
    assert cells["layers.0.up.2.weight: 8.00%"]["y"] == cells["layers.0.up.0.weight: 2.00%"]["y"]
    names = [text.text for text in root.iter("text")]
    assert names[1:] == ["head.weight", "layers.0.down[*]", "layers.0.up.*.weight"]
