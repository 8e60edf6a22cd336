"""Run mutants in a process of their own: some crash onnxruntime, and the process with it.

A mutant whose process died counts as caught, and a new process continues with the next. Nothing heavy is imported here.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe_export.comparing.mutant_result import MutantResult, result_of
from moe_export.errors import MoeExportError

DIED = "onnxruntime died"


@dataclass(frozen=True)
class Request:
    """The arguments of `mutate`.

    Attributes:
        graph: The file of the right graph.
        against: The file of the model that it was made from.
        init, inputs: As for `verify`.
        rtol, atol: As for `verify`.
        seed: Of the inputs, and of the elements that are changed.
        thorough: Whether the check tries every regime.
        limit: The most mutants of each kind; 0 for all.
        kinds: The kinds of mutants to try; empty for all.
        inside: Whether the check compares nodes, too.
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
class Trial:
    """The results of all mutants.

    Attributes:
        results: One for each mutant, in order.
        cases: The number of cases of the check.
    """

    results: tuple[MutantResult, ...]
    cases: int


def try_apart(request: Request) -> Trial:
    """Try every mutant of a graph.

    Raises:
        MoeExportError: The check itself cannot be run, or the process died before the first mutant.
    """
    results: list[MutantResult] = []
    facts: dict[str, Any] = {}
    while "done" not in facts:
        _one_process(request, results, facts)
    return Trial(tuple(results), facts["cases"])


def _one_process(request: Request, results: list[MutantResult], facts: dict[str, Any]) -> None:
    """Try mutants in a new process, starting with the first that has no result, until all are tried or it dies."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(request, len(results), there), daemon=True)
    process.start()
    there.close()
    running: MutantResult | None = None
    try:
        while "done" not in facts:
            message = here.recv()
            if isinstance(message, MoeExportError):
                raise message
            if isinstance(message, Mapping):
                facts.update(message)
            elif isinstance(message, MutantResult) and message.outcome == "":
                running = message
            else:
                results.append(message)
                running = None
    except EOFError:
        process.join()
        if running is None:  # it died before it tried a mutant, and a new process would do the same
            raise MoeExportError(
                f"the process that tries mutants of {request.graph} died with exit code {process.exitcode}"
            ) from None
        results.append(MutantResult(running.kind, running.node, running.what, "caught", DIED))
    finally:
        here.close()
        if "done" not in facts:  # interrupted: the process may be in the middle of a long run
            process.terminate()
        process.join()


def _work(request: Request, first: int, connection: Connection) -> None:
    """In the other process: for each mutant, send that it is being tried (no outcome), then its result."""
    from moe_export.comparing.mutation_testing import all_mutants, open_check
    from moe_export.export.tracing.trace import quiet
    from moe_export.verify import Tolerance
    from moe_export.verify.mutants.mutant import by_kind

    try:
        with quiet(), TemporaryDirectory(prefix="moe-export-") as folder:
            check = open_check(
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
            mutants = all_mutants(check.model, check.cases[0].inputs, request.seed)
            chosen = [mutant for mutant in mutants if not request.kinds or mutant.kind in request.kinds]
            chosen = by_kind(chosen, request.limit)
            connection.send({"cases": len(check.cases)})
            for mutant in chosen[first:]:
                connection.send(result_of(mutant, ""))
                connection.send(check.try_mutant(mutant, Path(folder)))
            connection.send({"done": True})
    except MoeExportError as error:
        error.__cause__ = error.__context__ = None
        connection.send(error)
    finally:
        connection.close()
