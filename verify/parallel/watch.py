"""Watch the processes of the other ranks on this machine: who ended first, or was stopped, and for how long.

A closed connection shows that a rank is gone, not which one was first: a rank that notices exits, too, and is gone for
the next. And a stopped rank closes no connection. A process on another machine cannot be watched; there its connection
is all that is known.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

_EVERY = 0.2
_GRACE = 2.5
"""Seconds in which the exchange itself may fail first, and say more."""
LEAVING = 1.0
"""Seconds that a rank which leaves stays, so that the others see who was gone before it."""


@dataclass(frozen=True)
class Process:
    """A rank's process."""

    host: str
    number: int

    @classmethod
    def own(cls) -> Process:
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid())

    def state(self) -> str:
        """`gone`, `stopped` or `runs`; of a process on another machine always `runs`."""
        if self.host != socket.gethostname():
            return "runs"
        try:
            with open(f"/proc/{self.number}/stat", encoding="utf-8", errors="replace") as file:
                letter = file.read().rpartition(")")[2].split()[0]
        except OSError:
            return self._asked()
        return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "runs")

    def _asked(self) -> str:
        """Where no list of processes is: whether a signal would reach it."""
        try:
            os.kill(self.number, 0)
        except ProcessLookupError:
            return "gone"
        except PermissionError:
            return "runs"
        return "runs"


class Watch:
    """Watches in a thread of its own, which exits this process if it would wait in vain.

    Args:
        rank: Of this process.
        processes: Of all ranks.
        patience: Seconds that a rank may be stopped.
    """

    def __init__(self, rank: int, processes: Sequence[Process], patience: float) -> None:
        self._rank, self._processes, self._patience = rank, tuple(processes), patience
        self._since: dict[int, float] = {}
        self._first: tuple[int, ...] = ()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self._thread.start()

    def lost(self) -> str:
        """The rank that is gone or stopped, `rank 2 is gone`; empty if none is."""
        if not self._first:
            self._look()
        if self._first:
            return ", ".join(f"rank {rank} is gone" for rank in self._first)
        return ", ".join(f"rank {rank} is stopped" for rank in sorted(self._since))

    def end(self) -> None:
        """Stop watching: from now on processes may exit."""
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        found = [process.state() for process in self._processes]
        gone = tuple(rank for rank, state in enumerate(found) if state == "gone")
        self._first = self._first or gone
        now = time.monotonic()
        self._since = {
            rank: self._since.get(rank, now) for rank, state in enumerate(found) if state == "stopped"
        }

    def _watch(self) -> None:
        noticed: float | None = None
        while not self._end.wait(_EVERY):
            self._look()
            now = time.monotonic()
            if self._first:
                noticed = now if noticed is None else noticed
                if now - noticed > _GRACE:
                    self._leave()
            elif self._since and now - min(self._since.values()) > self._patience:
                self._leave()

    def _leave(self) -> None:
        print(
            f"error: rank {self._rank}: {self.lost()}, and this one waits for it in vain",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(LEAVING)
        sys.stdout.flush()
        os._exit(1)
