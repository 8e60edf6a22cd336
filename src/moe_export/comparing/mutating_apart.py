"""Mutants in a process of their own: some of them bring onnxruntime down, and the process with it.

What died is caught, and a new process goes on with the next. Nothing heavy is imported here.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from moe_export.errors import MoeExportError

if TYPE_CHECKING:
    from moe_export.verify.mutants.mutant import Mutant

DIED = "onnxruntime died"


@dataclass(frozen=True)
class Request:
    """What `mutate` was asked for.

    Attributes:
        graph: The right graph.
        against: The model that it was made from.
        init, inputs: As for `verify`.
        rtol, atol: As for `verify`.
        seed: Of the inputs, and of the elements that are changed.
        thorough: Whether the gate tries every kind of values.
        limit: At most so many mutants of each kind; 0 for all.
        kinds: Only these kinds; none for all.
        inside: Whether the gate looks at nodes, too.
        dtype, gate: As for `verify`.
    """

    graph: str
    against: str
    init: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    rtol: float | None = None
    atol: float | None = None
    seed: int = 0
    thorough: bool = False
    limit: int = 0
    kinds: tuple[str, ...] = ()
    inside: bool = False
    dtype: str = "float32"
    gate: str | None = None


@dataclass(frozen=True)
class Fate:
    """What became of a mutant.

    Attributes:
        kind: What kind it was.
        node: The node that was changed, or that reads the constant that was.
        what: What was wrong.
        outcome: `caught`; `survived`; `equivalent` (the same in float64 in every case); `below rounding` (in float64 it
            moves no output by as much as one rounding of the graph's type, so no output can show it); or `stillborn`
            (no graph that onnxruntime opens).
        by: The case that caught it, or why it was stillborn.
        off: How far the outputs of one that was not caught are off in float64, relative to the largest value.
    """

    kind: str
    node: str
    what: str
    outcome: str
    by: str = ""
    off: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}: {self.node}: {self.what}"


def fate_of(mutant: Mutant, outcome: str, by: str = "", off: float = 0.0) -> Fate:
    """The fate of a mutant."""
    return Fate(mutant.kind, mutant.node, mutant.what, outcome, by, off)


@dataclass(frozen=True)
class Trial:
    """What became of all mutants.

    Attributes:
        fates: In the order of the mutants.
        cases: How many cases the gate has.
    """

    fates: tuple[Fate, ...]
    cases: int


def try_apart(request: Request) -> Trial:
    """Try every mutant of a graph.

    Raises:
        MoeExportError: What stands in the way of the gate itself.
    """
    fates: list[Fate] = []
    facts: dict[str, Any] = {}
    while "done" not in facts:
        _one_process(request, fates, facts)
    return Trial(tuple(fates), facts["cases"])


def _one_process(request: Request, fates: list[Fate], facts: dict[str, Any]) -> None:
    """Try mutants from the first that has no fate, in one process, as far as that lives."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(request, len(fates), there), daemon=True)
    process.start()
    there.close()
    running: Fate | None = None
    try:
        while "done" not in facts:
            message = here.recv()
            if isinstance(message, MoeExportError):
                raise message
            if isinstance(message, Mapping):
                facts.update(message)
            elif isinstance(message, Fate) and message.outcome == "":
                running = message
            else:
                fates.append(message)
                running = None
    except EOFError:
        process.join()
        if running is None:  # it died before it tried anything: nothing would be different the next time
            raise MoeExportError(
                f"the process that tries mutants of {request.graph} died with exit code {process.exitcode}"
            ) from None
        fates.append(Fate(running.kind, running.node, running.what, "caught", DIED))
    finally:
        here.close()
        if "done" not in facts:  # interrupted, perhaps in the middle of a long run
            process.terminate()
        process.join()


def _work(request: Request, first: int, results: Connection) -> None:
    """In the other process: say what is tried, then what came of it."""
    from moe_export.comparing.mutating import all_mutants, open_gate
    from moe_export.export.tracing.trace import quiet
    from moe_export.verify import Tolerance
    from moe_export.verify.mutants.mutant import by_kind

    try:
        with quiet(), TemporaryDirectory(prefix="moe-export-") as folder:
            gate = open_gate(
                Path(request.graph),
                request.against,
                request.init,
                request.inputs,
                Tolerance(request.rtol, request.atol),
                request.seed,
                request.thorough,
                request.inside,
                dtype=request.dtype,
                gate_of=request.gate,
            )
            mutants = all_mutants(gate.model, gate.cases[0].inputs, request.seed)
            chosen = [mutant for mutant in mutants if not request.kinds or mutant.kind in request.kinds]
            chosen = by_kind(chosen, request.limit)
            results.send({"cases": len(gate.cases)})
            for mutant in chosen[first:]:
                results.send(fate_of(mutant, ""))
                results.send(gate.try_mutant(mutant, Path(folder)))
            results.send({"done": True})
    except MoeExportError as error:
        error.__cause__ = error.__context__ = None
        results.send(error)
    finally:
        results.close()
