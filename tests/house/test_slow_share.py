"""The daily share of the slow tests: each comes in its turn, and what fails is tried once more."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "slow_share.py"
sys.path.insert(0, str(SCRIPT.parent))
import slow_share  # noqa: E402

NAMES = [f"tests/test_{file}.py::test_{number}" for file in "abcdef" for number in range(40)]


def test_each_test_is_first_on_one_day_of_a_week():
    first = []
    for day in range(739_000, 739_000 + slow_share.DAYS):
        order = slow_share.in_order(NAMES, day)
        assert sorted(order) == sorted(NAMES)
        own = [name for name in NAMES if slow_share.share_of(name) == day % slow_share.DAYS]
        assert sorted(order[: len(own)]) == sorted(own)
        first += own
    assert sorted(first) == sorted(NAMES)
    assert max(map(first.count, NAMES)) == 1


def test_shares_are_of_one_size_and_a_test_keeps_its_own():
    sizes = [sum(slow_share.share_of(name) == share for name in NAMES) for share in range(slow_share.DAYS)]
    assert min(sizes) > 0.5 * len(NAMES) / slow_share.DAYS
    assert [slow_share.share_of(name) for name in ("a::b", "c::d", "e::f")] == [3, 0, 5]


def test_tests_of_a_file_stay_together_and_files_change_places():
    orders = set()
    for week in range(6):
        day = 739_000 + week * slow_share.DAYS
        order = slow_share.in_order(NAMES, day)
        files = [
            name.partition("::")[0] for name in order if slow_share.share_of(name) == day % slow_share.DAYS
        ]
        assert len([1 for one, other in pairwise(files) if one != other]) + 1 == len(set(files))
        orders.add(tuple(dict.fromkeys(files)))
    assert len(orders) > 1


TESTS = """
import os, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.slow
here = Path(__file__).parent

def test_good(): pass
def test_skipped(): pytest.skip("not here")
@pytest.mark.parametrize("word", ["a b", "c::d"])
def test_words(word): assert word
"""
UNSTABLE = """
def test_unstable():
    there = (here / "seen").exists()
    (here / "seen").touch()
    assert there
"""
BAD = "def test_bad(): assert False\n"
CRASHES = "def test_crashes(): os._exit(0)\n"
LONG = "def test_long(): time.sleep(60)\n"
DEAF = """
def test_deaf():
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
    assert False, "the signal that the time is up went astray"
"""
FAST = "def test_fast(): assert False, 'no slow test'\n"


@pytest.fixture
def share(tmp_path):
    """Run the share of some tests; the exit code, and what was said."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: long\n")

    def share(*texts, minutes=2.0):
        (tmp_path / "test_them.py").write_text(TESTS + "".join(texts))
        (tmp_path / "test_fast.py").write_text(FAST)
        command = [
            sys.executable,
            str(SCRIPT),
            "--folder",
            str(tmp_path),
            "--minutes",
            str(minutes),
            "--day",
            "739000",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        return done.returncode, done.stdout

    return share


def test_what_fails_once_is_unstable_and_what_fails_twice_is_red(share):
    """One that ends its process has failed, and the rest runs in another."""
    code, said = share(UNSTABLE, BAD, CRASHES)
    assert code == 1, said
    assert "  UNSTABLE: test_them.py::test_unstable\n" in said
    assert "  FAILED TWICE: test_them.py::test_bad\n" in said
    assert "  FAILED TWICE: test_them.py::test_crashes\n" in said
    last = "4 passed, 2 failed, 1 skipped, 1 unstable; 0 of 7 are left for other days\n"
    assert said.endswith(last)


def test_the_time_is_kept_and_what_it_cuts_off_has_not_failed(share):
    code, said = share(LONG, minutes=0.3)
    assert code == 0, said  # unstable, or left: that is green
    assert " 0 failed," in said
    assert said.rstrip().endswith("are left for other days")
    assert "0 of 5" not in said


def test_what_fails_of_the_signal_that_the_time_is_up_has_not_failed(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: long\n")
    (tmp_path / "test_them.py").write_text(TESTS + DEAF)
    name = "test_them.py::test_deaf"
    ran = slow_share.run([name], tmp_path, time.monotonic() + 8)
    assert (ran.outcomes, ran.left) == ({}, [name])


def test_tests_that_cannot_be_collected_are_red(share):
    assert share("import nothing_of_this_name\n")[0] != 0
