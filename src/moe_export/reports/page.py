"""The report of an export as one HTML page without scripts or other files, in light and dark, and for printing.

Everything that comes from a model is escaped, and pictures are described in words. Routing pictures are embedded as
`img`, so that their styles do not leak into the page; pictures of graphs are inline, so that they follow light and
dark.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isnan
from typing import Any

from moe_export.own_files import MARK
from moe_export.reports.packing import packing_of
from moe_export.reports.tables import table

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #59636e; --line: #d0d5dd; --good: #18794e;
  --bad: #b3261e; --card: #f6f7f9; --link: #1f5fae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #12161c; --faint: #a3adba; --line: #3a424d;
  --good: #4cc38a; --bad: #ff8a80; --card: #1a2028; --link: #8cb8f0; } }
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif; color: var(--ink);
  background: var(--paper); margin: 2rem auto; max-width: 68rem; padding: 0 1.2rem;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin-top: 1.6rem; }
.verdict { display: inline-block; border: 2px solid currentColor; border-radius: .5rem; padding: .1rem .7rem;
  font-weight: 700; }
.good { color: var(--good); } .bad { color: var(--bad); } .faint { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; font-size: .93rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.number + :not(.number) { padding-left: 1.2rem; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: .9em; }
pre { background: var(--card); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto; }
figure { margin: 1rem 0; } summary { cursor: pointer; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
figure img { background: var(--paper); border-radius: .5rem; max-width: min(100%, 46rem); height: auto; }
figcaption { color: var(--faint); font-size: .93rem; }
nav ul { padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; } a { color: var(--link); }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } nav { display: none; }
  figure, table, pre { break-inside: avoid; } h2, h3 { break-after: avoid; } .wide { overflow: visible; }
  details::details-content { content-visibility: visible; display: block; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } td code { overflow-wrap: anywhere; }
  figure svg { max-width: 100%; max-height: 24cm; height: auto; } }
"""


@dataclass(frozen=True)
class Picture:
    """A picture that is embedded as a document of its own.

    Attributes:
        svg: The SVG document.
        words: The text alternative.
        caption: The text below it.
    """

    svg: str
    words: str
    caption: str


@dataclass(frozen=True)
class Change:
    """The baseline export beside the exported graph.

    Attributes:
        figures: Rows of (name, before, after, difference), as text.
        operators: The same for each operator that one graph has more nodes of.
        picture: Both graphs side by side, as inline SVG.
        at: The sizes that FLOPs and bytes were counted at, as text.
    """

    figures: Sequence[tuple[str, str, str, str]]
    operators: Sequence[tuple[str, str, str, str]]
    picture: str
    at: str


@dataclass(frozen=True)
class Content:
    """The contents of the page.

    Attributes:
        document: The report of the export, as in `model.report.json`.
        costs: For each graph's file, rows of (part, nodes, FLOPs, bytes of weights, bytes of activations); or the
            reason why there are none.
        at: For each graph's file the sizes that its costs were counted at.
        graphs: For each graph's file its picture, as inline SVG.
        routings: The pictures of the gates.
        commands: The commands that reproduce the export and the comparison.
        versions: The versions of the software that made the export, by name.
        change: What the rewriting changed; the reason if there is no baseline export; None if none was asked for.
        timings: Rows of (runner, number of runs, median in milliseconds); or the reason why there are none.
        machine: The machine that the timings were measured on.
    """

    document: Mapping[str, Any]
    costs: Mapping[str, Sequence[tuple[str, int, int, int, int]] | str]
    at: Mapping[str, str]
    graphs: Mapping[str, str]
    routings: Sequence[Picture]
    commands: Sequence[str]
    versions: Mapping[str, str]
    change: Change | str | None = None
    timings: Sequence[tuple[str, int, float]] | str = ()
    machine: str = ""


_SECTIONS = (
    "Verification",
    "Packed weights",
    "Graphs",
    "Before and after",
    "Einsums",
    "Blocks",
    "Routing",
    "Cost",
    "Time",
    "Engines",
    "How to reproduce it",
)


def page(content: Content) -> str:
    """The page as an HTML document."""
    document = content.document
    title = f"{document['model']}: {document['verdict']}"
    bodies = dict(zip(_SECTIONS, _sections(content), strict=True))
    shown = {name: body for name, body in bodies.items() if body}
    links = "".join(f'<li><a href="#{_ident(name)}">{name}</a></li>' for name in shown)
    sections = "\n".join(
        f'<section aria-labelledby="{_ident(name)}"><h2 id="{_ident(name)}">{name}</h2>\n{body}\n</section>'
        for name, body in shown.items()
    )
    colour = {"equal": "good", "not equal": "bad"}.get(document["verdict"], "faint")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<!-- {MARK} -->\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} - moe-export</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n"
        f"<h1>{escape(document['model'])} as ONNX</h1>\n"
        f'<p><span class="verdict {colour}">{escape(document["verdict"])}</span> '
        f"{escape(document['source'])}, {escape(document['found_by'])}, opset {document['opset']}</p>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>\n{sections}\n</main>\n</body>\n</html>\n'
    )


def _ident(name: str) -> str:
    return name.lower().replace(" ", "-")


def _sections(content: Content) -> Iterator[str]:
    graphs = content.document["graphs"]
    yield "\n".join(line for graph in graphs for line in _verification(graph))
    yield "\n".join(line for graph in graphs for line in packing_of(graph))
    yield "\n".join(line for graph in graphs for line in _graph(graph, content.graphs))
    yield _change(content.change)
    yield _einsums([einsum for graph in graphs if graph["kind"] == "model" for einsum in graph["einsums"]])
    yield "\n".join(line for graph in graphs for line in _notes(graph))
    yield "\n".join(
        f'<figure aria-label="{escape(each.caption)}"><img alt="{escape(each.words)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(each.svg.encode("utf-8")).decode()}"><figcaption>{escape(each.caption)}</figcaption></figure>'
        for each in content.routings
    )
    yield "\n".join(_cost(file, found, content.at.get(file, "")) for file, found in content.costs.items())
    yield _time(content)
    yield _engines([engine for graph in graphs for engine in graph.get("engines", ())])
    yield _reproduce(content)


def _verification(graph: Mapping[str, Any]) -> Iterator[str]:
    found = graph["verification"]
    yield f"<h3><code>{escape(graph['file'])}</code></h3>"
    if found is None:
        yield "<p>Not compared with the model.</p>"
        return
    rows = [
        [
            f"<code>{escape(row['output'])}</code>",
            escape(row["dtype"]),
            _number(row["max_abs"]),
            _number(row["max_rel"]),
            escape(str(row["at"])),
            _verdict(row),
        ]
        for row in found["outputs"]
    ]
    sizes = dict.fromkeys(" ".join(f"{n}={s}" for n, s in case["sizes"].items()) for case in found["cases"])
    yield table(
        f"{found['candidate']} against {found['reference']}: {len(found['cases'])} cases at {len(sizes)} sizes",
        ("output", "type", "max abs", "max rel", "worst at", "verdict"),
        rows,
        numbers=(2, 3),
    )
    if found["shortfall"]:
        yield f'<p class="bad">{escape(found["shortfall"])}</p>'
    yield from (f"<p>{escape(warning)}</p>" for warning in found["warnings"])


def _verdict(row: Mapping[str, Any]) -> str:
    if row["equal"]:
        return '<span class="good">equal</span>'
    return f'<span class="bad">not equal</span>: {escape(row["reason"] or "")}'


def _number(value: Any) -> str:
    known = isinstance(value, (int, float)) and not isnan(value)  # integer outputs have no error
    return f"{value:.2g}" if known else "-"


def _graph(graph: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    file = graph["file"]
    kinds = {"model": "the whole model", "decoder": "the decoder", "step": "one step"}
    what = kinds.get(graph["kind"], f"the {graph['kind']} of {graph['module']}")
    yield f"<h3><code>{escape(file)}</code>, {escape(what)}</h3>"
    ports = [(word, name, sizes) for word in ("inputs", "outputs") for name, sizes in graph[word].items()]
    rows = [[word[:-1], f"<code>{escape(name)}</code>", escape(_sizes(sizes))] for word, name, sizes in ports]
    yield table(f"{graph['nodes']} nodes, {graph['dtype']}", ("", "name", "shape"), rows)
    if file in pictures:
        yield _figure(pictures[file], f"The graph {file}")


def _figure(picture: str, name: str) -> str:
    """A picture that may be wider than the page; `tabindex` makes it scrollable with the keyboard."""
    return f'<figure class="wide" tabindex="0" aria-label="{escape(name)}">{picture}</figure>'


def _change(change: Change | str | None) -> str:
    if change is None:
        return ""
    if isinstance(change, str):
        return f"<p>There is no baseline export to compare with: {escape(change)}</p>"
    heads = ("", "before", "after", "difference")
    what = "The baseline export (the same trace, operator by operator, not verified) and the exported graph"
    caption = f"{what}, at {change.at}" if change.at else what
    parts = [table(caption, heads, [list(map(escape, row)) for row in change.figures], numbers=(1, 2, 3))]
    if change.operators:
        rows = [[f"<code>{escape(name)}</code>", *map(escape, cells)] for name, *cells in change.operators]
        listed = table("Operators that one graph has more of", heads, rows, numbers=(1, 2, 3))
        parts.append(f"<details><summary>{len(rows)} operators differ in number</summary>{listed}</details>")
    return "\n".join([*parts, _figure(change.picture, "Before and after")])


def _sizes(sizes: Sequence[Any]) -> str:
    return " × ".join(map(str, sizes)) or "scalar"


def _einsums(einsums: Sequence[Mapping[str, Any]]) -> str:
    if not einsums:
        return ""
    rows = [
        [
            f"<code>{escape(each['equation'])}</code>",
            escape(each["became"]),
            f"<code>{escape(each['file'])}:{each['line']}</code>",
            escape(str(each["flops"])),
        ]
        for each in einsums
    ]
    return table("Each einsum, and what it became", ("equation", "became", "line", "FLOPs"), rows)


def _notes(graph: Mapping[str, Any]) -> Iterator[str]:
    if graph["notes"]:
        yield f"<h3>In <code>{escape(graph['file'])}</code></h3>"
        yield "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in graph["notes"]) + "</ul>"


def _cost(file: str, found: Sequence[tuple[str, int, int, int, int]] | str, at: str) -> str:
    if isinstance(found, str):
        return f"<p><code>{escape(file)}</code>: unknown, {escape(found)}</p>"
    rows = [[escape(part), *(f"{number:,}" for number in numbers)] for part, *numbers in found]
    return table(
        f"One run of {file} at {at or 'its sizes'}",
        ("part", "nodes", "FLOPs", "weights, bytes", "activations, bytes"),
        rows,
        numbers=(1, 2, 3, 4),
    )


def _time(content: Content) -> str:
    if isinstance(content.timings, str):
        return f"<p>{escape(content.timings)}</p>"
    if not content.timings:
        return ""
    rows = [[escape(name), str(runs), f"{median:.3g}"] for name, runs, median in content.timings]
    heads = ("", "runs", "median, ms")
    return table(f"The example inputs on {content.machine}, in one process", heads, rows, numbers=(1, 2))


def _engines(engines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"<code>{escape(each['file'])}</code>",
            escape(f"{each['module']} {each['version']}"),
            f"{each['size']:,}",
            f"{each['seconds']:.1f}",
            escape(each["status"]),
        ]
        for each in engines
    ]
    heads = ("engine", "built by", "bytes", "seconds", "status")
    return table("TensorRT engines", heads, rows, numbers=(2, 3)) if rows else ""


def _reproduce(content: Content) -> str:
    rows = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in content.versions.items()]
    lines = "\n".join(map(escape, content.commands))
    return f"<pre><code>{lines}</code></pre>\n{table('Versions', ('software', 'version'), rows)}"
