"""Verify a model that does not fit in memory block by block, each block with its own weights and its part of the graph.

```
torch:  layers.0 ─▶ layers.1 ─▶ ... ─▶ head         the weights of one block at a time are in memory
           │ its output  │
graph:  [part of]   [part of]                       each part takes PyTorch's values, and its outputs are compared
```
The model is run once per case as its author wrote it; a block's weights are loaded when it is called and freed when it
returns. The graph is cut where values leave a block (`layerwise_graph`); onnxruntime runs each part on PyTorch's values
at the cut, replaying PyTorch's choices of experts. So a fault shows up in its own block and in no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moe_export.errors import MoeExportError
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.simplify import as_numpy
from moe_export.export.pipeline import Graph
from moe_export.export.tracing.dims import Dim
from moe_export.export.tracing.trace import quiet
from moe_export.export.weights.lazy import in_memory
from moe_export.large.layerwise_graph import CutGraph, Part, nearest
from moe_export.large.layerwise_part import PartRunner
from moe_export.large.layerwise_torch import Ran, Seen, called_once, find_blocks, run_blocks
from moe_export.verify import (
    Array,
    Case,
    CaseResult,
    Choice,
    DimRange,
    Judgement,
    Report,
    Tolerance,
    cases,
    judge,
)
from moe_export.verify.inputs.known import NOTHING, Known
from moe_export.verify.inputs.meaning import Meaning
from moe_export.verify.judging.replay import judge_within
from moe_export.verify.reports.findings import Outcome
from moe_export.verify.runner import one_line
from moe_export.verify.specs import is_float

MOST = 2**34
"""The most bytes of weights that one block may have, and the model outside its blocks."""
HEAD = "after the blocks"
_MANY = 64
"""The second case has this many times the example's length, so that most experts get tokens."""


def filled_weights(graph: Graph) -> AbstractContextManager[None]:
    """A context in which the weights of a graph's reference are in memory; used for gates, which have few."""
    return in_memory(graph.reference.module)


def verify_blocks(
    path: Path,
    reference: Subject,
    example: Mapping[str, torch.Tensor],
    dims: Sequence[Dim],
    tolerance: Tolerance,
    seed: int = 0,
    folder: Path | None = None,
    about: Mapping[str, str] | None = None,
) -> tuple[Report, list[tuple[Case, Ran]]]:
    """Compare a graph with a model block by block.

    Args:
        path: The graph.
        reference: The model, its inputs named like the graph's; its weights may be in files.
        example: Inputs of the traced sizes.
        dims: The graph's dynamic dimensions.
        tolerance: For floats.
        seed: Of the inputs.
        folder: The folder of the files that the graph refers to, if the graph is temporarily elsewhere.
        about: Facts for the report.

    Returns:
        A report with one result per part and case, and PyTorch's run of each case. The verdict is "equal" only if every
        block, and the parts before and after them, could be compared; `about["blocks"]` says which were.

    Raises:
        UsageError: A block is larger than memory; the graph's data files are not those that it was written with.
    """
    with quiet():
        blocks = called_once(reference, find_blocks(reference.module))
        graph = CutGraph(path, blocks, folder)
        with_nodes = {
            _list_of(part.block) for part in graph.parts() if part.nodes and part.name == part.block
        }
        # a list without any nodes of its own, such as experts that the export wrote as one, is part of what holds it
        if any(_list_of(block) not in with_nodes for block in blocks):
            blocks = [block for block in blocks if _list_of(block) in with_nodes]
            graph = CutGraph(path, blocks, folder)
        plan = _plan(graph, example, dims, seed)
        runs = list(_runs(reference, plan, blocks))
        states = [_State(case, ran, dict(case.inputs)) for case, ran in runs]
        walk = _Walk(graph, tolerance, states)
        results = [result for part in graph.parts() for result in walk.run(part)]
        results += walk.finish()
    described = _described(blocks, results, graph) + _unchosen(blocks, [ran for _, ran in runs])
    report = Report(
        "torch",
        "onnxruntime-cpu, block by block",
        tuple(results),
        len({result.sizes for result in results}),
        None,
        {**(about or {}), "blocks": described},
    )
    return report, runs


def _plan(
    graph: CutGraph, example: Mapping[str, torch.Tensor], dims: Sequence[Dim], seed: int
) -> Callable[[Known], list[Case]]:
    """The example and up to three cases of other sizes, one with many tokens first, by what is known of ids."""
    specs = graph.specs()
    arrays = {spec.name: as_numpy(example[spec.name]) for spec in specs}
    ranges = [DimRange(dim.name, dim.traced, dim.minimum, dim.maximum) for dim in dims]
    at = [{dim.name: min(_MANY * dim.traced, dim.maximum or _MANY * dim.traced)} for dim in dims[-1:]]

    def plan(known: Known) -> list[Case]:
        first, *others = cases(specs, ranges, arrays, seed, at=at, known=known)
        wide = {**first.sizes, **(at[0] if at else {})}
        other = [case for case in others if case.sizes != first.sizes]
        return [first, *sorted(other, key=lambda case: dict(case.sizes) != wide)[:3]]

    return plan


def _runs(
    reference: Subject, plan: Callable[[Known], list[Case]], blocks: list[str]
) -> Iterator[tuple[Case, Ran]]:
    """PyTorch's runs of the example, and of the first other case that the model accepts.

    Ids are drawn from the whole table, as those of the example choose few experts; from the example's where the model
    takes no others.
    """
    first, *narrow = plan(NOTHING)
    ran = run_blocks(reference, first.inputs, blocks, MOST)
    yield first, ran
    ids = {name: Meaning(within) for name, within in ran.tables.items() if within[0] <= within[1]}
    for case in (*(plan(Known(meanings=ids))[1:] if ids else ()), *narrow):
        try:
            ran = run_blocks(reference, case.inputs, blocks, MOST)
        except MoeExportError:
            raise
        except Exception:  # the model may raise anything at sizes, and for ids, that it does not accept
            continue
        yield case, ran
        return


def _described(blocks: Sequence[str], results: Sequence[CaseResult], graph: CutGraph) -> str:
    """A sentence on which blocks were compared, and which were not."""
    missing = [block for block in blocks if any(r.outcome == "refused" and _is_of(r, block) for r in results)]
    if not blocks:
        return "the model has no repeated blocks that are called once each: it was compared in one part"
    done = len(blocks) - len(missing)
    text = f"{done} blocks and what is before and after them checked, block by block; the whole was not run at once"
    if missing:
        text += f"; not checked: {', '.join(missing)}"
    left = graph.count - len(graph.covered)
    return f"{text}; {left} nodes are in no part" if left else text


def _unchosen(blocks: Sequence[str], runs: Sequence[Ran]) -> str:
    """A clause on experts that no token chose: their weights have not been tested."""
    lines = []
    for block in blocks:
        choices = zip(*(run.blocks[block].chose for run in runs), strict=False)
        for taken in choices:
            count = taken[0].scores.shape[-1]
            left = count - len({int(expert) for choice in taken for expert in choice.ids.reshape(-1)})
            if left:
                lines.append(f"{left} of {count} in {block}")
    return f"; experts that no token chose: {', '.join(lines)}" if lines else ""


def _is_of(result: CaseResult, block: str) -> bool:
    return result.label.split(",", 1)[0] == block


@dataclass
class _State:
    """The progress of one case through the parts of the graph.

    Attributes:
        case: The case.
        ran: PyTorch's run of it.
        values: Values of the graph so far: PyTorch's where they could be matched, else the graph's own.
        outputs: The graph's outputs, from its own parts.
    """

    case: Case
    ran: Ran
    values: dict[str, Array]
    outputs: dict[str, Array] = field(default_factory=dict)


def _list_of(block: str) -> str:
    """The path of the list that a block is a member of."""
    return block.rpartition(".")[0]


class _Walk:
    """Runs the parts of a graph, in order, on PyTorch's values, and judges them."""

    def __init__(self, graph: CutGraph, tolerance: Tolerance, states: Sequence[_State]) -> None:
        self._graph, self._tolerance, self._states = graph, tolerance, states
        self._number = 0
        self._stopped = ""

    def run(self, part: Part) -> list[CaseResult]:
        """Run one part on every case; a result for each."""
        self._number += 1
        if self._stopped or not part.nodes:
            reason = self._stopped or "no node of the graph comes from it"
            return [self._result(state, part, "refused", reason) for state in self._states]
        runner = PartRunner(self._graph, part)
        results = []
        for state in self._states:
            seen = state.ran.blocks.get(part.block, Seen())
            try:
                got, own = runner.run(state.values, seen.chose if part.name == part.block else ())
            except MoeExportError as error:
                self._stopped = f"{part.name or HEAD} could not be run"
                results.append(self._result(state, part, "failed", one_line(error)))
                continue
            state.outputs |= {name: got[name] for name in self._graph.outputs if name in got}
            results.append(self._judged(state, part, seen, got, own))
        return results

    def _judged(
        self, state: _State, part: Part, seen: Seen, got: Mapping[str, Array], own: tuple[Choice, ...]
    ) -> CaseResult:
        """Compare a block's part with the block's outputs, or the part before a block with the block's inputs.

        Later parts get PyTorch's values in place of the part's.
        """
        expected = seen.gave if part.name == part.block else seen.took
        state.values |= got
        rows: list[Judgement] = []
        for name, leaf in _matched(got, expected, self._tolerance).items():
            right = expected[leaf].reshape(got[name].shape)
            label = (
                part.name if all(row.output != part.name for row in rows) else f"{part.name} output {leaf}"
            )
            rows.append(judge(label, right, got[name], self._tolerance.of(label, right.dtype.name)))
            state.values[name] = right
        if own:
            rows += self._choices(part, seen, own, expected)
        if not rows and part.block and part.name == part.block:
            reason = "no value that leaves it in the graph is an output of the module"
            return self._result(state, part, "refused", reason)
        return self._result(state, part, "compared", rows=rows)

    def _choices(
        self, part: Part, seen: Seen, own: Sequence[Choice], gave: Sequence[Array]
    ) -> Iterator[Judgement]:
        """Judgements of scores that differ and of choices that differ.

        Float32 scores may come from float16 values, so they are judged by the narrowest type that the block returns.
        """
        types = [leaf.dtype for leaf in gave if is_float(leaf.dtype)]
        for index, (choice, mine) in enumerate(zip(seen.chose, own, strict=True)):
            narrow = min([*types, choice.scores.dtype], key=lambda dtype: dtype.itemsize).name
            label = f"scores {index} of {part.name}"
            scores = judge(label, choice.scores, mine.scores, self._tolerance.of(label, narrow))
            if not scores.ok:
                yield scores
            off = scores.max_abs if scores.ok and not math.isnan(scores.max_abs) else 0.0
            row = judge_within(f"choice {index} of {part.name}", choice, mine.ids, self._tolerance, off)
            if row.flips or not row.ok or row.undecided:
                yield row

    def finish(self) -> list[CaseResult]:
        """Compare the graph's outputs, from its own parts, with the model's."""
        self._number += 1
        results = []
        for state in self._states:
            right = state.ran.outputs
            rows = [
                judge(
                    name,
                    right[name],
                    state.outputs.get(name),
                    self._tolerance.of(name, right[name].dtype.name),
                )
                for name in self._graph.outputs
                if name in right
            ]
            part = Part(HEAD, "", (), (), ())
            results.append(
                self._result(state, part, "refused", self._stopped)
                if self._stopped
                else self._result(state, part, "compared", rows=rows)
            )
        return results

    def _result(
        self,
        state: _State,
        part: Part,
        outcome: Outcome,
        reason: str | None = None,
        rows: Sequence[Judgement] = (),
    ) -> CaseResult:
        label = f"{part.name or HEAD}, {state.case.label}"
        case = replace(state.case, label=label, sizes={**state.case.sizes, "part": self._number})
        return CaseResult.of(case, outcome, reason, tuple(rows))


def _matched(got: Mapping[str, Array], expected: Sequence[Array], tolerance: Tolerance) -> dict[str, int]:
    """The index of the module's tensor that each of a part's values is, by the value's name.

    Of several values nearest to the same tensor, the closest is matched, and all that equal it within the tolerance.
    """
    found: dict[int, list[tuple[float, str]]] = {}
    for name, value in got.items():
        best = nearest(value, expected)
        if best is not None and (is_float(value.dtype) or best[1] == 0):
            found.setdefault(best[0], []).append((best[1], name))
    matched: dict[str, int] = {}
    for leaf, names in sorted(found.items()):
        first, *others = sorted(names)
        matched[first[1]] = leaf
        for _, name in others:
            right = expected[leaf].reshape(got[name].shape)
            if judge(name, right, got[name], tolerance.of(name, right.dtype.name)).ok:
                matched[name] = leaf
    return matched
