"""Headless Chromium, for tests that look at pages as a reader does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium import webdriver

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium with its chromedriver on this machine (Debian: chromium-driver)",
)
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1100,1500",
)  # fmt: skip
TELEPHONE, DESKTOP = 390, 1280
"""Widths of screens, in CSS pixels."""
SCHEMES = ("light", "dark")


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield opened
    finally:
        opened.quit()


def show(browser: webdriver.Chrome, address: str, width: int = DESKTOP, scheme: str = "light") -> None:
    """Open a page on a screen of some width, in a colour scheme."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)


def clipped(browser: webdriver.Chrome, width: int = DESKTOP) -> list[str]:
    """What of the page cannot be seen on a screen of that width.

    It makes the page wider than the screen, or is cut off by something that does not scroll, or by a picture's edge.
    """
    return [str(each) for each in browser.execute_script(_CLIPPED, width)]


_CLIPPED = """
const screen = arguments[0], wide = document.documentElement.scrollWidth; // a telephone's window grows with its page
const found = wide > screen ? [`the page is ${wide} wide`] : [];
const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
for (const element of document.querySelectorAll("body *, svg text")) {
    if (!element.getClientRects().length || element.closest(".sr-only, .visually-hidden, .headerlink")) continue;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    if (style.visibility === "hidden" || box.width < 2) continue;
    const words = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!words && !(element instanceof HTMLImageElement)) continue;
    let frame = [0, screen];
    for (let each = element.parentElement; each && each !== document.documentElement; each = each.parentElement) {
        if (scrolls(each) || getComputedStyle(each).position === "fixed") { frame = null; break; }
        if (each instanceof SVGSVGElement) {
            const picture = each.getBoundingClientRect();
            if (box.left < picture.left - 1 || box.right > picture.right + 1) frame = [0, 0];
        }
    }
    if (frame && (box.left < frame[0] - 1 || box.right > frame[1] + 1))
        found.push(`${element.outerHTML.slice(0, 90)} from ${box.left.toFixed()} to ${box.right.toFixed()}`);
}
return found;
"""
