"""Every page of the documentation runs: README, CONTRIBUTING and docs/, from top to bottom, and prints what it says."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, ROOT, fences, follow, name_of, prepare, steps

TAKES_LONG = {
    "docs/guilty": "mutants of a whole graph, and the guilty node of a Scan",
    "docs/seeing": "exports and a report of the largest model",
    "docs/verify": "a pytest of its own, an export by PyTorch",
}
NOTHING_TO_RUN = {
    "docs/parallel": "its commands need several processes; their tests have them",
    "docs/weights": "its commands need weights of many gigabytes; their tests have smaller ones",
}
RUN = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in TAKES_LONG else [])
    for page in PAGES
]
OF_A_TERMINAL = re.compile(r"^(\$ |> )?(moe-export|make|pip|python3?|git|pre-commit|pytest) ", re.MULTILINE)


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    folder = prepare(tmp_path)
    for step in steps(page):
        follow(step, folder)


@pytest.mark.parametrize("name", TAKES_LONG)
def test_a_long_page_begins_well(name, tmp_path):
    follow(next(steps(ROOT / f"{name}.md")), prepare(tmp_path))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_has_a_command_that_nobody_runs(page):
    for language, text in fences(page):
        if language not in ("console", "python"):
            assert not OF_A_TERMINAL.search(text), f"a command in a block of {language or 'text'}:\n{text}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_has_something_to_run(page):
    assert list(steps(page)) or name_of(page) in NOTHING_TO_RUN


def test_the_page_on_verify_shows_the_real_tolerances():
    from moe_export.verify import DEFAULTS

    text = (ROOT / "docs" / "verify.md").read_text()
    shown = dict(re.findall(r"^\| (float64|float32|float16|bfloat16) \| (\S+) \|$", text, re.MULTILINE))
    assert {name: float(figure) for name, figure in shown.items()} == {
        name: DEFAULTS[name].rtol for name in ("float64", "float32", "float16", "bfloat16")
    }
    for name in ("float64", "float32", "float16", "bfloat16"):
        assert DEFAULTS[name].rtol == DEFAULTS[name].atol


def test_the_page_on_verify_names_every_kind_of_values_and_every_field():
    from dataclasses import fields

    from moe_export.verify import SCHEMA, Judgement
    from moe_export.verify.regimes import PADDED, REGIMES

    text = (ROOT / "docs" / "verify.md").read_text()
    for name in (*(regime.name for regime in REGIMES), PADDED, SCHEMA, *(f.name for f in fields(Judgement))):
        assert f"`{name}`" in text, name
