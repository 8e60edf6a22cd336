"""Processes that exchange: `torch.distributed`, gloo between CPUs and NCCL between GPUs.

Groups of the same processes: exchanges must end within a few seconds, while a rank may wait as long as it takes for
the next case. A process that dies closes its connections, so the others notice at once; one that hangs is noticed when
an exchange times out, or by `watch`. Either way, every process says which rank is gone, and exits.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError, UsageError
from moe_export.verify.parallel.rank import Given, Got, Rank
from moe_export.verify.parallel.watch import Process, Watch
from moe_export.verify.runner import RunFailedError, one_line
from moe_export.verify.specs import Array

_ORIGIN = re.compile(r"\[/\S+\] ")
_HOURS = timedelta(hours=6)
_WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostError(RunFailedError):
    """A rank is gone (exit code 1)."""


class Group:
    """The processes of all ranks.

    Args:
        ranks: How many the graphs are for.
        backend: `gloo` or `nccl`.
        seconds: How long one exchange may take.
        joining: How long to wait for all processes.

    Raises:
        UsageError: This process was not started as one of several, or as one of another number.
        MissingBackendError: torch has no such backend here.
        RunFailedError: Not all processes came.
    """

    def __init__(
        self, ranks: int, backend: str = "gloo", seconds: float = 8.0, joining: float = 60.0
    ) -> None:
        import torch
        import torch.distributed as dist

        _check_environment(ranks)
        here = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
        if not dist.is_available() or not here[backend]():
            raise MissingBackendError(f"torch.distributed has no {backend} here", hint="--transport gloo")
        self.rank, self.ranks, self.backend = int(os.environ["RANK"]), ranks, backend
        self._dist, self._torch, self._seconds = dist, torch, seconds
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=joining))
            self._commands: Any = dist.new_group(backend="gloo", timeout=_HOURS)
            self._exchanges: Any = dist.new_group(backend=backend, timeout=timedelta(seconds=seconds))
            self._results: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
            found: list[Any] = [None] * ranks
            dist.all_gather_object(found, Process.own(), group=self._commands)
        except Exception as error:
            raise RunFailedError(
                f"rank {self.rank}: not all of the {ranks} ranks came within {joining:g} s: {one_line(error)}",
                hint="see what the other ranks say; --join gives them more time",
            ) from error
        self._watch = Watch(self.rank, found, seconds)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.ranks} processes ({self.backend})"

    def broadcast(self, what: Any = None) -> Any:
        """The value of rank 0, on every rank."""
        box = [what]
        self._guarded(
            "waiting for rank 0", self._dist.broadcast_object_list, box, src=0, group=self._commands
        )
        return box[0]

    def gather(self, what: Any) -> list[Any]:
        """The values of all ranks, on rank 0; nothing elsewhere."""
        found: list[Any] | None = [None] * self.ranks if self.rank == 0 else None
        self._guarded(
            "handing in outputs", self._dist.gather_object, what, found, dst=0, group=self._commands
        )
        return found or []

    def run(self, rank: Rank, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run this process's rank; the others run theirs at the same time."""
        steps = rank.steps(inputs)
        try:
            given = next(steps)
            while True:
                given = steps.send(self.exchange(given))
        except StopIteration as end:
            outputs: dict[str, Array] = end.value
            return outputs

    def exchange(self, given: Given) -> Got:
        """Exchange values with the other ranks."""
        exchange = given.exchange
        what = f"exchange {given.number} ({exchange.kind}, layer {exchange.layer})"
        if exchange.kind == "all_reduce":
            return Got(tuple(self._guarded(what, self._sum, array) for array in given.arrays))
        assert given.rows is not None
        rows = given.expected
        if rows is None:
            rows = self._guarded(what, self._spread, given.rows, [1] * self.ranks, [1] * self.ranks)
        sends, gets = given.rows.tolist(), np.asarray(rows).tolist()
        arrays = tuple(self._guarded(what, self._spread, array, sends, gets) for array in given.arrays)
        return Got(arrays, np.asarray(rows))

    def end(self) -> None:
        """Shut down cleanly: no process exits before all have stopped watching."""
        self._watch.end()
        self._dist.barrier(group=self._commands)
        self._dist.destroy_process_group()

    def _tensor(self, array: Array) -> Any:
        tensor = self._torch.from_numpy(np.array(array))  # a copy: a collective writes into it
        return tensor.cuda() if self.backend == "nccl" else tensor

    def _sum(self, array: Array) -> Array:
        wide = (
            array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        )  # NumPy has none of its own
        tensor = self._tensor(wide)
        self._dist.all_reduce(tensor, group=self._exchanges)
        return np.asarray(tensor.cpu().numpy()).astype(array.dtype, copy=False)

    def _spread(self, array: Array, sends: Sequence[int], gets: Sequence[int]) -> Array:
        """Rows for each rank → rows of each rank, as bytes, so that every type travels."""
        size = array.nbytes // len(array) if len(array) else int(np.prod(array.shape[1:])) * array.itemsize
        flat = self._tensor(np.frombuffer(array.tobytes(), dtype=np.uint8))
        found = self._torch.empty(sum(gets) * size, dtype=self._torch.uint8, device=flat.device)
        self._dist.all_to_all_single(
            found,
            flat,
            [rows * size for rows in gets],
            [rows * size for rows in sends],
            group=self._exchanges,
        )
        raw = found.cpu().numpy().tobytes()
        return np.frombuffer(raw, dtype=array.dtype).reshape(sum(gets), *array.shape[1:])

    def _guarded(self, what: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return function(*args, **kwargs)
        except Exception as error:  # torch raises RuntimeError, or a class of its own
            raise self._lost(what, time.monotonic() - start, error) from error

    def _lost(self, what: str, seconds: float, error: Exception) -> LostError:
        """Say which rank is gone. A killed process may take a moment to disappear."""
        who = self._watch.lost()
        for _ in range(20):
            if who:
                break
            time.sleep(0.05)
            who = self._watch.lost()
        why = who or "a rank is gone, or slower than the time that an exchange may take"
        return LostError(
            f"rank {self.rank}: {what} failed after {seconds:.1f} s: {why}",
            hint=f"see what that rank said; --timeout gives exchanges more than {self._seconds:g} s "
            f"({_ORIGIN.sub('', one_line(error))})",
        )


def _check_environment(ranks: int) -> None:
    start = f"torchrun --nproc-per-node {ranks} -m moe_export.verify.parallel FOLDER"
    missing = [name for name in _WANTED if name not in os.environ]
    if missing:
        raise UsageError(
            f"this process was not started as one of {ranks}: the environment lacks {', '.join(missing)}",
            hint=start,
        )
    if os.environ["WORLD_SIZE"] != str(ranks):
        raise UsageError(
            f"{os.environ['WORLD_SIZE']} processes were started, and the graphs are for {ranks} ranks",
            hint=start,
        )
