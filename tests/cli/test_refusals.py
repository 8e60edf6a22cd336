"""The page on refusals is true: what it shows as refused is, with that code, and what it shows instead is exported."""

from __future__ import annotations

import pickle
import re
import shlex

import pytest

from moe_export.commands.explain import section
from moe_export.errors import Code, NotExportableError

BLOCK = re.compile(
    r"^```python\n# (?P<kind>refused|noted|exported): moe-export model\.py ?(?P<args>.*)\n(?P<code>(?:.*\n)*?)```$",
    re.MULTILINE,
)
QUICK = {"MX103", "MX104", "MX201", "MX301", "MX701", "MX702", "MX703"}


def shown(code):
    return list(BLOCK.finditer(section(code)))


SHOWN = [code for code in Code if shown(code)]
CASES = [
    pytest.param(code, id=code.number, marks=() if code.number in QUICK else pytest.mark.slow)
    for code in SHOWN
]


def test_most_codes_have_an_example():
    assert len(SHOWN) >= 19
    assert {code.number for code in SHOWN} >= QUICK


@pytest.mark.filterwarnings("ignore")  # PyTorch calls its own quantization deprecated
@pytest.mark.parametrize("code", CASES)
@pytest.mark.slow_but_one
def test_what_the_page_shows_is_refused_and_its_rewrite_is_exported(command, tmp_path, code):
    cause, rewrite = shown(code)
    file = tmp_path / "model.py"
    file.write_text(cause["code"])
    done = command("model.py", *shlex.split(cause["args"]), "-o", "out")
    mark = f"[{code.number}]"
    if cause["kind"] == "refused":
        assert (done.code, mark in done.err) == (3, True), done
        assert f"why: moe-export explain {code.number}" in done.err
    else:
        assert done.code == 0, done
        assert any(line.endswith(mark) for line in done.out.splitlines() if "note: " in line), done.out
    file.write_text(rewrite["code"])
    done = command("model.py", *shlex.split(rewrite["args"]), "-o", "out")
    assert done.code == 0, done
    assert mark not in done.out


def test_explain_prints_the_section(command):
    for typed in ("MX703", "mx703", "[MX703]"):
        done = command("explain", typed)
        assert done.code == 0
        assert done.out == f"MX703: {Code.FROZEN_MODULE.title}\n\n{section(Code.FROZEN_MODULE)}\n"


def test_a_code_that_is_none(command):
    done = command("explain", "MX999")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: there is no code MX999")
    assert f"MX101  {Code.VALUES_DECIDE.title}" in done.err


def test_a_refusal_keeps_its_code_from_one_process_to_another():
    error = NotExportableError(
        "it has no form\nsays PyTorch", code=Code.OPSET, where="net.py:3", hint="write another"
    )
    again = pickle.loads(pickle.dumps(error))
    assert (
        str(again)
        == str(error)
        == "it has no form [MX302]\nsays PyTorch\n  where: net.py:3\n  hint: write another"
    )
    assert again.code is Code.OPSET
