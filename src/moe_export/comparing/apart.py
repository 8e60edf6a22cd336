"""An untouched reference: the model in a process of its own, where nothing but its own code runs.

```
load ─▶ the model, not yet run ─▶ first call ─▶ trace, fold, translate ...  the process that exports
              │ fork
              └──────────────────▶ first call ─▶ run, run, run              the reference
```
A reference that shares state with the traced model would agree with it even where both are wrong. So the process forks
after the model's file has been executed and before the model is first called. The reference has the same weights,
however they were initialised, and nothing that the export later does to modules, caches, globals or libraries can
reach it. Each of its calls starts from the state in which the model was loaded (`export.state`).

It computes on one thread: OpenMP's threads do not survive a fork, and a model's outputs must not depend on the number
of threads.

Measured: a fork takes 15 ms, a new process that imports PyTorch and loads the file again 2 to 4 s. Where forking is
impossible (Windows) or unsafe (macOS, or a file that has initialised CUDA, which a fork cannot use), the reference is a
copy of the model in the same process, made before its first call.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from torch import nn

from moe_export.comparing.checking_float64 import Float64Runner
from moe_export.comparing.checking_rounded import RoundedRunner
from moe_export.errors import DiedError, UsageError
from moe_export.export.frontend.source import last_user_line
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.trace import quiet
from moe_export.verify import Array, Choice, TorchRunner

TORCH, FLOAT64, ROUNDED_FLOAT64 = "torch", "torch-float64", "torch-float64, rounded"


class ModelRaisedError(Exception):
    """An exception of the model in the other process, raised as a subclass with the original class's name."""


class Apart:
    """A model in another process.

    Args:
        connection: The pipe to that process.
        pid: The id of that process.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection, self._pid = connection, pid
        self._end = weakref.finalize(self, _end, connection, pid, os.getpid())

    def ask(self, kind: str, method: str, arrays: Sequence[Array], *more: Any) -> Any:
        """Run the model once.

        Args:
            kind: Which runner to use (see `reference`).
            method: The runner's method: `run`, `run_watched`, `run_under` or `scores_under`.
            arrays: The model's inputs, in order.
            more: Further arguments of the method.

        Returns:
            The result of the runner's method.

        Raises:
            DiedError: The process ended while the model ran.
            UsageError: The runner refused the model's outputs.
            ModelRaisedError: The model raised an exception.
        """
        try:
            self._connection.send((kind, method, list(arrays), more))
            status, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise DiedError(
                f"the process that runs the model ended while it ran: {_how_it_ended(self._pid)}",
                hint="run the model by itself on these inputs; a crash in an operator, exit() in forward and too "
                "little memory all look like this",
            ) from error
        if status == "done":
            return answer
        if status == "refused":
            what, where, hint = answer
            raise UsageError(what, where=where, hint=hint)
        if status == "ended":
            raise DiedError(f"the model's code ended the process: {answer[0]}", where=answer[1])
        name, text = answer
        raise type(name, (ModelRaisedError,), {})(text)

    def close(self) -> None:
        """End the process."""
        self._end()


class Copy:
    """A copy of a model in the same process, made before the model's first call.

    Args:
        subject: The copy.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._runners: dict[str, Any] = {}

    def ask(self, kind: str, method: str, arrays: Sequence[Array], *more: Any) -> Any:
        """Run the model once, like `Apart.ask`."""
        if kind not in self._runners:
            self._runners[kind] = _runner(self._subject, self._subject.outputs, kind)
        inputs = dict(zip(self._subject.inputs, arrays, strict=True))
        return getattr(self._runners[kind], method)(inputs, *more)


Bind = Callable[[nn.Module], Subject]


def fork_model(bind: Bind, module: nn.Module) -> Apart | Copy | None:
    """Start the reference: a fork of this process, in which the model has not yet run.

    Args:
        bind: Binds the model to its example and runs it for the first time.
        module: The model.

    Returns:
        The fork; where this process cannot be forked, what `copy_model` returns.
    """
    if not hasattr(os, "fork") or sys.platform == "darwin" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return copy_model(bind, module)  # macOS's own libraries do not survive a fork
    here, there = Pipe()
    pid = _forked()
    if pid == 0:
        here.close()
        _serve(there, lambda: bind(module))
    there.close()
    return Apart(here, pid)


def _forked() -> int:
    """`os.fork`, after which the child never collects what the parent had left behind.

    A session of onnxruntime among that waits, when it is destroyed, for threads that the child does not have.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # Python warns of forking with threads; the child takes none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            gc.freeze()
    finally:
        if collects:
            gc.enable()
    return pid


def copy_model(bind: Bind, module: nn.Module) -> Copy | None:
    """Copy a model before it runs; None if it has parts that cannot be copied."""
    try:
        copied = copy.deepcopy(module)
    except Exception:  # a __deepcopy__ of the user's may raise anything
        return None
    return Copy(bind(copied))


def reference(subject: Subject, outputs: Sequence[str], kind: str = TORCH) -> Any:
    """The runner of a model as a reference, in the model's own process if it has one.

    Args:
        subject: The model; its inputs may be renamed, but keep the order of its file.
        outputs: Names for its outputs, in order.
        kind: `TORCH`; `FLOAT64`, with float64 outputs; `ROUNDED_FLOAT64`, with outputs rounded to the model's own
            types; or `float16` or `bfloat16`, which only its weights are rounded to.
    """
    if subject.apart is None:
        return _runner(subject, outputs, kind)
    return ApartRunner(subject.apart, kind, tuple(subject.inputs), tuple(outputs))


class ApartRunner:
    """A model in another process, as a runner.

    Args:
        apart: The process.
        kind: Which runner that process uses (see `reference`).
        inputs: Names of its inputs, in order.
        outputs: Names for its outputs, in order.
    """

    def __init__(self, apart: Any, kind: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.name = kind if kind in (TORCH, FLOAT64) else _runner_name(kind)
        self._apart, self._kind, self._inputs, self._outputs = apart, kind, inputs, outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        return self._named(self._apart.ask(self._kind, "run", self._ordered(inputs)))

    def run_watched(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """Run once; return the outputs and the choices of experts that the model made, in order."""
        outputs, choices = self._apart.ask(self._kind, "run_watched", self._ordered(inputs))
        return self._named(outputs), choices

    def run_under(
        self,
        inputs: Mapping[str, Array],
        choices: Sequence[Choice],
        rounded: tuple[int, float] | None = None,
    ) -> dict[str, Array] | None:
        """Run once as another program might (see `TorchRunner`); None if the model chooses something else."""
        found = self._apart.ask(self._kind, "run_under", self._ordered(inputs), tuple(choices), rounded)
        return None if found is None else self._named(found)

    def scores_under(
        self, inputs: Mapping[str, Array], choices: Sequence[Choice]
    ) -> tuple[Array, ...] | None:
        """The scores of each choice, the earlier ones made as given (see `TorchRunner`)."""
        found: tuple[Array, ...] | None = self._apart.ask(
            self._kind, "scores_under", self._ordered(inputs), tuple(choices)
        )
        return found

    def _ordered(self, inputs: Mapping[str, Array]) -> list[Array]:
        return [inputs[name] for name in self._inputs]

    def _named(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, outputs.values(), strict=True))


def _runner(subject: Subject, outputs: Sequence[str], kind: str) -> Any:
    if kind == TORCH:
        return TorchRunner(subject.call_named, outputs)
    if kind in (FLOAT64, ROUNDED_FLOAT64):
        return Float64Runner(subject, outputs, rounded=kind == ROUNDED_FLOAT64)
    return RoundedRunner(subject, outputs, kind)


def _runner_name(kind: str) -> str:
    return FLOAT64 if kind == ROUNDED_FLOAT64 else f"torch, weights rounded to {kind}"


def _serve(connection: Connection, make: Callable[[], Subject]) -> NoReturn:
    """In the fork: answer requests until the pipe is closed."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # the parent runs the model too, and prints the same
            os.dup2(nowhere, descriptor)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the end
        faulthandler.disable()  # the parent reports how this process ended
        torch.set_num_threads(1)
        with quiet():
            _answer(connection, make())
        code = 0
    finally:
        os._exit(code)  # exit handlers and finalizers belong to the parent


def _answer(connection: Connection, subject: Subject) -> None:
    model = Copy(subject)
    while True:
        try:
            kind, method, arrays, more = connection.recv()
        except EOFError:
            return
        try:
            reply: tuple[str, Any] = ("done", model.ask(kind, method, arrays, *more))
        except UsageError as error:
            reply = ("refused", (error.what, error.where, error.hint))
        except SystemExit as error:
            reply = ("ended", (f"sys.exit({error.code!r})", last_user_line(error)))
        except Exception as error:  # a model may raise anything
            reply = ("raised", (type(error).__name__, str(error)))
        connection.send(reply)


def _end(connection: Connection, pid: int, owner: int) -> None:
    if os.getpid() != owner:  # another fork inherited this finalizer; the process is not its to end
        return
    connection.close()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _how_it_ended(pid: int) -> str:
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return "for an unknown reason"
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
