"""Where in the user's code an einsum stands: file, line, module, and the equation as it was typed."""

from __future__ import annotations

import linecache
import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    file: str | None
    line: int | None
    module: str
    equation: str
    plan: Plan

    @property
    def became(self) -> str:
        """The kinds of steps: `unsqueeze, multiply`."""
        return self.plan.summary

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
        """`file:line`, as editors and terminals understand it."""
        return f"{self.file}:{self.line}" if self.file else "unknown place"

    def __str__(self) -> str:
        inside = f" in {self.module}" if self.module else ""
        return f"{self.where}{inside}: {self.equation!r} became {self.became}"


def site_of(meta: Mapping[str, Any], equation: Equation, plan: Plan) -> Site:
    """Read the place of a node from the metadata that `torch.export` leaves on it."""
    file, line = user_frame(meta.get("stack_trace") or "")
    typed = typed_equation(equation, file, line) if file and line else None
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


def typed_equation(equation: Equation, file: str, line: int) -> str | None:
    """The string near a line that means the same equation; einops spells it otherwise than the trace does."""
    wanted = equation.letters
    for offset in range(CALL_LINES):
        for match in _STRING.finditer(linecache.getline(file, line + offset)):
            text = match["text"]
            if wanted in {_letters(text, "torch"), _letters(text, "einops")}:
                return text
    return None


def _letters(text: str, notation: Any) -> str | None:
    try:
        return Equation.parse(text, notation).letters
    except EquationError:
        return None
