"""The SVG is well formed, says what it shows, escapes what it is given, and can be read in light and dark."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from moe_export.pictures.colours import DARK, LIGHT, STYLE
from moe_export.pictures.picture import svg_of, text_width
from moe_export.pictures.sketch import Link, Part, Sketch

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>&\"'\x00</text>"


def sketch(title: str = "model.onnx", name: str = "moe.gate") -> Sketch:
    parts = (
        Part("in", "input", "x", (), "input x", "input 0"),
        Part("a", "module", name, ("3 nodes: MatMul",), f"{name}\n1 MatMul", "a"),
        Part("b", "experts", "experts", (), "experts", "b"),
        Part("out", "output", "y", (), "output y", "output 0"),
    )
    links = (
        Link("in", "a", "batch × 8", "x: float batch × 8"),
        Link("a", "b", "4", "a"),
        Link("b", "out", "", "y", sizes=True),
    )
    return Sketch(title, "3 nodes", parts, links, "blocks")


def test_it_says_what_it_shows():
    root = ElementTree.fromstring(svg_of([sketch()]))
    assert root.attrib["role"] == "img"
    named = {root.find(f"{SVG}title").attrib["id"], root.find(f"{SVG}desc").attrib["id"]}
    assert set(root.attrib["aria-labelledby"].split()) == named
    assert root.find(f"{SVG}title").text == "model.onnx"
    assert root.find(f"{SVG}desc").text == "model.onnx: 3 nodes. From x to y."
    shown = {text.text for text in root.iter(f"{SVG}text")}
    assert {"moe.gate", "3 nodes: MatMul", "batch × 8", "input or output", "experts", "module"} <= shown
    hints = [title.text for title in root.iter(f"{SVG}title")]
    assert "x: float batch × 8" in hints
    assert "moe.gate\n1 MatMul" in hints


def test_what_it_is_given_is_text_and_nothing_else():
    text = svg_of([sketch(NASTY, NASTY)])
    root = ElementTree.fromstring(text)
    assert "<script" not in text
    assert NASTY.replace("\x00", "\ufffd") in {each.text for each in root.iter(f"{SVG}text")}


def test_it_asks_nobody_for_anything():
    text = svg_of([sketch()])
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "@import" not in text
    assert "url(" not in text


def test_side_by_side_with_marks_in_words():
    text = svg_of(
        [sketch(), sketch("other.onnx")], [{"a": "only here"}, {"b": "differs"}], head=["before", "after"]
    )
    root = ElementTree.fromstring(text)
    shown = [each.text for each in root.iter(f"{SVG}text")]
    assert {"before: model.onnx", "after: other.onnx", "only here", "differs"} <= set(shown)
    assert shown.count("experts") == 3  # two boxes and one name of the kind
    assert "moe.gate: only here." in root.find(f"{SVG}desc").text
    classes = {group.attrib.get("class") for group in root.iter(f"{SVG}g")}
    assert {"module only", "experts differs"} <= classes


def test_the_same_graph_is_the_same_file():
    assert svg_of([sketch()]) == svg_of([sketch()])


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2: 1 to 21."""

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dim = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_outlines_stand_out(scheme):
    colours = LIGHT if scheme == "light" else DARK
    fills = [colours[name] for name in ("paper", "plate", "module", "loose", "io", "experts", "recurrence")]
    for fill in fills:
        for name in ("ink", "soft", "only", "differs"):
            assert contrast(colours[name], fill) >= 4.5, (name, fill)
    for name in ("line", "module-line", "io-line", "experts-line", "recurrence-line", "only", "differs"):
        assert contrast(colours[name], colours["paper"]) >= 3, name


def test_every_colour_is_written_out_in_both_schemes():
    """Few programs but browsers know variables: to them a colour that is one is black."""
    assert "var(" not in STYLE
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    assert set(re.findall(r"#\w{6}", light)) == set(LIGHT.values())
    assert set(re.findall(r"#\w{6}", dark)) == set(DARK.values())


def test_the_width_of_text_grows_with_it():
    assert text_width("moe", 12) < text_width("moe.gate", 12) < text_width("moe.gate", 13)
    assert text_width("", 12) == 0
