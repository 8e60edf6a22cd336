"""`make test-matrix`: which environments it makes, and how it finds a Python."""

from __future__ import annotations

import runpy
import subprocess
import sys

from pages import ROOT

MATRIX = runpy.run_path(str(ROOT / "tests" / "matrix.py"))


def test_each_supported_python_is_tried_with_two_versions_of_pytorch():
    names = [name for name, _, _ in MATRIX["environments"](())]
    assert len(names) == 2 * len(MATRIX["PYTHONS"])
    assert [name for name, _, _ in MATRIX["environments"](("3.12", "newest"))] == ["3.12-newest"]


def test_a_python_that_is_found_has_the_version():
    version = "{}.{}".format(*sys.version_info)
    found = MATRIX["find_python"](version)
    if found is not None:  # a virtual environment of a Python that is on no path
        said = subprocess.run([found, "-V"], capture_output=True, text=True, check=True).stdout
        assert f"Python {version}." in said
    assert MATRIX["find_python"]("3.99") is None
