"""The site that `make docs` builds: the pages of this repository as they are, read where they lie.

The source folder of Sphinx is the root of the repository, so that links between pages work here as they do in a
checkout. What a site needs and a reader of the file does not (the navigation) is added here. Nothing is fetched: no
font, no script from elsewhere, no inventory of other projects.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from sphinx.application import Sphinx

import moe_export

NAVIGATION = {
    "Tasks": (
        "docs/tasks/export-my-moe",
        "docs/tasks/export-my-mamba",
        "docs/tasks/replace-einsums",
        "docs/tasks/check-in-ci",
        "docs/tasks/build-an-engine",
    ),
    "Topics": (
        "docs/einsum",
        "docs/experts",
        "docs/recurrence",
        "docs/decoder",
        "docs/precision",
        "docs/quantize",
        "docs/verify",
        "docs/error-localisation",
        "docs/engines",
        "docs/seeing",
    ),
    "Reference": ("docs/command-line", "docs/refusals", "docs/api"),
    "Taking part": (
        "CONTRIBUTING",
        "docs/architecture",
        "docs/tasks/add-a-rule",
        "docs/tasks/add-an-idiom",
        "docs/tasks/add-an-operator",
        "docs/tasks/find-a-wrong-scan",
        "docs/tasks/add-a-lowering",
        "docs/tasks/add-a-backend",
        "docs/tasks/add-a-model",
        "docs/tasks/add-an-option",
        "CHANGELOG",
    ),
}

_told = {page for pages in NAVIGATION.values() for page in pages}
NAVIGATION["Topics"] += tuple(
    page
    for page in sorted(f"docs/{path.stem}" for path in Path(__file__).parent.glob("*.md"))
    if page not in _told
)

project = "moe-export"
release = version = moe_export.__version__
copyright = "the authors of moe-export"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "out",
    "src",
    "tests",
    "einsum_rewrite",
    "export",
    "verify",
    "models",
]

html_theme = "furo"
html_theme_options = {"light_css_variables": {"code-font-size": "76%"}}  # a terminal's 100 columns fit
html_title = f"moe-export {release}"
html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
highlight_language = "none"  # a block without a language is text
smartquotes = False  # --opset stays as it is typed
myst_heading_anchors = 3

default_role = "code"  # docstrings write `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_ivar = True

warnings.simplefilter(
    "ignore"
)  # of the libraries that importing the package imports; Sphinx's own are errors
FRONT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>moe-export</title>
<meta http-equiv="refresh" content="0; url=README.html"></head>
<body><p><a href="README.html">moe-export</a></p></body></html>
"""


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Put every page into the navigation of the first one."""
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{listed}\n```\n"


def write_front(app: Sphinx, error: Exception | None) -> None:
    """Lead from `index.html` to the README."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "index.html").write_text(FRONT, encoding="utf-8")


COLON = "\0"


def hide_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what stands before the colon in a property's docstring for its type."""
    if what in ("property", "attribute"):
        lines[:] = [line.replace(":", COLON) for line in lines]


def as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: a bar is a bar, a word may follow a `name` without a space, code is indented."""
    for place, line in enumerate(lines):
        after = lines[place + 1 : place + 3]
        code = line.endswith(":") and len(after) == 2 and not after[0] and after[1].startswith("    ")
        parts = re.split(r"(``.*?``|`[^`]+`)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        plain = re.sub(r"(?<=\w`)(?=\w)", r"\\ ", "".join(parts)).replace(COLON, ":")
        lines[place] = f"{plain}:" if code else plain


def show_examples(app: Sphinx, ctx: object, lines: list[str]) -> None:
    """What a command's description shows line by line are commands."""
    if any(line.startswith("| ") for line in lines):
        first = next(place for place, line in enumerate(lines) if line.startswith("| "))
        lines[first:first] = [".. code-block:: none", ""]
    lines[:] = [f"    {line[2:]}" if line.startswith("| ") else line for line in lines]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("sphinx-click-process-description", show_examples)
    app.connect("autodoc-process-docstring", hide_colons, priority=100)
    app.connect("autodoc-process-docstring", as_text, priority=900)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", write_front)
