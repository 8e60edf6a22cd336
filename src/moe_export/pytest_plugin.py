"""A pytest plugin: `pytest --moe-export model.py`, and the fixture `assert_equivalent`.

pytest loads it in every run, so nothing heavy is imported before it is used.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("moe-export", "export models to ONNX and verify the graphs")
    group.addoption(
        "--moe-export",
        action="append",
        default=[],
        metavar="MODEL.PY[:CLASS]",
        help="Export this model and verify its graphs, as a test (repeatable).",
    )
    group.addoption(
        "--moe-export-args",
        default="",
        metavar="OPTIONS",
        help="Further options of `moe-export`, in one string: '--opset 18 --thorough'.",
    )


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add a test for each model."""
    for model in session.config.getoption("--moe-export"):
        items.append(ExportItem.from_parent(session, name=f"moe-export {model}", model=model))


class NotEqualError(Exception):
    """An export failed, or its graphs are not equal to the model."""


class ExportItem(pytest.Item):
    """Exports a model into a folder of its own; passes where `moe-export` exits with 0."""

    def __init__(self, *, model: str, **options: Any) -> None:
        super().__init__(**options)
        self.model = model

    def runtest(self) -> None:
        """Export and verify."""
        with TemporaryDirectory(prefix="moe-export-") as folder:
            args = [*shlex.split(self.config.getoption("--moe-export-args")), "-o", folder]
            # A process of its own: a model file that ends it would end the whole run, and with exit code 0.
            command = [sys.executable, "-m", "moe_export", self.model, *args]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
        if done.returncode:
            raise NotEqualError(f"moe-export {self.model} exits with {done.returncode}\n\n{done.stdout}")

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The report, without a traceback of pytest's."""
        if isinstance(excinfo.value, NotEqualError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it stands: the model's file."""
        return Path(self.model.split(":")[0]), None, self.name


@pytest.fixture
def assert_equivalent() -> Callable[..., Any]:
    """`assert_equivalent(module, inputs, onnx_path)`: see `moe_export.equivalence`."""
    from moe_export import equivalence

    return equivalence.assert_equivalent
