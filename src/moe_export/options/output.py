"""Options that say where results go, and how much of them is printed."""

from __future__ import annotations

from moe_export.options.option import COMMANDS, Option

_GROUP = "Output"
_REPORTING = ("verify", "judge")
_WRITING = ("export", "verify", "judge", "rewrite", "routing", "build", "view", "diff", "report")

# fmt: off
PLACES = (
    Option("output", "-o/--output", _GROUP, "Where the files go.", ("export",), default=".", metavar="FOLDER",
           first=True),
    Option("output", "-o/--output", _GROUP, "Where the page goes.", ("report",), otherwise="MODEL.report.html",
           metavar="FILE.html", first=True),
    Option("graphs", "--graphs", _GROUP, "Keep the graphs, and the report as JSON, here.", ("report",),
           metavar="FOLDER"),
    Option("baseline", "--no-baseline", _GROUP, "Leave out the graph as it is without any rewriting.",
           ("report",), type=bool),
    Option("output", "-o/--output", _GROUP, "Where the rewritten file goes.", ("rewrite",), metavar="FILE"),
    Option("output", "-o/--output", _GROUP, "Where the picture goes.", ("routing",), otherwise="MODEL.routing.svg",
           metavar="FILE.svg|.png"),
    Option("output", "-o/--output", _GROUP, "Where the engines go.", ("build",), otherwise="beside the graph",
           metavar="FOLDER"),
    Option("output", "-o/--output", _GROUP, "Write a picture instead, without Netron and a browser.", ("view",),
           metavar="FILE.svg"),
    Option("output", "-o/--output", _GROUP, "Draw both side by side, what differs marked.", ("diff",),
           metavar="FILE.svg"),
    Option("record", "--record", _GROUP, "Store inputs and right outputs, to compare with later.", ("verify",),
           metavar="FILE.safetensors", first=True),
)
REPORTS = (
    Option("output", "-o/--output", _GROUP,
           "Write the report, by the file's ending as JSON that `moe-export judge` reads, as JUnit XML, or as a page.",
           _REPORTING, metavar="FILE.json|.xml|.html", repeatable=True, first=True),
    Option("reports", "--report", _GROUP,
           "Also write the comparison as JUnit XML, or as a page, by the file's ending.", ("export",),
           metavar="FILE.xml|.html", repeatable=True),
    Option("github", "--github/--no-github", _GROUP, "Annotations and a step summary.", ("export", *_REPORTING),
           type=bool, otherwise="where GITHUB_ACTIONS is set"),
    Option("force", "--force", _GROUP, "Overwrite files that moe-export did not write, and inputs.", _WRITING,
           type=bool),
)
PRINTED = (
    Option("quiet", "-q/--quiet", _GROUP, "Print nothing but errors.", COMMANDS, type=bool, first=True),
    Option("verbose", "-v/--verbose", _GROUP, "List every case that was compared.", ("export", *_REPORTING), type=bool),
    Option("as_json", "--json", _GROUP, "Print the report as JSON, and nothing else.", COMMANDS, type=bool,
           first=True),
    Option("debug", "--debug", _GROUP, "Show the traceback of an error.", COMMANDS, type=bool),
)
