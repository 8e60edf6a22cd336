"""The site of `make docs`: it builds offline without a warning, and every page, link and public name is in it."""

from __future__ import annotations

import importlib
import itertools
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from chromium import DESKTOP, SCHEMES, TELEPHONE, chromium, clipped, needs_chromium, show
from pages import PAGES, ROOT, name_of

pytest.importorskip("sphinx", reason="the site is built by Sphinx: pip install 'moe-export[docs]'")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOMS = ("moe_export", "moe_export.einsum_rewrite", "moe_export.export", "moe_export.verify")
TOLD_IN_WORDS = {"__version__", "Array", "DEFAULTS", "SCHEMA"}


class Addresses(HTMLParser):
    """What a page asks a browser to load, and what it links to."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: set[str] = set()
        self.linked: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {str(given[name]) for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.linked.add(str(given["href"]))
        if tag in ("script", "img", "link", "iframe", "source"):
            self.loaded |= {str(given[name]) for name in ("src", "href") if given.get(name)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=_env() | offline
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def _env():
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


@needs_chromium
@pytest.mark.slow
def test_nothing_of_a_page_is_clipped(site, tmp_path):
    """On a telephone and on a desk, in both schemes; tables and code that are wider scroll by themselves."""
    found = []
    with chromium(tmp_path / "profile") as browser:
        for page, width in itertools.product(sorted(site.rglob("*.html")), (TELEPHONE, DESKTOP)):
            for scheme in SCHEMES if page.stem in ("README", "seeing") else SCHEMES[:1]:
                show(browser, page.as_uri(), width, scheme)
                found += [f"{page.relative_to(site)} at {width}: {each}" for each in clipped(browser, width)]
    assert found == []


def test_every_page_is_in_the_navigation():
    listed = [
        page
        for pages in runpy.run_path(str(ROOT / "docs" / "conf.py"))["NAVIGATION"].values()
        for page in pages
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == {name_of(page) for page in PAGES} - {"README"} | {"CHANGELOG"}


def test_the_picture_of_the_house_names_every_room_and_file_that_puts_it_together():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("`src/moe_export` is what puts them together")[2].partition("## In Python")[0]
    named = set(
        re.findall(r"`(\w+)/?`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    inside = (ROOT / "src" / "moe_export").iterdir()
    assert named - {"src/moe_export"} == {
        path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__", "__main__"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_leads_to_a_file(page):
    prose = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )  # code has brackets, too
    for link in LINK.findall(prose):
        address = link.partition("#")[0]
        if address and not address.startswith(("http:", "https:")):
            assert (page.parent / address).is_file(), link


def test_the_site_asks_nobody_else(site):
    for path in site.rglob("*.html"):
        loaded = Addresses(path.read_text(encoding="utf-8")).loaded
        assert not [each for each in loaded if each.startswith(("http:", "https:", "//"))], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_the_links_of_the_site_lead_somewhere(site):
    pages = {path.resolve(): Addresses(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.linked:
            address, _, anchor = link.partition("#")
            if address.startswith(("http:", "https:")):
                continue
            target = (path.parent / address).resolve() if address else path
            assert target.exists(), (path.name, link)
            if anchor and target in pages:
                assert anchor in pages[target].anchors, (path.name, link)


def test_every_command_and_every_option_is_on_the_page_of_the_command_line(site):
    from moe_export.cli import cli

    text = (site / "docs" / "command-line.html").read_text(encoding="utf-8")
    shown = Addresses(text).anchors
    assert len(cli.commands) > 10
    for name, command in cli.commands.items():
        for option in command.params:
            for word in option.opts if option.param_type_name == "option" else ():
                wanted = f"cmdoption-moe-export-{name}-{word.lstrip('-')}".lower()
                assert wanted in {each.lower() for each in shown}, wanted
            assert option.param_type_name != "option" or option.help, (name, option.name)


def test_every_public_name_is_in_the_reference(site):
    shown = Addresses((site / "docs" / "api.html").read_text(encoding="utf-8")).anchors
    for room in ROOMS:
        for name in set(importlib.import_module(room).__all__) - TOLD_IN_WORDS:
            assert any(anchor.rpartition(".")[2] == name for anchor in shown), f"{room}.{name}"
