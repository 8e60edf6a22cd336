"""Every error that a user can cause: what happened, where, and what to do about it.

One base class, one exit code a class. The command line prints these without a traceback; anything else that escapes is
a defect of this project and keeps its traceback. `RefusedError` is none of them: whoever tries something catches it.

`Code` is the table of reasons for which a model, or a part of it, is not exported as it is wished. Each has a section
in docs/refusals.md, which `moe-export explain` prints.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

DEFECT = 70
"""What sysexits.h calls EX_SOFTWARE: an exception that is no `MoeExportError` is a defect of this project."""
SIGNALLED = 128
"""As shells have it: a command that a signal ended has 128 and the signal's number."""
INTERRUPTED = SIGNALLED + 2
READER_GONE = SIGNALLED + 13


class Code(Enum):
    """Why something is refused, by what a user does about it: a number that stays the same, and a title.

    The families: 1 tracing, 2 sizes, 3 operators of ONNX, 4 loops, 5 experts and gates, 6 engines and ranks,
    7 what is handed in and out, 8 weights and processes.
    """

    VALUES_DECIDE = ("MX101", "The values of tensors decide what is computed")
    NOT_TRACEABLE = ("MX102", "A line runs, but not while it is traced")
    RANDOM = ("MX103", "The outputs are random")
    STATE = ("MX104", "A call leaves something behind that changes the next one")
    FIXED_SIZE = ("MX201", "A size is fixed by the model's code")
    NUMBER_FROM_SIZE = ("MX202", "A free size stands where ONNX takes a number")
    NO_OPERATOR = ("MX301", "An operator has no ONNX form")
    OPSET = ("MX302", "An operator has no form at this opset")
    INVALID_GRAPH = ("MX303", "The graph that was made is not valid")
    COMPLEX = ("MX304", "An operator of complex numbers has no form")
    EINSUM = ("MX305", "An Einsum of an ONNX file cannot be replaced")
    LOOP = ("MX401", "A loop over a length is not folded")
    LOOP_FORM = ("MX402", "A loop does not have the form that was asked for")
    NO_STEP = ("MX403", "The model has no step")
    NO_DECODER = ("MX404", "The model has no decoder")
    EXPERTS = ("MX501", "A loop over experts stays as it was written")
    TOKEN_COUNT = ("MX502", "A condition asks about the tokens of an expert")
    EXPERTS_FORM = ("MX503", "The experts do not have the form that was asked for")
    EXPERT_BODY = ("MX504", "An expert cannot be translated")
    GATE = ("MX505", "A gate cannot be cut out")
    ENGINE = ("MX601", "TensorRT refuses the graph")
    NO_RANKS = ("MX602", "There are no experts to spread over ranks")
    RANKS_FORM = ("MX603", "The experts cannot be spread over ranks in this form")
    NO_OUTPUT = ("MX701", "The model returns no tensor")
    UNLIKE_ONNX = ("MX702", "An input or an output is sparse, nested or inside an object")
    FROZEN_MODULE = ("MX703", "A module is TorchScript, or quantized")
    KERNEL = ("MX704", "A GPU kernel has no form in plain PyTorch")
    GENERATION = ("MX705", "A model is called through its generation loop")
    WEIGHT_VALUES = ("MX801", "The values of a weight are needed, and are not in memory")
    KILLED = ("MX802", "The process was killed while it exported")

    def __init__(self, number: str, title: str) -> None:
        self.number = number
        self.title = title

    def mark(self, text: str) -> str:
        """A message or a note with the number at the end of its first line: `the loop cannot be folded [MX401]`."""
        first, *more = text.split("\n", 1)
        return "\n".join((f"{first} [{self.number}]", *more))


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
    """The model has no faithful form in ONNX under the given options (exit code 3).

    Args:
        what: As for `MoeExportError`; the code's number is added to it.
        code: Which section of docs/refusals.md explains it.
        where: As there.
        hint: As there.
    """

    exit_code = 3

    def __init__(self, what: str, *, code: Code, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(code.mark(what), where=where, hint=hint)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:  # mutation tests send it from one process to another
        return _unmarked, (type(self), *self.args), self.__dict__


def _unmarked(kind: type[NotExportableError], what: str) -> NotExportableError:
    return kind.__new__(kind, what)


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
