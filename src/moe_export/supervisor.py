"""The process that a terminal starts only watches; the work runs in its child, which hands over a verdict.

A model file is a program of its own, and the engines that run graphs are C++: either may end the process that it runs
in, and a process that ended says nothing about two outputs being equal. So the exit code of a command is never the
exit status of the process that did the work. The child writes its verdict into memory that both share, as the last
thing that our code does; where there is none, the parent says so, with the step that had begun and the signal.

Parent and child are one process until the fork, and nothing heavy is imported before it: streams, terminal, arguments
and process group are the same, and a command takes some 20 ms longer.

    moe-export net.py ── fork ──▶ loading ▶ tracing ▶ verifying ▶ verdict 0
          │ waits                    │         │          ✗ SIGSEGV: no verdict
          ◀──────────── step, verdict ─────────┴──────────┴──▶ "killed by SIGSEGV while verifying net.onnx", exit code 3
"""

from __future__ import annotations

import errno
import faulthandler
import mmap
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Any, NoReturn

from moe_export.errors import (
    DEFECT,
    INTERRUPTED,
    READER_GONE,
    SIGNALLED,
    Code,
    MoeExportError,
    NotExportableError,
    UsageError,
)

_GRACE = 5
"""Seconds that a child which is told to end has to remove its unfinished files; deep in C++ it does not hear."""
_SAME_KEY = 1.0
"""Seconds in which a second SIGINT is the same Ctrl-C: a terminal sends it to both, and the parent passes it on."""
_MORE_MEMORY = "give it more, or use smaller example inputs"
_TEXT = 8
_SIZE = 4096
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in ')
_FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Shared:
    """What the child has told so far, in memory that outlives it: byte 0 says that byte 1 is the verdict.

    Byte 2 is the exit code for a crash from now on; from byte 8 on stands the step, after its length in two bytes.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._owner = 0
        self.crash_code = UsageError.exit_code

    def own(self) -> None:
        """Only this process may write: one that the user's code forks is another."""
        self._owner = os.getpid()

    @property
    def verdict(self) -> int | None:
        """The exit code that was handed over."""
        return self._memory[1] if self._memory[0] else None

    @verdict.setter
    def verdict(self, code: int) -> None:
        if os.getpid() == self._owner:
            self._memory[1] = code
            self._memory[0] = 1

    @property
    def crash_code(self) -> int:
        """The exit code if a signal ends the work now."""
        return self._memory[2]

    @crash_code.setter
    def crash_code(self, code: int) -> None:
        self._memory[2] = code

    @property
    def step(self) -> str:
        """`while tracing`, `after tracing`."""
        length = int.from_bytes(self._memory[_TEXT - 2 : _TEXT], "little")
        return self._memory[_TEXT : _TEXT + length].decode("utf-8", "replace")

    @step.setter
    def step(self, text: str) -> None:
        if os.getpid() == self._owner:
            data = text.encode("utf-8")[: _SIZE - _TEXT]
            self._memory[_TEXT : _TEXT + len(data)] = data
            self._memory[_TEXT - 2 : _TEXT] = len(data).to_bytes(2, "little")


_shared: _Shared | None = None


@contextmanager
def under_way(step: str) -> Iterator[None]:
    """Tell whoever watches that a step has begun, and that it has ended."""
    if _shared is not None:
        _shared.step = f"while {step}"
    yield
    if _shared is not None:
        _shared.step = f"after {step}"


def exporting() -> None:
    """From here on a crash means that the model cannot be exported; before, that its file cannot be run."""
    if _shared is not None:
        _shared.crash_code = NotExportableError.exit_code


def supervise(work: Callable[[], int]) -> int:
    """Do something in a child, and wait for its verdict.

    Args:
        work: Returns an exit code. Whatever it raises is a defect of this tool, a `MoeExportError` excepted.

    Returns:
        In the child the verdict; in the parent too, or the exit code that stands for there being none.
    """
    if not hasattr(os, "fork"):
        return _guarded(work)
    try:
        shared, crashes, parent = _Shared(), tempfile.TemporaryFile(), os.getpid()  # noqa: SIM115  while both live
        child = os.fork()
    except OSError:  # no room for another process, or for its notes
        return _guarded(work)
    if child == 0:
        return _child(work, shared, crashes, parent)
    status = _wait(child)
    if shared.verdict is not None:
        return shared.verdict
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # a spinner hides the cursor, and died with it hidden
    told = _told(status, shared, _crash_line(crashes))
    print(f"error: {told}", file=sys.stderr, flush=True)
    return told.exit_code


class _EndedError(BaseException):
    """The process was told to end. No `Exception`, so that `except Exception` lets it pass."""


def _child(work: Callable[[], int], shared: _Shared, crashes: IO[bytes], parent: int) -> int:
    global _shared  # noqa: PLW0603  one process has one watcher
    _shared = shared
    shared.own()
    _end_with(parent)
    if not faulthandler.is_enabled():
        faulthandler.enable(crashes, all_threads=False)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, _interrupt)
    for number in set(_FORWARDED) - {signal.SIGINT}:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    code = _guarded(work)
    shared.verdict = code
    return code


def _end_with(parent: int) -> None:
    """Be killed when the parent is: nobody would read the verdict."""
    if sys.platform != "linux":
        return
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(DEFECT)


_interrupted = float("-inf")


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted - before > _SAME_KEY:
        raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise _EndedError(number)


def _guarded(work: Callable[[], int]) -> int:
    """Run it; the exit code, whatever it raises."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except MoeExportError as error:  # `--debug` lets it through
        _show_traceback()
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return READER_GONE
    except _EndedError as ended:
        print(f"ended by {signal.Signals(ended.args[0]).name}; nothing more was written", file=sys.stderr)
        return SIGNALLED + int(ended.args[0])
    except BaseException as error:
        step = f" {_shared.step}" if _shared is not None and _shared.step else ""
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # PyTorch's, onnxruntime's
            print(f"error: no memory is left{step}\n  hint: {_MORE_MEMORY}", file=sys.stderr)
            return UsageError.exit_code if _shared is None else _shared.crash_code
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            drop_output()  # of a result that cannot be printed the rest cannot either
            print(f"error: cannot write{step}: {error.strerror}", file=sys.stderr)
            return UsageError.exit_code
        _show_traceback()
        print(
            f"error: moe-export itself failed{step}: {type(error).__name__}\n"
            "  hint: this is a defect of moe-export; report it with the lines above and the model",
            file=sys.stderr,
        )
        return DEFECT


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()


def drop_output() -> None:
    """Let what is still to be printed go nowhere: its reader has gone, and Python would complain at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _wait(child: int) -> int:
    """The child's wait status; signals to this process are the child's meanwhile."""

    def kill(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)
        if number != signal.SIGINT:
            signal.signal(signal.SIGALRM, kill)
            signal.alarm(_GRACE)

    before: dict[int, Any] = {}
    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, forward)
    try:
        return os.waitpid(child, 0)[1]
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(status: int, shared: _Shared, line: str | None) -> MoeExportError:
    """What there is to say of a child that left no verdict."""
    step = f" {shared.step}" if shared.step else ""
    if not os.WIFSIGNALED(status):
        return UsageError(
            f"the work ended{step} without a result, with exit status {os.waitstatus_to_exitcode(status)}",
            hint="a model file, or a library that it uses, must not end the process (os._exit)",
        )
    number = os.WTERMSIG(status)
    known = {one.value: one.name for one in signal.Signals}
    if number == signal.SIGKILL:
        hint = f"most likely the machine ran out of memory; {_MORE_MEMORY}"
    else:
        hint = "a library in C or C++ crashed: the model's own kernels, PyTorch or onnxruntime"
    what = f"the work was killed by {known.get(number, number)}{step}"
    if shared.crash_code == NotExportableError.exit_code:
        return NotExportableError(what, code=Code.KILLED, where=line, hint=hint)
    return UsageError(what, where=line, hint=hint)


def _crash_line(crashes: IO[bytes]) -> str | None:
    """`file:line` of the user's innermost line when it crashed."""
    from moe_export.export.frontend.source import is_user_file

    crashes.seek(0)
    for match in _FRAME.finditer(crashes.read().decode("utf-8", "replace")):
        if is_user_file(match["file"]):
            return f"{match['file']}:{match['line']}"
    return None
