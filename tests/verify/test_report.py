import io
import json

import numpy as np
import pytest
from rich.console import Console

from moe_export.verify import SCHEMA, CaseResult, Margin, Report, judge, show
from moe_export.verify.reports.table import plain

MARGIN = Margin(1e-5, 1e-5)
SIZES = (("batch", 2), ("sequence", 10))


def result(label, *pairs, sizes=SIZES, outcome="compared", reason=None):
    """A case of outputs a, b, ... given as (reference, candidate)."""
    judgements = (
        judge(n, np.asarray(r), np.asarray(c), MARGIN) for n, (r, c) in zip("abc", pairs, strict=False)
    )
    return CaseResult(label, 7, sizes, outcome, reason, tuple(judgements))


def report(*cases, wanted=1):
    return Report("torch", "onnxruntime-cpu", cases, wanted)


GOOD = result("example", ([1.0, 2.0], [1.0, 2.000001]), ([3], [3]))
BAD = result("sequence=15", ([1.0, 2.0], [1.0, 2.5]), ([3], [3]), sizes=(("sequence", 15),))


def test_a_row_shows_the_worst_case_of_its_output():
    row, other = report(GOOD, BAD).rows
    assert (row.output, row.at, row.equal, row.bad, row.total) == ("a", "sequence=15", False, 1, 4)
    assert (row.max_abs, row.max_rel) == (0.5, 0.25)
    assert (row.worst.index, row.worst.candidate, row.worst.reference) == ((1,), 2.5, 2.0)
    assert (other.output, other.equal, other.max_abs) == ("b", True, 0.0)


def test_a_failing_case_is_shown_before_a_larger_difference_that_is_within_tolerance():
    large = result("large", ([1e9], [1e9 + 100]))
    small = result("small", ([0.0], [1e-3]), sizes=())
    row = report(large, small).rows[0]
    assert (row.at, row.equal, row.max_abs) == ("small", False, 100.0)


def test_exit_codes():
    assert report(GOOD).exit_code == 0
    assert report(GOOD, BAD).exit_code == 1
    assert (
        report(GOOD, result("sequence=1", sizes=(("sequence", 1),), outcome="refused"), wanted=4).exit_code
        == 1
    )
    assert report(GOOD, result("sequence=1", sizes=(), outcome="failed", reason="no")).verdict == "not equal"
    assert report().exit_code == 1


def test_json_is_strict_versioned_and_complete():
    nan = result("sequence=1", ([1.0, np.inf], [np.nan, np.inf]), ([3], [3]), sizes=(("sequence", 1),))
    found = json.loads(report(GOOD, BAD, nan).to_json(), parse_constant=pytest.fail)
    assert found["schema"] == SCHEMA == "moe-export/verify-report/2"
    assert (found["verdict"], found["exit_code"]) == ("not equal", 1)
    assert found["outputs"][0]["worst"] == {"index": [1], "candidate": 2.5, "reference": 2.0}
    assert found["cases"][0]["sizes"] == {"batch": 2, "sequence": 10}
    assert found["cases"][0]["seed"] == 7
    assert found["cases"][2]["judgements"][0]["worst"]["candidate"] == "nan"
    assert found["cases"][0]["judgements"][0]["margin"] == {"rtol": 1e-5, "atol": 1e-5}


def test_the_text_in_full():
    assert str(report(GOOD, BAD)).splitlines() == [
        "onnxruntime-cpu against torch: not equal",
        "",
        "output dtype    max abs  max rel at          verdict",
        "a      float64 5.00e-01 2.50e-01 sequence=15 DIFFERS",
        "b      int64          0        0 example     equal",
        "",
        "2 size combinations: batch 2 only, sequence 10..15; seed 7",
        "a DIFFERS, sequence=15: 1 of 2 elements beyond rtol=1e-05 atol=1e-05; worst a[1] is 2.5, torch has 2",
    ]


def test_every_case_is_listed_where_that_is_asked_for():
    assert (
        "compared: example (batch=2 sequence=10); sequence=15"
        in plain(report(GOOD, BAD), verbose=True).splitlines()
    )
    assert "compared: " not in plain(report(GOOD, BAD))


def test_the_headline_of_equal_outputs_states_the_tolerance_that_they_share():
    assert str(report(GOOD, wanted=1)).startswith("onnxruntime-cpu matches torch (rtol=1e-05 atol=1e-05)\n")


def test_the_text_stays_within_a_hundred_columns():
    long = CaseResult(
        " ".join(f"dimension_number_{i}=100" for i in range(9)),
        0,
        (("n", 1),),
        "compared",
        None,
        (judge("a_very_long_output_name_" * 4, np.ones((9, 9)), np.full((9, 9), 1e30), MARGIN),),
    )
    failed = CaseResult("n=2", 0, (("n", 2),), "failed", "RuntimeError: " + "word " * 60)
    lines = str(report(GOOD, long, failed)).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("…" in line for line in lines)


def test_a_report_of_nothing_prints():
    assert str(report()).splitlines() == [
        "onnxruntime-cpu against torch: not proven (0 of 1 sizes could be compared)",
        "",
        "0 size combinations; seed 0",
    ]


def test_a_terminal_gets_colours_and_a_file_plain_text():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file, terminal = io.StringIO(), Terminal()
    show(report(GOOD, BAD), file)
    assert file.getvalue() == f"{report(GOOD, BAD)}\n"
    show(report(GOOD, BAD), terminal)
    assert "DIFFERS" in terminal.getvalue()
    console = Console(file=terminal, force_terminal=True, width=100, color_system="standard", no_color=False)
    console.print(report(GOOD, BAD))
    assert "\x1b[31mDIFFERS" in terminal.getvalue()
    assert "\x1b[32mequal" in terminal.getvalue()


def test_rich_does_not_read_markup_in_names():
    odd = CaseResult("[red]", 0, (), "compared", None, (judge("[bold]y", np.ones(1), np.ones(1), MARGIN),))
    stream = io.StringIO()
    Console(file=stream, width=100).print(report(odd))
    assert "[bold]y" in stream.getvalue()
    assert "[red]" in stream.getvalue()
