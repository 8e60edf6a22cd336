"""What packing weights did, on a report's page: outputs, routers, and a map of the error of each expert's weights.

```
errors of expert         0   1   2   3  ...
layers.0.up.*.weight      ▒   ░   ░   █        the darker, the further packing moved it
layers.0.down.*.weight    ░   ░   ▒   ▒
```
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from moe_export.reports.tables import table

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\[)\d+(?=\])")
"""The number of an expert in a weight's name: `experts.3.up`, `up.3`, `up[3]`. The last one: layers come before it."""
_CELL, _NAMES, _HEAD = 14, 330, 18
"""Pixels: the side of a cell, the width of the names, the height of the line above."""
_FEWEST = 4
"""Columns that the picture has room for at least: the line above is longer than one."""


def packing_of(graph: Mapping[str, Any]) -> Iterator[str]:
    """The section of a graph of a report; nothing if its weights are not packed, or it was not run."""
    found = graph.get("packing")
    if found is None:
        return
    yield f"<h3><code>{escape(graph['file'])}</code>, {escape(found['scheme'])}</h3>"
    rows = [[f"<code>{escape(name)}</code>", f"{error:.2%}"] for name, error in found["outputs"].items()]
    what = "How far packing moves outputs (root mean square, as a share of the output's own)"
    yield table(what, ("output", "error"), rows, numbers=(1,))
    if found["routers"]:
        rows = [
            [
                f"<code>{escape(router['module'])}</code>",
                str(router["tokens"]),
                str(router["flipped"]),
                f"{router['gap']:.3g}" if router["flipped"] else "",
                ", ".join(map(str, router["unused"])),
            ]
            for router in found["routers"]
        ]
        heads = ("router", "tokens", "to other experts", "largest gap of scores", "experts without tokens")
        yield table("Tokens that go to other experts", heads, rows, numbers=(1, 2, 3))
    yield f'<figure class="wide" tabindex="0" aria-label="Errors of weights">{error_map(found["weights"])}</figure>'


def error_map(weights: Mapping[str, float]) -> str:
    """A map of the errors of weights by name, as SVG: a row a weight of a module, a column an expert."""
    rows: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, error in weights.items():
        numbers = list(_NUMBER.finditer(name))
        last = numbers[-1] if numbers else None
        row = name if last is None else f"{name[: last.start()]}*{name[last.end() :]}"
        rows[row].append((0 if last is None else int(last[0]), error))
    most = max(weights.values(), default=0.0) or 1.0
    columns = 1 + max((column for cells in rows.values() for column, _ in cells), default=0)
    width, height = _NAMES + max(columns, _FEWEST) * _CELL, _HEAD + len(rows) * _CELL
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="10"'
        f' font-family="monospace"><title>The error of each packed weight, up to {most:.2%}</title>',
        f'<text x="0" y="12" fill="currentColor">errors up to {most:.2%}, expert (or layer) 0 to {columns - 1}</text>',
    ]
    for place, (row, cells) in enumerate(sorted(rows.items())):
        top = _HEAD + place * _CELL
        parts.append(f'<text x="0" y="{top + 11}" fill="currentColor">{escape(row[-52:])}</text>')
        parts += [
            f'<rect x="{_NAMES + column * _CELL}" y="{top}" width="{_CELL - 1}" height="{_CELL - 1}" fill="#b3261e"'
            f' fill-opacity="{error / most:.2f}" stroke="currentColor" stroke-width="0.2">'
            f"<title>{escape(row.replace('*', str(column)))}: {error:.2%}</title></rect>"
            for column, error in sorted(cells)
        ]
    return "".join([*parts, "</svg>"])
