"""The colours of pictures of routings: literal ones, and rules that change them where a reader's scheme is dark.

Programs that are no browsers draw what is literal: the light picture. A browser follows the rules, which name colours
as they are written: `style="fill: #222222"`, `fill="#222222"`, or a text without any, which is black.
"""

from __future__ import annotations

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's colours, which people with colour blindness can tell apart; the eighth is the first again."""
INK, FAINT, PAPER = "#222222", "#9a9a9a", "#ffffff"
_DARK = {INK: "#e8ecf2", PAPER: "#12161c", FAINT: "#8b96a5", "#000000": "#e8ecf2"}


def _rules() -> str:
    changed = (
        f'[{kind}="{light}"], [style*="{kind}: {light}"] {{ {kind}: {dark} !important; }}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    text = f'text:not([fill]):not([style*="fill:"]) {{ fill: {_DARK[INK]}; }}'
    # What is drawn in pixels is blue on white: dark, it is a light blue on black.
    return "\n".join([*changed, text, "image { filter: invert(1) hue-rotate(180deg); }"])


STYLE = f"<style>@media (prefers-color-scheme: dark) {{\n{_rules()}\n}}</style>"
"""What an SVG has in front of all else that it draws."""
