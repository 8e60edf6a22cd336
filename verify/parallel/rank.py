"""One rank: its graphs in order, and the exchanges with other ranks between them.

This file is independent of the transport: `Rank.steps` yields each exchange to its caller and waits for the answer. All
ranks in one process (`Together`) run step by step side by side; `group` runs each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_export.verify.parallel.manifest import Exchange, Manifest
from moe_export.verify.runner import RunFailedError
from moe_export.verify.runners.onnxruntime_runner import OnnxRuntimeRunner
from moe_export.verify.specs import Array


@dataclass(frozen=True, eq=False)
class Given:
    """The values that one rank sends in an exchange.

    Attributes:
        number: Of the exchange.
        exchange: Which.
        arrays: The values.
        rows: Of an `all_to_all`: (R,) rows for each rank, in order.
        expected: (R,) rows from each rank, where that is known beforehand.
    """

    number: int
    exchange: Exchange
    arrays: tuple[Array, ...]
    rows: Array | None = None
    expected: Array | None = None


@dataclass(frozen=True, eq=False)
class Got:
    """The values that a rank receives in an exchange.

    Attributes:
        arrays: The sums; or the rows of all ranks, one rank's behind the other's.
        rows: (R,) rows from each rank; None of a sum.
    """

    arrays: tuple[Array, ...]
    rows: Array | None = None


Steps = Generator[Given, Got, dict[str, Array]]


@dataclass(frozen=True)
class Sent:
    """What one rank sent in one exchange: measured, not computed.

    Attributes:
        layer: Of the experts.
        kind: Of the exchange.
        back: Whether rows went back to their tokens.
        rank: Who gave.
        rows: Rows for each rank; of a sum, one number: the rows of the partial sum.
        row_bytes: Of one row, all values together.
    """

    layer: int
    kind: str
    back: bool
    rank: int
    rows: tuple[int, ...]
    row_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of the partial sum, or of the rows that went to other ranks."""
        if self.kind == "all_reduce":
            return sum(self.rows) * self.row_bytes
        return (sum(self.rows) - self.rows[self.rank]) * self.row_bytes


class Rank:
    """The graphs of one rank, ready to run.

    Args:
        manifest: Of all ranks.
        rank: Which.
        provider: Where onnxruntime runs.

    Raises:
        UsageError: A graph cannot be read.
        MissingBackendError: The provider cannot be used here.
    """

    def __init__(self, manifest: Manifest, rank: int, provider: str = "cpu") -> None:
        self.rank = rank
        self._manifest = manifest
        self._files = manifest.graphs[rank]
        self._stages = [OnnxRuntimeRunner(path, provider) for path in self._files.stages]
        self.name = self._stages[0].name
        self.sent: list[Sent] = []

    def steps(self, inputs: Mapping[str, Array]) -> Steps:
        """Run once: each exchange is handed out, and its answer taken in; the model's outputs at the end."""
        values: dict[str, Array] = dict(inputs)
        self.sent = []
        for number, stage in enumerate(self._stages):
            values.update(stage.run({spec.name: values[spec.name] for spec in stage.inputs}))
            for place, exchange in enumerate(self._manifest.exchanges):
                if exchange.after == number:
                    given = self._given(place, exchange, values)
                    self.sent.append(self.measured(given))
                    self._take((yield given), place, exchange, values)
            self._forget(values, number)
        return {spec.name: values[spec.name] for spec in self._manifest.outputs}

    def _given(self, place: int, exchange: Exchange, values: Mapping[str, Array]) -> Given:
        names = self._files.names[place]
        arrays = tuple(np.ascontiguousarray(values[name]) for name in names.sends)
        if exchange.kind == "all_reduce":
            return Given(place, exchange, arrays)
        if exchange.capacity is not None:
            fixed = np.full(self._manifest.ranks, exchange.capacity, dtype=np.int64)
            return Given(place, exchange, arrays, fixed, fixed)
        assert names.counts is not None
        assert names.counted is not None
        expected = values[names.counted] if exchange.back else None
        return Given(place, exchange, arrays, values[names.counts], expected)

    def _take(self, got: Got, place: int, exchange: Exchange, values: dict[str, Array]) -> None:
        names = self._files.names[place]
        values.update(zip(names.gives, got.arrays, strict=True))
        if names.counted is not None and not exchange.back and got.rows is not None:
            values[names.counted] = got.rows

    def measured(self, given: Given) -> Sent:
        """How much that is."""
        exchange = given.exchange
        row_bytes = sum(array.nbytes // max(1, len(array)) for array in given.arrays)
        if not len(given.arrays[0]):
            row_bytes = sum(exchange.row_bytes)
        rows = (len(given.arrays[0]),) if given.rows is None else tuple(map(int, given.rows))
        return Sent(exchange.layer, exchange.kind, exchange.back, self.rank, rows, row_bytes)

    def _forget(self, values: dict[str, Array], stage: int) -> None:
        """Free the values that no later stage reads."""
        later = {spec.name for runner in self._stages[stage + 1 :] for spec in runner.inputs}
        later |= {spec.name for spec in self._manifest.outputs}
        for place, exchange in enumerate(self._manifest.exchanges):
            if exchange.after > stage:
                names = self._files.names[place]
                later |= {*names.sends, *(name for name in (names.counts, names.counted) if name)}
        for name in [name for name in values if name not in later]:
            del values[name]


def exchange_rows(given: Sequence[Given]) -> list[Got]:
    """What each rank gets from an `all_to_all`, from what all give."""
    ranks = len(given)
    bounds = [np.cumsum([0, *one.rows]).tolist() for one in given]  # type: ignore[misc]
    found = []
    for rank in range(ranks):
        arrays = tuple(
            np.concatenate(
                [
                    one.arrays[place][bound[rank] : bound[rank + 1]]
                    for one, bound in zip(given, bounds, strict=True)
                ]
            )
            for place in range(len(given[0].arrays))
        )
        rows = np.array([bound[rank + 1] - bound[rank] for bound in bounds], dtype=np.int64)
        found.append(Got(arrays, rows))
    return found


class Together:
    """All ranks in this process, side by side: what the graphs compute, without a network.

    Args:
        ranks: All of them, in order.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = list(ranks)
        self.name = f"{len(self.ranks)} ranks, {self.ranks[0].name}"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run all ranks on the same inputs; the outputs of the first.

        Raises:
            RunFailedError: Another rank's outputs are not the first's, bit for bit.
        """
        found = self.run_each([inputs] * len(self.ranks))
        check_same(found)
        return found[0]

    def run_each(self, inputs: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run each rank on inputs of its own."""
        steps = [rank.steps(one) for rank, one in zip(self.ranks, inputs, strict=True)]
        answers: list[Any] = [None] * len(steps)
        while True:
            given: list[Given] = []
            done: list[dict[str, Array]] = []
            for step, answer in zip(steps, answers, strict=True):
                try:
                    given.append(step.send(answer))
                except StopIteration as end:
                    done.append(end.value)
            if done:
                return done
            answers = _sums(given) if given[0].exchange.kind == "all_reduce" else exchange_rows(given)


def _sums(given: Sequence[Given]) -> list[Got]:
    places = range(len(given[0].arrays))
    total = [
        np.sum([one.arrays[place] for one in given], axis=0, dtype=given[0].arrays[place].dtype)
        for place in places
    ]
    return [Got(tuple(total))] * len(given)


def check_same(found: Sequence[Mapping[str, Array]]) -> None:
    """Check that every rank gives the model's outputs, bit for bit the same.

    Raises:
        RunFailedError: They do not.
    """
    for rank, outputs in enumerate(found):
        for name, array in outputs.items():
            if not np.array_equal(array, found[0][name], equal_nan=array.dtype.kind == "f"):
                raise RunFailedError(f"output '{name}' of rank {rank} is not that of rank 0")
