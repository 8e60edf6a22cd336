"""Every error that a user can cause: what happened, where, and what to do about it.

One base class, one exit code a class. The command line prints these without a traceback; anything else that escapes is
a defect of this project and keeps its traceback. `RefusedError` is none of them: whoever tries something catches it.
"""

from __future__ import annotations

DEFECT = 70
"""What sysexits.h calls EX_SOFTWARE: an exception that is no `MoeExportError` is a defect of this project."""
SIGNALLED = 128
"""As shells have it: a command that a signal ended has 128 and the signal's number."""
INTERRUPTED = SIGNALLED + 2
READER_GONE = SIGNALLED + 13


class MoeExportError(Exception):
    """A mistake that the user can mend.

    Args:
        what: What went wrong, one sentence, naming the thing it is about.
        where: The place: `file:line`, a module path, or an equation with a caret below it.
        hint: What to do next.

    The exit codes: 0 equal, 1 not equal, 2 wrong use or unreadable input, 3 cannot be exported,
    4 a required backend is missing, 5 unfinished: a time limit cut the comparison off; 70 a defect of this project,
    128 + N ended by signal N.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines += [f"  {line}" for line in f"where: {self.where}".splitlines()]
        if self.hint:
            lines += [f"  {line}" for line in f"hint: {self.hint}".splitlines()]
        return "\n".join(lines)


class UsageError(MoeExportError):
    """The command, an option or an input file cannot be understood (exit code 2)."""


class EquationError(UsageError, ValueError):
    """An einsum equation is malformed or does not fit its operands (exit code 2)."""


class NotExportableError(MoeExportError):
    """The model has no faithful form in ONNX under the given options (exit code 3)."""

    exit_code = 3


class MissingBackendError(MoeExportError):
    """A backend that the user requires is not installed or has no device (exit code 4)."""

    exit_code = 4


class DiedError(MoeExportError):
    """The model ended the process that it ran in: a crash, an exit, too little memory (exit code 2)."""


class RefusedError(Exception):
    """Something was recognised up to a point, and is not what it looked like.

    Who catches it leaves the model as it was and says so in a note; a user sees it as an error only where the form was
    insisted on.

    Attributes:
        reason: In words that follow a colon.
        where: `file:line` of the model, if that is known.
    """

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where
