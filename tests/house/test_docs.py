"""Every page of the documentation runs: README, CONTRIBUTING and docs/, from top to bottom, and prints what it says."""

from __future__ import annotations

import os
import re

import pytest
import warm_python
from pages import PAGES, ROOT, fences, follow, name_of, prepare, steps

OF_A_TERMINAL = re.compile(r"^(\$ |> )?(moe-export|make|pip|python3?|git|pre-commit|pytest) ", re.MULTILINE)


# Pages that take longest are run with the slow tests.
LONG = {
    "docs/engines", "docs/experts", "docs/error-localisation", "docs/parallel", "docs/recurrence", "docs/refusals",
    "docs/seeing",
    "docs/tasks/add-a-model", "docs/tasks/build-an-engine", "docs/tasks/check-in-ci", "docs/tasks/export-my-mamba",
    "docs/tasks/export-my-moe", "docs/tasks/find-a-wrong-scan", "docs/verify", "docs/weights",
}  # fmt: skip


def test_the_long_pages_are_there():
    assert {name_of(page) for page in PAGES} >= LONG


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if name_of(page) in LONG else ()) for page in PAGES],
    ids=name_of,
)
@pytest.mark.slow_but_one
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    folder = prepare(tmp_path)
    for step in steps(page):
        follow(step, folder)


def test_a_program_of_a_page_is_a_process_of_its_own(tmp_path):
    told = "print(sys.argv[1:], __name__, os.getcwd() == sys.path[0], os.environ['WHOSE'], 'moe_export' in sys.modules)"
    (tmp_path / "told.py").write_text(f"import os, sys\n{told}\nsys.exit(3)\n")
    env = {"PATH": os.environ["PATH"], "WHOSE": "the page's"}
    said = "['--a', 'b'] __main__ True the page's False\n"
    assert warm_python.run(["told.py", "--a", "b"], tmp_path, env) == (3, said, "")
    assert warm_python.run(["-m", "told", "--a", "b"], tmp_path, env) == (3, said, "")
    code, out, err = warm_python.run(["-c", "import torch\nprint(torch.ones(2).sum())\n1 / 0"], tmp_path, env)
    assert (code, out) == (1, "tensor(2.)\n")
    assert 'File "<string>", line 3' in err
    assert "ZeroDivisionError" in err
    warns = "import warnings; warnings.warn('seen', stacklevel=1)"
    assert "UserWarning: seen" in warm_python.run(["-c", warns], tmp_path, env)[2]
    assert warm_python.run(["-W", "ignore", "-c", warns], tmp_path, env) == (0, "", "")
    assert (
        warm_python.run(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], tmp_path, env)[0]
        == -9
    )
    assert warm_python.run(["-c", "raise SystemExit('no')"], tmp_path, env) == (1, "", "no\n")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_has_a_command_that_nobody_runs(page):
    for language, text in fences(page):
        if language not in ("console", "python"):
            assert not OF_A_TERMINAL.search(text), f"a command in a block of {language or 'text'}:\n{text}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_has_something_to_run(page):
    assert list(steps(page))


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
    from moe_export.verify.inputs.regimes import PADDED, REGIMES

    text = (ROOT / "docs" / "verify.md").read_text()
    for name in (*(regime.name for regime in REGIMES), PADDED, SCHEMA, *(f.name for f in fields(Judgement))):
        assert f"`{name}`" in text, name
