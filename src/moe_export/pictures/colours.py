"""The colours of a picture, light and dark: one style sheet in which every colour is written out.

Browsers follow their reader's scheme. Other programs that draw SVG (editors, converters, viewers of chats) know neither
media queries nor variables, and draw what is written outside of them: the light picture.
"""

from __future__ import annotations

from collections.abc import Mapping

LIGHT = {
    "paper": "#ffffff", "ink": "#1c2430", "soft": "#5a6675", "line": "#8792a2", "plate": "#ffffff",
    "module": "#eef3fb", "module-line": "#5b7fb8", "loose": "#f6f7f9", "loose-line": "#98a2b0",
    "io": "#e7f4ec", "io-line": "#3f8f62", "experts": "#fdf0dc", "experts-line": "#b87514",
    "recurrence": "#f3ebfb", "recurrence-line": "#8157b5", "only": "#b3261e", "differs": "#8a5a00",
}  # fmt: skip
DARK = {
    "paper": "#12161c", "ink": "#e8ecf2", "soft": "#a8b3c2", "line": "#6f7c8e", "plate": "#12161c",
    "module": "#1b2737", "module-line": "#6f9bdc", "loose": "#1b2027", "loose-line": "#6d7786",
    "io": "#16291f", "io-line": "#57b583", "experts": "#33260f", "experts-line": "#dd9c3a",
    "recurrence": "#281f37", "recurrence-line": "#ad86e0", "only": "#ff8a80", "differs": "#f0c060",
}  # fmt: skip
_COLOURED = (
    (".graph", "fill", "ink"),
    (".graph .paper", "fill", "paper"),
    (".graph .facts, .graph .key, .graph .more, .graph .shape", "fill", "soft"),
    (".graph .edge, .graph .middle", "stroke", "line"),
    (".graph .head", "fill", "line"),
    (".graph .plate", "fill", "plate"),
    *(
        rule
        for group, name in (
            ("module", "module"), ("loose", "loose"), ("input", "io"), ("output", "io"), ("experts", "experts"),
            ("recurrence", "recurrence"),
        )
        for rule in (
            (f".graph .{group} .box", "fill", name),
            (f".graph .{group} .box", "stroke", f"{name}-line"),
        )
    ),
    *(
        rule
        for mark in ("only", "differs")
        for rule in ((f".graph .{mark} .box", "stroke", mark), (f".graph .{mark} .mark", "fill", mark))
    ),
)  # fmt: skip
"""Which elements have which colour; a later rule goes before an earlier one."""
_SHAPES = """
.graph { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
.graph .name { font-size: 17px; font-weight: 600; }
.graph .facts, .graph .key { font-size: 12px; }
.graph .title { font-size: 13px; font-weight: 600; text-anchor: middle; }
.graph .more { font-size: 11px; text-anchor: middle; }
.graph .shape { font-size: 10.5px; text-anchor: middle; }
.graph .edge { fill: none; stroke-width: 1.4; }
.graph .sizes { stroke-dasharray: 3 3; opacity: .6; }
.graph .head { stroke: none; }
.graph .plate { opacity: .92; }
.graph .box { stroke-width: 1.3; }
.graph .experts .box, .graph .recurrence .box { stroke-width: 2; }
.graph .only .box { stroke-width: 2.6; stroke-dasharray: 7 4; }
.graph .differs .box { stroke-width: 2.6; }
.graph .mark { font-size: 10.5px; font-weight: 700; text-anchor: middle; }
.graph .middle { stroke-width: 1; opacity: .5; }
"""


def _rules(colours: Mapping[str, str]) -> str:
    return "\n".join(
        f"{selector} {{ {attribute}: {colours[name]}; }}" for selector, attribute, name in _COLOURED
    )


STYLE = f"{_SHAPES}{_rules(LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_rules(DARK)}\n}}\n"
