"""`make compare`: it runs, and the table that it made is that of its list of modules, on its page and in the README."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pages import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader of its own")
SCRIPT = ROOT / "tests" / "bench" / "exporters.py"


def rows(page: str) -> list[list[str]]:
    """The cells of the rows of a page's tables of modules, without headings."""
    found: list[list[str]] = []
    inside = False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        inside = line.startswith("|") and (inside or line.startswith("| module |"))
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if inside else []
        if cells and cells[0] != "module" and not cells[0].startswith(("---", "**")):
            found.append(cells)
    return found


def test_the_table_has_a_row_for_each_module_in_order():
    listed = tomllib.loads((ROOT / "tests" / "bench" / "exporters.toml").read_text())["module"]
    assert len(listed) >= 20
    assert [row[0] for row in rows("docs/exporters.md")] == [each["name"] for each in listed]


def test_the_rows_of_the_readme_are_rows_of_the_table():
    measured = {row[0]: row for row in rows("docs/exporters.md")}
    shown = rows("README.md")
    assert 4 <= len(shown) <= 10
    for name, torchs, ours, nodes in shown:
        assert torchs in measured[name][1]
        assert ours in measured[name][2]
        assert nodes == measured[name][3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_small_modules_are_measured(tmp_path):
    names = ["MLP", "ModuleList, `if mask.any()`"]
    command = [sys.executable, str(SCRIPT), "--build", str(tmp_path), "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`torch.onnx.export`, of 2 modules: 1 right at all sizes" in done.stdout
    assert "`moe-export`, of 2 modules: 2 right at all sizes" in done.stdout
    modules = json.loads((tmp_path / "results.json").read_text())["modules"]
    assert list(modules) == names
    plain, experts = modules.values()
    assert plain["torch"]["text"] == plain["moe-export"]["text"] == "right at 4 sizes"
    assert plain["torch"]["nodes"] > 0
    assert 0 < plain["torch"]["wall"] < plain["torch"]["cpu"] * 20
    assert experts["torch"]["attempts"]["named"].startswith("refused: GuardOnDataDependentSymNode")
    assert experts["moe-export"]["verified"] > experts["moe-export"]["cpu"] > 0
