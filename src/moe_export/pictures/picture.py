"""A graph as an SVG picture of boxes and lines, light or dark as the reader prefers, without scripts or fonts.

Boxes are told apart by outline and text, not by colour alone. Every box and every line has a `<title>`, which browsers
show on hover and screen readers read out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from moe_export.own_files import MARK
from moe_export.pictures.colours import STYLE
from moe_export.pictures.layout import Box, Edge, Placed, Point, place
from moe_export.pictures.sketch import Part, Sketch

_MARGIN, _HEAD, _FOOT = 28.0, 62.0, 40.0
_TITLE, _LINE, _LABEL = 13.0, 11.0, 10.5
_LEAST = 340.0
_NARROW, _WIDE = set("iljtfr.,:;|'!()[]I/ ·"), set("mwMWOQG@%—…→")
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAMES = {
    "input": "input or output",
    "experts": "experts",
    "recurrence": "recurrence",
    "module": "module",
    "loose": "between modules",
}
_WEIGHTS = {"module": "with weights", "loose": "without"}
Marks = Mapping[str, str]


@dataclass(frozen=True)
class _Column:
    """One graph of a picture, with its layout."""

    sketch: Sketch
    placed: Placed
    marks: Marks
    width: float


def svg_of(
    sketches: Sequence[Sketch], marks: Sequence[Marks] = (), ident: str = "graph", head: Sequence[str] = ()
) -> str:
    """A picture of one graph, or of several side by side.

    Args:
        sketches: The graphs to show.
        marks: For each sketch, the marks of some of its parts, by key: `only here` or `differs`.
        ident: The prefix of the picture's ids, so that a page can hold several pictures.
        head: A word above each graph, such as `before`.

    Returns:
        An SVG document without an XML declaration, to be written as UTF-8 or put into an HTML page.
    """
    marks = marks or [{}] * len(sketches)
    columns = [_column(sketch, mark) for sketch, mark in zip(sketches, marks, strict=True)]
    legend, least = _legend(columns)
    width = max(sum(column.width for column in columns), least) + 2 * _MARGIN * len(columns)
    height = max(column.placed.height for column in columns) + _HEAD + _FOOT + 2 * _MARGIN
    title = " and ".join(sketch.title for sketch in sketches)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" aria-labelledby="{ident}-title {ident}-desc">',
        f"<!-- {MARK} -->",
        f'<title id="{ident}-title">{_text(title)}</title>',
        f'<desc id="{ident}-desc">{_text(" ".join(_description(column) for column in columns))}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{width:.0f}" height="{height:.0f}"/>',
    ]
    left = 0.0
    for number, column in enumerate(columns):
        word = f"{head[number]}: " if number < len(head) else ""
        if number:
            parts.append(f'<path class="middle" d="M{left:.1f} {_MARGIN:.0f}V{height - _MARGIN:.1f}"/>')
        parts += _draw(column, left + _MARGIN, word)
        left += column.width + 2 * _MARGIN
    parts += [f'<g transform="translate({_MARGIN:.0f} {height - _MARGIN:.0f})">', *legend, "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _column(sketch: Sketch, marks: Marks) -> _Column:
    boxes = [
        Box(part.key, *_size(part, part.key in marks), top=part.kind == "input") for part in sketch.parts
    ]
    edges = [
        Edge(
            link.source,
            link.target,
            text_width(link.label, _LABEL) + 8 if link.label else 0.0,
            14.0 if link.label else 0.0,
        )
        for link in sketch.links
    ]
    placed = place(boxes, edges)
    words = max(text_width(sketch.title, 18) + 70, text_width(sketch.subtitle, 12))
    return _Column(sketch, placed, marks, max(placed.width, words, _LEAST))


def text_width(text: str, size: float) -> float:
    """The approximate width of text in pixels; no font is available to measure it, so it is rather over-estimated."""
    ems = sum(
        0.36 if char in _NARROW else 0.9 if char in _WIDE else 0.7 if char.isupper() else 0.6 for char in text
    )
    return ems * size


def _size(part: Part, marked: bool) -> tuple[float, float]:
    widths = [1.1 * text_width(part.title, _TITLE), *(text_width(line, _LINE) for line in part.lines)]
    height = 28.0 + 15.0 * len(part.lines) + 15.0 * marked
    return max(46.0, max(widths) + 22.0, 74.0 * marked), height


def _description(column: _Column) -> str:
    inputs = ", ".join(part.title for part in column.sketch.parts if part.kind == "input")
    outputs = ", ".join(part.title for part in column.sketch.parts if part.kind == "output")
    marked = "".join(
        f" {part.title}: {column.marks[part.key]}."
        for part in column.sketch.parts
        if part.key in column.marks
    )
    return (
        f"{column.sketch.title}: {column.sketch.subtitle}. From {inputs or 'no input'} to {outputs}.{marked}"
    )


def _draw(column: _Column, left: float, word: str) -> list[str]:
    sketch, placed = column.sketch, column.placed
    parts = [
        f'<text class="name" x="{left:.1f}" y="{_MARGIN + 14:.1f}">{_text(word + sketch.title)}</text>',
        f'<text class="facts" x="{left:.1f}" y="{_MARGIN + 34:.1f}">{_text(sketch.subtitle)}</text>',
        f'<g transform="translate({left + (column.width - placed.width) / 2:.1f} {_MARGIN + _HEAD:.1f})">',
    ]
    for link, line in zip(sketch.links, placed.lines, strict=True):
        kind = "edge sizes" if link.sizes else "edge"
        parts.append(
            f'<g><title>{_text(link.about)}</title><path class="{kind}" d="{_path(line)}"/>'
            f'<path class="head" d="{_arrow(line[-1])}"/></g>'
        )
    for link, (x, y) in zip(sketch.links, placed.labels, strict=True):
        if link.label:
            wide = text_width(link.label, _LABEL)
            parts.append(
                f'<rect class="plate" x="{x - wide / 2:.1f}" y="{y - 7:.1f}" width="{wide:.1f}" height="14" rx="3"/>'
                f'<text class="shape" x="{x:.1f}" y="{y + 3.6:.1f}">{_text(link.label)}</text>'
            )
    for part in sketch.parts:
        parts.append(_box(part, placed.boxes[part.key], column.marks.get(part.key, "")))
    return [*parts, "</g>"]


def _path(line: Sequence[Point]) -> str:
    """An SVG path through the points of a line, vertical at every point."""
    (x, y), *rest = line
    steps = [f"M{x:.1f} {y:.1f}"]
    for to, below in rest:
        if abs(to - x) < 0.5:
            steps.append(f"L{to:.1f} {below:.1f}")
        else:
            middle = (y + below) / 2
            steps.append(f"C{x:.1f} {middle:.1f} {to:.1f} {middle:.1f} {to:.1f} {below:.1f}")
        x, y = to, below
    return "".join(steps)


def _arrow(tip: Point) -> str:
    x, y = tip
    return f"M{x:.1f} {y:.1f}l-3.6 -7h7.2z"


def _box(part: Part, centre: Point, mark: str) -> str:
    x, y = centre
    width, height = _size(part, bool(mark))
    kind = f"{part.kind} {_class(mark)}".strip()
    round_ = height / 2 if part.kind in ("input", "output") else 7
    about = f"{part.about}\n{mark}" if mark else part.about
    lines = [
        f'<g class="{kind}"><title>{_text(about)}</title>'
        f'<rect class="box" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="{round_:.0f}"/>'
    ]
    base = y - height / 2 + 18.5
    lines.append(f'<text class="title" x="{x:.1f}" y="{base:.1f}">{_text(part.title)}</text>')
    for line in part.lines:
        base += 15
        lines.append(f'<text class="more" x="{x:.1f}" y="{base:.1f}">{_text(line)}</text>')
    if mark:
        lines.append(f'<text class="mark" x="{x:.1f}" y="{base + 15:.1f}">{_text(mark)}</text>')
    return "".join([*lines, "</g>"])


def _class(mark: str) -> str:
    return mark.partition(" ")[0]


def _legend(columns: Sequence[_Column]) -> tuple[list[str], float]:
    """A legend of the kinds of boxes in the picture, as SVG, and its width in pixels."""
    kinds = [
        "input" if part.kind == "output" else part.kind for each in columns for part in each.sketch.parts
    ]
    names = _NAMES | (_WEIGHTS if all(each.sketch.level == "nodes" for each in columns) else {})
    parts, x = [], 0.0
    for kind in [kind for kind in _NAMES if kind in kinds]:
        parts.append(
            f'<g class="{kind}"><rect class="box" x="{x:.1f}" y="-11" width="18" height="13" '
            f'rx="{6.5 if kind == "input" else 3}"/><text class="key" x="{x + 24:.1f}">{_text(names[kind])}</text></g>'
        )
        x += 24 + text_width(names[kind], 12) + 14
    return parts, x - 14


def _text(text: str) -> str:
    """Text escaped for XML, with characters that XML does not allow replaced by U+FFFD."""
    return escape(_NO_XML.sub("\ufffd", text))
