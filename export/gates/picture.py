"""Draw a routing: tokens on the left, experts' slots on the right, a line for each token sent; loads as bars beside.

The picture follows the dispatch example of GShard (arXiv:2006.16668). Few tokens are drawn one by one, with the slots
that they take; more of them are points on a strip, joined to the experts by thin lines. Where lines would cover each
other, a map shows how many of which tokens each expert gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.gates.colours import COLOURS, FAINT, INK, PAPER, STYLE
from moe_export.export.gates.dispatch import Dispatch
from moe_export.own_files import MARK

FORMATS = (".png", ".svg")
FEW = 32
"""Up to this many tokens and this many experts, each token and slot is drawn on its own."""
_MOST_LINES = 600
"""Pairs of a token and an expert beyond which lines would cover each other."""
_COLUMNS = 96  # of the map; each stands for as many tokens as the others
_LABEL = 0.125  # inches from one label to the next: 7 points of text, and air
_LEFT, _RIGHT = 0.0, 1.0


def draw(dispatches: Sequence[Dispatch], path: Path, capacity: int | None = None) -> None:
    """Draw one picture, a row for each gate.

    Args:
        dispatches: One or more.
        path: Ends in `.png` or `.svg`.
        capacity: Slots of each expert; a token that finds its expert full is dropped, and its line dotted.
            Default: as many as the fullest one needs.

    Raises:
        UsageError: `path` has another suffix.
        MissingBackendError: matplotlib is not installed.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"a picture is a {' or a '.join(FORMATS)} file, not {path.name}")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingBackendError(
            "pictures need matplotlib", hint="pip install 'moe-export[pictures]'"
        ) from error
    heights = [_height(dispatch, capacity) for dispatch in dispatches]
    # Text stays text in an SVG, and the same picture is the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe-export", "font.size": 9}):
        figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(
            len(dispatches), 2, squeeze=False, width_ratios=(3, 1), height_ratios=heights, sharey="row"
        )
        for (lines, bars), dispatch in zip(rows, dispatches, strict=True):
            _draw_one(lines, bars, dispatch, capacity)
        metadata = {"Date": None, "Creator": MARK} if path.suffix == ".svg" else {"Software": MARK}
        figure.savefig(path, dpi=150, metadata=metadata)
    if path.suffix == ".svg":
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</metadata>", f"</metadata>\n{STYLE}", 1), encoding="utf-8")


def _height(dispatch: Dispatch, capacity: int | None) -> float:
    """The height of a gate's row, in inches."""
    if _is_few(dispatch):
        rows = max(len(dispatch.indices), dispatch.experts * (_slots(dispatch, capacity) + 1) / 1.4)
        return float(min(14.0, 0.8 + 0.3 * rows))
    return float(min(12.0, max(4.0, 1.0 + 0.16 * dispatch.experts)))


def _slots(dispatch: Dispatch, capacity: int | None) -> int:
    return max(1, int(dispatch.loads.max(initial=0))) if capacity is None else capacity


def _is_few(dispatch: Dispatch) -> bool:
    return len(dispatch.indices) <= FEW and dispatch.experts <= FEW


def _draw_one(lines: Any, bars: Any, dispatch: Dispatch, capacity: int | None) -> None:
    tokens, slots = len(dispatch.indices), _slots(dispatch, capacity)
    title = f"{dispatch.path}: {tokens} tokens to {dispatch.experts} experts"
    dropped = int((dispatch.slots >= slots).sum())
    lines.set_title(title + (f", {dropped} dropped" if dropped else ""), loc="left", fontsize=9)
    lines.set_xlim(-0.14, 1.3)
    lines.set_ylim(1.02, -0.02)
    lines.set_axis_off()
    middles = (np.arange(dispatch.experts) + 0.5) / dispatch.experts
    places = (np.arange(tokens) + 0.5) / max(1, tokens)
    if dispatch.indices.size > _MOST_LINES and not _is_few(dispatch):
        _draw_map(lines, dispatch)
    else:
        _draw_lines(lines, dispatch, places, middles, slots)
        if tokens <= FEW:
            _draw_tokens(lines, places)
        else:
            _draw_strip(lines, tokens)
        if _is_few(dispatch):
            _draw_slots(lines, dispatch, middles, slots)
    _draw_labels(lines, middles, _height(dispatch, capacity))
    _draw_loads(bars, dispatch, middles)


def _slot_height(dispatch: Dispatch, slots: int) -> float:
    return min(0.8 / slots, 0.4) / dispatch.experts


def _draw_lines(axes: Any, dispatch: Dispatch, places: np.ndarray, middles: np.ndarray, slots: int) -> None:
    """A line for each token sent; darker where its weight is greater, dotted where the token is dropped."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    few = _is_few(dispatch)
    weights = np.ones(dispatch.indices.shape) if dispatch.weights is None else np.abs(dispatch.weights)
    shares = weights / max(1e-9, float(weights.max(initial=0)))
    strength = 1.0 if few else max(0.06, min(0.7, 250 / max(1, dispatch.indices.size)))
    # Lines end at their slot; many lines are spread over their expert's share of the axis.
    taken, loads = dispatch.slots, dispatch.loads
    rows = np.full(dispatch.experts, slots) if few else np.maximum(1, loads)
    heights = (
        np.full(dispatch.experts, _slot_height(dispatch, slots)) if few else 0.7 / dispatch.experts / rows
    )
    segments, colours, styles = [], [], []
    for token, choice in np.ndindex(*dispatch.indices.shape):
        expert, slot = int(dispatch.indices[token, choice]), int(taken[token, choice])
        dropped = slot >= slots
        row = min(slot, int(rows[expert]) - 1)
        end = middles[expert] + heights[expert] * (row + 0.5 - rows[expert] / 2)
        segments.append([(_LEFT, places[token]), (_RIGHT, end)])
        alpha = float(strength * (0.25 + 0.75 * shares[token, choice]))
        colours.append(to_rgba(FAINT if dropped else COLOURS[expert % len(COLOURS)], alpha))
        styles.append(":" if dropped else "-")
    width = 1.3 if few else 0.5
    axes.add_collection(LineCollection(segments, colors=colours, linestyles=styles, linewidths=width))


def _draw_strip(axes: Any, tokens: int) -> None:
    axes.plot([_LEFT, _LEFT], [0, 1], color=INK, linewidth=3, solid_capstyle="butt")
    for place, number, end in ((0, 0, "top"), (1, tokens - 1, "bottom")):
        axes.text(_LEFT - 0.03, place, f"token {number}", ha="right", va=end, rotation=90, fontsize=7)


def _draw_map(axes: Any, dispatch: Dispatch) -> None:
    """A row for each expert, a column for tokens that follow each other; darker where more of them go to the expert."""
    from matplotlib.colors import LinearSegmentedColormap

    tokens, choices = dispatch.indices.shape
    columns = min(tokens, _COLUMNS)
    counts = np.zeros((dispatch.experts, columns))
    column = np.repeat(np.arange(tokens) * columns // tokens, choices)
    np.add.at(counts, (dispatch.indices.ravel(), column), 1)
    shades = LinearSegmentedColormap.from_list("load", [PAPER, COLOURS[0]])
    axes.imshow(
        counts, cmap=shades, aspect="auto", interpolation="nearest", extent=(_LEFT, _RIGHT, 1, 0), vmin=0
    )
    axes.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0], color=FAINT, linewidth=0.8)
    for place, number, side in ((_LEFT, 0, "left"), (_RIGHT, tokens - 1, "right")):
        axes.text(place, 1.004, f"token {number}", ha=side, va="top", fontsize=7)
    each = f"{-(-tokens // columns)} tokens" if tokens > columns else "a token"
    axes.text(0.5, 1.004, f"a column: {each}", ha="center", va="top", fontsize=7)


def _draw_tokens(axes: Any, places: np.ndarray) -> None:
    axes.scatter(np.full(len(places), _LEFT), places, s=30, color=INK, zorder=3)
    for number, place in enumerate(places):
        axes.text(_LEFT - 0.04, place, f"token {number}", ha="right", va="center", fontsize=7)


def _draw_slots(axes: Any, dispatch: Dispatch, middles: np.ndarray, slots: int) -> None:
    """A box for each slot, with the number of the token in it; empty ones are dashed."""
    from matplotlib.patches import Rectangle

    height, taken = _slot_height(dispatch, slots), dispatch.slots
    held = {
        (int(dispatch.indices[pair]), int(taken[pair])): pair[0]
        for pair in np.ndindex(*dispatch.indices.shape)
    }
    for expert, middle in enumerate(middles):
        for slot in range(slots):
            token, top = held.get((expert, slot)), middle + height * (slot - slots / 2)
            box = Rectangle(
                (_RIGHT, top),
                0.09,
                height,
                facecolor=PAPER,
                edgecolor=FAINT if token is None else COLOURS[expert % len(COLOURS)],
                linestyle="--" if token is None else "-",
                zorder=4 if token is not None else 2,
            )
            axes.add_patch(box)
            if token is not None:
                axes.text(
                    _RIGHT + 0.045,
                    top + height / 2,
                    str(token),
                    ha="center",
                    va="center",
                    fontsize=7,
                    zorder=5,
                )


def _draw_labels(axes: Any, middles: np.ndarray, height: float) -> None:
    """Names of the experts; of every second or fewer where they would overlap.

    Args:
        axes: Where to.
        middles: Of the experts, 0 to 1.
        height: Of the axes, in inches.
    """
    step = max(1, math.ceil(len(middles) * _LABEL / height))
    for expert in range(0, len(middles), step):
        axes.text(1.27, middles[expert], f"expert {expert}", ha="right", va="center", fontsize=7)


def _draw_loads(axes: Any, dispatch: Dispatch, middles: np.ndarray) -> None:
    loads = dispatch.loads
    colours = [COLOURS[expert % len(COLOURS)] for expert in range(dispatch.experts)]
    axes.barh(middles, loads, height=0.7 / dispatch.experts, color=colours)
    if dispatch.experts <= 64:
        for middle, load in zip(middles, loads, strict=True):
            axes.text(load, middle, f" {load}", va="center", ha="left", fontsize=7)
    axes.axvline(dispatch.indices.size / dispatch.experts, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title("load (dotted: even)", loc="left", fontsize=9)
    axes.set_xlim(0, max(1, int(loads.max(initial=0))) * 1.25)
    axes.set_yticks([])
    axes.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=7)
