"""Reports for CI: JUnit XML, GitHub's annotations and summary, the page."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_export.verify import CaseResult, Margin, Report, judge
from moe_export.verify.reports.github import summary, workflow_commands
from moe_export.verify.reports.junit import junit
from moe_export.verify.reports.page import page

MARGIN = Margin(1e-5, 1e-5)
RNG = np.random.default_rng(0)
Y = RNG.normal(size=(4, 8))
GOOD = judge("y", Y, Y + 1e-7 * RNG.normal(size=Y.shape), MARGIN)
BAD = judge("y|<z>", np.array([1.0, 2.0]), np.array([1.0, 3.0]), MARGIN)


def case(label, *judgements, outcome="compared", reason=None):
    return CaseResult(label, 0, (("n", 2),), outcome, reason, judgements)


def report(*cases, **about):
    return Report("torch", "onnxruntime-cpu", cases, 1, about=about)


EQUAL = report(case("example", GOOD))
WRONG = report(
    case("example", GOOD, BAD),
    case("n=1", outcome="refused", reason="ValueError: \x00 <odd>"),
    case("n=3", outcome="failed", reason="RuntimeError: 100%\nbroken"),
    line="models/moe.py:12",
)


UNFINISHED = Report(
    "torch", "onnxruntime-cpu", (case("example", GOOD),), 1, left_out=("sequence=4096", "zeros")
)


def test_what_a_time_limit_cut_off_stands_in_every_form():
    root = ElementTree.fromstring(junit([UNFINISHED]))
    assert [test.get("classname") for test in root.iterfind(".//testcase[skipped]")] == [
        "sequence=4096",
        "zeros",
    ]
    assert "unfinished: 1 of 3 cases compared" in root.find(".//failure").get("message")
    (command,) = workflow_commands(UNFINISHED)
    assert command == "::error title=unfinished::1 of 3 cases compared, not compared: sequence=4096; zeros"
    assert "⏳" in summary(UNFINISHED)
    assert "Unfinished: 1 of 3 cases compared, not compared: sequence=4096; zeros." in summary(UNFINISHED)
    assert "<title>unfinished - moe-export verify</title>" in page([EQUAL, UNFINISHED])
    assert "<title>not equal - moe-export verify</title>" in page([UNFINISHED, WRONG])
    assert "sequence=4096" in page([UNFINISHED])


def test_junit_counts_tests_failures_and_skipped():
    root = ElementTree.fromstring(junit([EQUAL, WRONG]))
    first, second = root.findall("testsuite")
    assert (first.get("name"), first.get("tests"), first.get("failures")) == (
        "onnxruntime-cpu against torch",
        "2",
        "0",
    )
    assert (second.get("tests"), second.get("failures"), second.get("skipped")) == ("5", "3", "1")
    failure = second.find("testcase[@name='y|<z>']/failure")
    assert failure.get("message") == "1 of 2 elements beyond rtol=1e-05 atol=1e-05"
    assert "worst [1]: onnxruntime-cpu 3.0, torch 2.0" in failure.text
    assert second.find("properties/property").get("value") == "models/moe.py:12"


def test_junit_shows_a_verdict_that_no_test_shows():
    root = ElementTree.fromstring(junit([report()]))
    assert (
        root.find("testsuite/testcase[@name='whole']/failure").get("message").startswith("not proven: 0 of")
    )


def test_annotations_stand_on_the_models_line(monkeypatch, tmp_path):
    assert list(workflow_commands(EQUAL)) == []
    monkeypatch.chdir(tmp_path)
    lines = list(workflow_commands(WRONG))
    assert lines[0] == (
        "::error file=models/moe.py,line=12,title=y|<z> differs::"
        "example: 1 of 2 elements beyond rtol=1e-05 atol=1e-05"
    )
    assert lines[1].endswith("::n=3: RuntimeError: 100%25%0Abroken")
    assert all("\n" not in line for line in lines)


def test_paths_of_annotations_are_the_repositorys(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    wrong = report(case("example", BAD), line=f"{tmp_path}/models/moe.py:3")
    assert next(workflow_commands(wrong)).startswith("::error file=models/moe.py,line=3,")
    assert next(workflow_commands(report(case("example", BAD)))).startswith("::error title=")


def test_the_summary_is_a_table():
    text = summary(WRONG)
    assert "### ❌ onnxruntime-cpu against torch: not equal" in text
    assert "| y\\|&lt;z> | float64 | 1.00e+00 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
    assert "✅" in summary(EQUAL)


class Tags(HTMLParser):
    VOID = ("meta", "br", "rect", "line")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("reports", [[EQUAL], [WRONG], [EQUAL, WRONG], [report()], []])
def test_the_page_is_whole_and_needs_nothing_else(reports):
    text = page(reports)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe"}
    assert not any("src" in attrs or "href" in attrs for _, attrs in tags.seen)
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_draws_differences_and_escapes_names():
    text = page([WRONG])
    assert "<z>" not in text
    assert "y|&lt;z&gt;" in text
    counted = [int(n) for n in re.findall(r"<title>(\d+) elements from", text)]
    assert sum(counted) == Y.size + 1  # every difference of both outputs
    assert "atol 1e-05" in page([EQUAL]) or "stroke-dasharray" in text
