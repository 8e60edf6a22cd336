"""What the command line says: results on stdout, progress and notes on stderr; plain where it is no terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TextIO

from moe_export.supervisor import under_way

_LONG = 1.0
"""Seconds from which on a step stays on the screen."""


@dataclass(frozen=True)
class Console:
    """How much to say.

    Attributes:
        quiet: Only errors.
        as_json: Only one JSON document, on stdout.
        verbose: Reports list every case.
        out: Where the result goes, whatever stdout is while the user's code runs.
    """

    quiet: bool = False
    as_json: bool = False
    verbose: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show that a long step is under way: a spinner on a terminal, a line with its seconds elsewhere."""
        with under_way(name), self._shown(name):
            yield

    def _shown(self, name: str) -> AbstractContextManager[Any]:
        if self.quiet or self.as_json:
            return nullcontext()
        if sys.stderr.isatty():
            return _spinning(name)
        return _timed(name)

    def say(self, text: str = "") -> None:
        """A line of the result."""
        if not (self.quiet or self.as_json):
            text = _fitted(text) if self.out.isatty() else text
            # `view` says where it serves and then waits, also into a pipe
            print(text, flush=True, file=self.out)

    @contextmanager
    def user_code(self) -> Iterator[None]:
        """While it runs, what the user's code prints does not mix with the result: it goes to stderr, or nowhere."""
        if not self.quiet:
            with redirect_stdout(sys.stderr):
                yield
            return
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield

    def json(self, text: str) -> None:
        """The one JSON document, where it was asked for."""
        if self.as_json:
            print(text, file=self.out)


@contextmanager
def _spinning(name: str) -> Iterator[None]:
    """A spinner while a step runs; one that took its time stays on the screen with its seconds."""
    from rich.console import Console as Rich

    rich, start = Rich(stderr=True, highlight=False), time.perf_counter()
    with rich.status(f"{name} ..."):
        yield
    seconds = time.perf_counter() - start
    if seconds >= _LONG:
        rich.print(f"{name}: {seconds:.1f} s", style="dim", markup=False)


def _fitted(text: str) -> str:
    """Lines no wider than the terminal, broken between words; what continues a line is indented further."""
    width, lines = max(shutil.get_terminal_size().columns, 40), []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


@contextmanager
def _timed(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
