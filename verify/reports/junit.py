"""A report as JUnit XML, which every CI shows: a suite a comparison, a test an output in a case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from moe_export.own_files import MARK
from moe_export.verify.judging.judge import Judgement
from moe_export.verify.reports.findings import CaseResult
from moe_export.verify.reports.report import Report

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(reports: Sequence[Report]) -> str:
    """The XML of some reports.

    A case that the reference refuses, and an output that a case could not decide, are skipped tests. A verdict that
    no single test shows (too little was compared, too many flips) is a test of its own, `verdict`.
    """
    root = ElementTree.Element("testsuites", name="moe-export")
    for report in reports:
        suite = ElementTree.SubElement(
            root, "testsuite", name=_clean(f"{report.candidate} against {report.reference}")
        )
        for name, value in report.about.items():
            properties = suite.find("properties")
            properties = ElementTree.SubElement(suite, "properties") if properties is None else properties
            ElementTree.SubElement(properties, "property", name=_clean(name), value=_clean(value))
        for case in report.cases:
            _add_case(suite, case, report)
        for label in report.left_out:
            test = _test(suite, label, report.candidate)
            ElementTree.SubElement(test, "skipped", message="not compared: the time limit was reached")
        verdict = _test(suite, "verdict", "whole")
        if report.exit_code:
            why = report.shortfall or "; ".join(str(row.reason) for row in report.rows if not row.equal)
            ElementTree.SubElement(verdict, "failure", message=_clean(f"{report.verdict}: {why}"))
        for kind in ("failure", "skipped"):
            suite.set("failures" if kind == "failure" else kind, str(len(suite.findall(f"testcase/{kind}"))))
        suite.set("tests", str(len(suite.findall("testcase"))))
        suite.set("errors", "0")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode", xml_declaration=True)
    return text.replace("\n", f"\n<!-- {MARK} -->\n", 1) + "\n"


def _add_case(suite: ElementTree.Element, case: CaseResult, report: Report) -> None:
    if case.outcome == "refused":
        test = _test(suite, case.label, report.reference)
        ElementTree.SubElement(
            test, "skipped", message=_clean(f"refused by {report.reference}: {case.reason}")
        )
    elif case.outcome == "no memory":
        test = _test(suite, case.label, report.candidate)
        ElementTree.SubElement(test, "skipped", message=_clean(case.reason or ""))
    elif case.outcome == "failed":
        test = _test(suite, case.label, report.candidate)
        ElementTree.SubElement(
            test, "failure", message=_clean(f"only {report.candidate} fails: {case.reason}")
        )
    for judgement in case.judgements:
        test = _test(suite, case.label, judgement.output)
        if judgement.undecided:
            ElementTree.SubElement(test, "skipped", message=_clean(judgement.undecided))
        elif not judgement.ok:
            failure = ElementTree.SubElement(test, "failure", message=_clean(str(judgement.reason)))
            failure.text = _clean(_detail(judgement, report, case))


def _test(suite: ElementTree.Element, case: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_clean(case), name=_clean(name))


def _detail(judgement: Judgement, report: Report, case: CaseResult) -> str:
    lines = [f"seed {case.seed}, max abs {judgement.max_abs:.3e}, max rel {judgement.max_rel:.3e}"]
    if judgement.worst is not None:
        index = ", ".join(map(str, judgement.worst.index))
        lines.append(
            f"worst [{index}]: {report.candidate} {judgement.worst.candidate}, "
            f"{report.reference} {judgement.worst.reference}"
        )
    return "\n".join(lines)


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)
