"""In a real browser, no error, and nothing asked of anybody else: a graph in Netron, a report, a picture."""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chromium import DESKTOP, SCHEMES, TELEPHONE, chromium, clipped, needs_chromium, show

from moe_export.export.gates.dispatch import Dispatch
from moe_export.export.gates.picture import draw
from moe_export.export.parallel.picture import draw as draw_flows
from moe_export.export.parallel.picture import flow
from moe_export.pictures.viewing import Viewer

if TYPE_CHECKING:
    from selenium import webdriver

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_chromium


@pytest.fixture
def browser(tmp_path) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path / "profile") as opened:
        yield opened


def asked(browser: webdriver.Chrome) -> set[str]:
    """The addresses that the page asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [
        each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"
    ]
    # The browser opens pages of its own by itself.
    own = ("chrome:", "chrome-untrusted:", "data:", "blob:")
    return {address for address in sent if not address.startswith(own)}


def labels(page: webdriver.Chrome) -> list[str]:
    """What the nodes of the graph say."""
    return [
        str(text.get_attribute("textContent")) for text in page.find_elements("css selector", "g.node text")
    ]


@pytest.mark.slow
def test_hybrid_shows_its_blocks(command, tmp_path, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    done = command(
        ROOT / "models" / "hybrid.py", "-o", tmp_path / "out", "--functions", "--no-gate", "--no-verify"
    )
    assert done.code == 0, done.err
    viewer = Viewer(tmp_path / "out" / "hybrid.onnx")
    try:
        browser.get(viewer.url)
        WebDriverWait(browser, 60).until(lambda page: "logits" in labels(page))
        shown = labels(browser)
        problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        addresses = asked(browser)
    finally:
        viewer.stop()
    for name in ("input_ids", "mamba_norm", "mamba", "attention", "moe_norm", "moe", "norm", "logits"):
        assert name in shown
    assert problems == []
    assert any(address.startswith(f"{viewer.url}/data/hybrid.onnx") for address in addresses), addresses
    assert {address for address in addresses if not address.startswith(viewer.url)} == set()


@pytest.mark.slow
def test_a_report_is_right_without_anything_else(told, browser):
    address = told.as_uri()
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(address)
        assert browser.find_element("css selector", "h1").text == "Moe as ONNX"
        shades = [
            sum(map(int, re.findall(r"\d+", browser.execute_script(_COLOUR, selector, name))[:3]))
            for selector, name in (("body", "background-color"), ("svg .paper", "fill"), ("body", "color"))
        ]
        assert [shade > 380 for shade in shades] == [scheme == "light"] * 2 + [scheme == "dark"]
        loaded = browser.execute_script("return [...document.images].map(image => image.naturalWidth > 0)")
        assert loaded == [True]
        wide = browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert wide
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert asked(browser) == {address}


def test_a_report_can_be_read_by_anybody(told, browser):
    """Contrast as it is drawn, landmarks, what scrolls, names of pictures; without scripts; and on paper."""
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(told.as_uri())
        seen, dim = browser.execute_script(_DIM)
        assert seen > 100
        assert dim == [], scheme
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]
    ]
    roles = [role for role, _ in found]
    assert roles.count("main") == roles.count("banner") == roles.count("navigation") == 1
    shown = [each for each in found if each[0] in ("image", "table", "region", "figure", "link", "heading")]
    assert len(shown) > 20
    assert [role for role, name in shown if not name] == []
    for wide in browser.execute_script(_SCROLLS):
        assert wide == "0"
    words = browser.find_element("css selector", "main").text
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(told.as_uri())
    assert browser.find_element("css selector", "main").text == words


@pytest.mark.slow
def test_nothing_of_a_page_is_clipped(told, command, finished, tmp_path, browser):
    """A report, a page of `verify` of a right and of a wrong graph: what is wider than the screen scrolls by itself."""
    for name, graph, code in (("right", "block.onnx", 0), ("wrong", "moe.onnx", 1)):
        model = finished / f"{graph.removesuffix('.onnx')}.py"
        if code:  # another model, in a file of its own: others read the finished one
            text = model.read_text().replace("softmax(-1)", "sigmoid()")
            model = tmp_path / model.name
            model.write_text(text)
        page = tmp_path / f"{name}.html"
        done = command("verify", finished / graph, "--against", model, "-o", page, "--no-localise")
        assert done.code == code, done.err
    for address in (told.as_uri(), (tmp_path / "right.html").as_uri(), (tmp_path / "wrong.html").as_uri()):
        for width, scheme in itertools.product((TELEPHONE, DESKTOP), SCHEMES):
            show(browser, address, width, scheme)
            assert clipped(browser, width) == [], (address, width, scheme)


def test_what_would_be_clipped_is_found(tmp_path, browser):
    page = tmp_path / "page.html"
    for inside, sees in (
        ("<p>short</p>", False),
        ("<p style='width: 60rem'>wide</p>", True),
        ("<div style='overflow-x: auto'><p style='width: 60rem'>wide</p></div>", False),
        ("<div style='overflow: hidden'><p style='width: 60rem'>cut</p></div>", True),
        ("<svg width='100'><text x='90' y='20'>beyond</text></svg>", True),
    ):
        head = '<!DOCTYPE html><meta name="viewport" content="width=device-width, initial-scale=1">'
        page.write_text(f"{head}<body>{inside}</body>")
        show(browser, page.as_uri(), TELEPHONE)
        assert bool(clipped(browser, TELEPHONE)) == sees, inside


def test_pictures_of_routings_follow_their_readers_scheme(tmp_path, browser):
    """Their paper, their ink and a map of pixels; each word stands out from the paper, and none is cut off."""
    rng = np.random.default_rng(0)
    few = Dispatch("moe", None, 4, np.stack([rng.permutation(4)[:2] for _ in range(6)]))
    many = Dispatch("moe", None, 64, np.stack([rng.permutation(64)[:2] for _ in range(700)]))
    rows = flow(("moe", "all_to_all", (0, 0, 1, 1), 2), few.indices[:4], 2, (8, 8))
    draw([few], tmp_path / "few.svg", 2)
    draw([many], tmp_path / "many.svg")
    (tmp_path / "ranks.svg").write_text(draw_flows([rows]))
    for name, scheme in itertools.product(("few", "many", "ranks"), SCHEMES):
        show(browser, (tmp_path / f"{name}.svg").as_uri(), scheme=scheme)
        paper, words, pixels = browser.execute_script(_PICTURE)
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}[scheme]
        assert len(words) > 8
        assert {sum(map(int, re.findall(r"\d+", each)[:3])) > 380 for each in words} == {scheme == "dark"}
        assert pixels == (
            ["none" if scheme == "light" else "invert(1) hue-rotate(180deg)"] if name == "many" else []
        )
        assert clipped(browser) == [], (name, scheme)


def test_a_report_prints(told, browser):
    browser.get(told.as_uri())
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 within its margins
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    assert not browser.find_element("css selector", "nav").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= paper["width"]
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    document = base64.b64decode(printed["data"])
    assert document.startswith(b"%PDF-")
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", document)) < 12


def test_words_of_a_picture_stay_in_their_boxes(command, finished, tmp_path, browser):
    """Widths of text are estimates: a real font shows that they are enough."""
    assert command("view", finished / "moe.onnx", "-o", tmp_path / "moe.svg", "--level", "nodes").code == 0
    browser.get((tmp_path / "moe.svg").as_uri())
    assert browser.execute_script(_OUTSIDE) == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert asked(browser) == {(tmp_path / "moe.svg").as_uri()}


_COLOUR = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
_OUTSIDE = """
return [...document.querySelectorAll("text.title, text.more")].filter(text => {
    const words = text.getBoundingClientRect();
    const box = text.parentNode.querySelector("rect.box").getBoundingClientRect();
    return words.left < box.left || words.right > box.right || words.bottom > box.bottom || words.top < box.top;
}).map(text => text.textContent);
"""
# The colour of the first shape that is filled, of each text, and what is done to pixels.
_PICTURE = """
const fill = element => getComputedStyle(element).fill;
const shape = [...document.querySelectorAll("path, rect")].find(element => fill(element).startsWith("rgb"));
return [fill(shape), [...document.querySelectorAll("text")].map(fill),
    [...document.querySelectorAll("image")].map(element => getComputedStyle(element).filter)];
"""
# How many words are looked at, and which stand out too little from what is behind them (WCAG 2.2, 1.4.3).
_DIM = """
const parts = colour => (colour.match(/[0-9.]+/g) || []).map(Number);
const light = colour => parts(colour).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
const opaque = colour => colour !== "none" && parts(colour)[3] !== 0 && parts(colour).length > 2;
const ground = element => {
    if (element instanceof SVGElement) {
        const box = element.parentNode.querySelector(":scope > rect.box");
        const inside = box && element.getAttribute("class") !== "key";
        return getComputedStyle(inside ? box : element.closest("svg").querySelector(".paper")).fill;
    }
    for (let each = element; each; each = each.parentElement)
        if (opaque(getComputedStyle(each).backgroundColor)) return getComputedStyle(each).backgroundColor;
    return "rgb(255, 255, 255)";
};
const shown = [...document.querySelectorAll("body *")].filter(element =>
    !["STYLE", "style", "title", "desc"].includes(element.tagName) && element.getClientRects().length
    && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
const dim = shown.map(element => {
    const style = getComputedStyle(element);
    const pair = [light(element instanceof SVGElement ? style.fill : style.color), light(ground(element))];
    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.textContent];
}).filter(([contrast]) => contrast < 4.5);
return [shown.length, dim];
"""
_SCROLLS = """
return [...document.querySelectorAll("body *")].filter(element => !(element instanceof SVGElement)
    && element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX !== "visible"
    && getComputedStyle(element).overflowX !== "clip").map(element => element.getAttribute("tabindex"));
"""
