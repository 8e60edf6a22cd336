"""A share of the slow tests, another one each day: what `make test-slow-share` runs.

The slow tests take longer than a gate may. They are dealt into `DAYS` shares by a hash of their names, and each day has
one share of its own; where time is left, the next day's follows, and so on. So each slow test runs at least once in
`DAYS` days, as long as a share fits into the time, and which tests come first depends on nothing but the date.

A test that fails is run once more, alone. If it passes then, it is unstable, and printed as that; if it fails again,
the gate is red. A test that brings its process down has failed, and another process goes on with the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

DAYS = 7
"""Shares; a week. On a quiet machine of two cores about two of them fit into the time."""
MINUTES = 25.0
_LEAVE = 20.0
"""Seconds that a process has to end by itself when the time is up."""
_RESULTS = "SLOW_SHARE_RESULTS"
ROOT = Path(__file__).resolve().parents[1]


def share_of(name: str) -> int:
    """The share that a test belongs to, whatever other tests there are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % DAYS


def in_order(names: Sequence[str], day: int) -> list[str]:
    """All tests, those of the day's share first. Tests of one file stay together: they share what they set up.

    Files begin elsewhere each time that their share comes, so that what the time cuts off is not always the same.
    """

    def turn(name: str) -> tuple[int, bytes, int]:
        later = (share_of(name) - day) % DAYS
        file = name.partition("::")[0]
        return later, hashlib.sha256(f"{day} {file}".encode()).digest(), names.index(name)

    return sorted(names, key=turn)


@dataclass
class Ran:
    """What came of the tests that were begun: `passed`, `failed`, `skipped`; and those that were not, in order."""

    outcomes: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def of(self, outcome: str) -> list[str]:
        """The tests with this outcome."""
        return [name for name, found in self.outcomes.items() if found == outcome]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process of the tests: note what begins, and what came of it."""
    path = os.environ.get(_RESULTS)
    if path is None or (report.passed and report.when == "teardown"):
        return
    outcome = "begun" if report.passed and report.when == "setup" else report.outcome
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, outcome]) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Likewise; setting up may bring the process down, too."""
    path = os.environ.get(_RESULTS)
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([nodeid, "begun"]) + "\n")


def _pytest(names: Sequence[str], folder: Path, results: Path | None, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "slow_share", "-q", *options]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths} | ({_RESULTS: str(results)} if results is not None else {})
    output = None if results is not None else subprocess.PIPE
    return subprocess.Popen([*command, *names], cwd=folder, env=env, stdout=output, text=True)


def collect(folder: Path) -> list[str]:
    """The names of all slow tests.

    Raises:
        SystemExit: They cannot be collected.
    """
    process = _pytest([], folder, None, "--collect-only", "-m", "slow")
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{out}\nthe slow tests cannot be collected")
    return [line for line in out.splitlines() if "::" in line and " " not in line.partition("[")[0]]


def run(names: Sequence[str], folder: Path, end: float) -> Ran:
    """Run tests in order until the time is up, in as many processes as they bring down."""
    ran = Ran(left=list(names))
    while ran.left and time.monotonic() < end:
        before = len(ran.left)
        _one_process(ran, folder, end)
        if len(ran.left) == before and time.monotonic() < end:  # pytest itself does not come so far
            ran.outcomes[ran.left.pop(0)] = "failed"
    return ran


def _one_process(ran: Ran, folder: Path, end: float) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        results, listed = Path(temporary, "results"), Path(temporary, "names")
        results.touch()
        listed.write_text("\n".join(ran.left), encoding="utf-8")
        process = _pytest([f"@{listed}"], folder, results)
        is_late = False
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            is_late = True
            # A callback of the interpreter may swallow the signal: that test fails of it, and the next one begins.
            told = results.read_text(encoding="utf-8")
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE)
            process.kill()
            process.wait()
        else:
            told = results.read_text(encoding="utf-8")
        found: dict[str, str] = {}
        for line in told.splitlines():
            name, outcome = json.loads(line)
            if found.get(name) != "failed":
                found[name] = outcome
    for name, outcome in found.items():
        if outcome == "begun" and is_late:
            continue  # cut off: neither passed nor failed
        ran.outcomes[name] = "failed" if outcome == "begun" else outcome
    ran.left = [name for name in ran.left if name not in ran.outcomes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the share of a day; 1 if a test failed twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--day", type=int, default=datetime.date.today().toordinal(), help="as an ordinal")
    parser.add_argument("--folder", type=Path, default=ROOT)
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    names = in_order(collect(options.folder), options.day)
    ran = run(names, options.folder, end)
    unstable, failed = [], []
    for name in ran.of("failed"):
        print(f"\nonce more, alone: {name}", flush=True)
        again = run([name], options.folder, time.monotonic() + 60 * options.minutes)
        (unstable if again.outcomes.get(name) == "passed" else failed).append(name)
    own = [name for name in names if share_of(name) == options.day % DAYS]
    late = [name for name in own if name in ran.left]
    print(f"\nslow tests of {datetime.date.fromordinal(options.day)}: share {options.day % DAYS} of {DAYS}")
    for word, some in (("UNSTABLE", unstable), ("FAILED TWICE", failed), ("no time for", late)):
        for name in some:
            print(f"  {word}: {name}")
    passed, skipped = len(ran.of("passed")), len(ran.of("skipped"))
    print(f"{passed + len(unstable)} passed, {len(failed)} failed, {skipped} skipped, {len(unstable)} unstable;"
          f" {len(ran.left)} of {len(names)} are left for other days")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
