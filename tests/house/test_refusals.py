"""Codes of refusals: each that is raised is in the table, each in the table is raised, and each has its section."""

from __future__ import annotations

import ast
import re

import pytest
from pages import ROOT

from moe_export.commands.explain import PAGE, section
from moe_export.errors import Code

ROOMS = ("src", "export", "verify", "einsum_rewrite")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TEXT = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")


def mentioned():
    """`(file, name)` of each `Code.NAME` outside of the table."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "Code"
            ):
                yield path, node.attr


def test_each_code_is_used_and_each_that_is_used_is_in_the_table():
    assert {name for _, name in mentioned()} == {code.name for code in Code}


def test_numbers_and_titles_are_one_each():
    assert len({code.number for code in Code}) == len({code.title for code in Code}) == len(Code)
    assert all(re.fullmatch(r"MX[1-8]\d\d", code.number) for code in Code)
    assert sorted(Code, key=lambda code: code.number) == list(Code)


def test_the_page_has_the_sections_of_the_table_in_its_order():
    assert re.findall(r"^## (\S+)$", TEXT, re.MULTILINE) == [code.number for code in Code]
    assert PAGE.read_text(encoding="utf-8") == TEXT


@pytest.mark.parametrize("code", Code, ids=lambda code: code.number)
def test_a_section_says_why_and_what_to_do(code):
    text = section(code)
    assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL)) > 100
    for link in re.findall(r"\]\(#(\w+)\)", text):
        assert link.upper() in {each.number for each in Code}
    blocks = re.findall(r"^```python\n# (\w+): ", text, re.MULTILINE)
    assert blocks in ([], ["refused", "exported"], ["noted", "exported"])


def test_no_link_leads_to_a_missing_section():
    for page in (ROOT / "docs").rglob("*.md"):
        for link in re.findall(r"refusals\.md#(\w+)", page.read_text(encoding="utf-8")):
            assert link.upper() in {each.number for each in Code}, page
