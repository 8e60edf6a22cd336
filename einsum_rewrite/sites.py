"""Where in the user's code an einsum stands: file, line, module, and the equation as it was typed."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from moe_export.einsum_rewrite.amount import Amount
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.plan import Plan
from moe_export.errors import EquationError

LIBRARIES = frozenset({"torch", "einops", "opt_einsum", "einsum_rewrite"})
"""Folders of the packages that call einsum for the user; the line that counts is the one that called them."""

CALL_LINES = 12
"""How far behind the first line of a call its equation is looked for."""


@dataclass(frozen=True)
class Site:
    """One einsum of a model, and what became of it.

    Attributes:
        file: The user's file, or None if the trace does not tell.
        line: The line in it.
        module: The path of the `nn.Module` that was running; "" for the outermost one.
        equation: The equation as it was typed, where it can be found, else in torch's letters.
        plan: The steps that took its place.
        node: The name of the node, for graphs that do not know the user's code.
        kept: The user wanted this one to stay an Einsum.
    """

    file: str | None
    line: int | None
    module: str
    equation: str
    plan: Plan
    node: str = ""
    kept: bool = False

    @property
    def became(self) -> str:
        """The kinds of steps: `unsqueeze, multiply`."""
        return "einsum (kept)" if self.kept else self.plan.summary

    @property
    def flops(self) -> Amount:
        """Multiplications and additions: a number, or a formula of the dynamic sizes."""
        return self.plan.flops

    @property
    def largest(self) -> Amount:
        """Elements of the largest value that was made."""
        return self.plan.largest

    @property
    def where(self) -> str:
        """`file:line`, as editors and terminals understand it, or else the node."""
        if self.file:
            return f"{self.file}:{self.line}"
        return f"node {self.node!r}" if self.node else "unknown place"

    def __str__(self) -> str:
        inside = f" in {self.module}" if self.module else ""
        return f"{self.where}{inside}: {self.equation!r} became {self.became}"


def site_of(meta: Mapping[str, Any], equation: Equation, plan: Plan) -> Site:
    """Read the place of a node from the metadata that `torch.export` leaves on it."""
    file, line = user_frame(meta.get("stack_trace") or "")
    typed = None
    if file and line:
        line, typed = typed_equation(equation, file, line)
    return Site(file, line, module_path(meta), typed or equation.text, plan)


def module_path(meta: Mapping[str, Any]) -> str:
    """The path of the innermost module on the stack."""
    stack = list((meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def user_frame(trace: str) -> tuple[str | None, int | None]:
    """The innermost frame of a stack trace that lies in none of `LIBRARIES`."""
    frames = [(match["file"], int(match["line"])) for match in _FRAME.finditer(trace)]
    for file, line in reversed(frames):
        if not LIBRARIES & set(PurePath(file).parts[:-1]):
            return file, line
    return frames[-1] if frames else (None, None)


_STRING = re.compile(r"""(?P<quote>["'])(?P<text>[\w\s.,>-]*)(?P=quote)""")


def typed_equation(equation: Equation, file: str, line: int) -> tuple[int, str | None]:
    """Where the user typed an equation, and how; einops spells it otherwise than the trace does.

    `torch.export` records only the frames of `forward`. If the equation is not at the line that they name, it
    is in a method that was called there: then its only occurrence in the file is the place.
    """
    found = _equations_in(file).get(equation.letters, ())
    for at, text in found:
        if line <= at < line + CALL_LINES:
            return (line if "einsum" in linecache.getline(file, line) else at), text
    if len(found) == 1:
        return found[0]
    spellings = {text for _, text in found}
    return line, spellings.pop() if len(spellings) == 1 else None


@lru_cache(maxsize=256)
def _equations_in(file: str) -> dict[str, list[tuple[int, str]]]:
    """All strings of a file that can be read as equations, by their letters, with their lines."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number, code in enumerate(linecache.getlines(file), 1):
        for match in _STRING.finditer(code):
            text = match["text"]
            for letters in {_letters(text, "torch"), _letters(text, "einops")} - {None}:
                found.setdefault(str(letters), []).append((number, text))
    return found


def _letters(text: str, notation: Any) -> str | None:
    try:
        return Equation.parse(text, notation).letters
    except EquationError:
        return None
