"""One model, exported once for all tests in each way; processes started as `torchrun` starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from parallel_stack import export


@dataclass(frozen=True)
class Exports:
    """Exports of the stack, each made when it is first asked for."""

    root: Path
    made: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def of(self, *options: object) -> Path:
        key = tuple(map(str, options))
        if key not in self.made:
            folder = self.root / f"export_{len(self.made)}"
            folder.mkdir()
            self.made[key] = export(folder, "--no-verify", *options)
        return self.made[key]


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("exports"))


@dataclass
class Ended:
    """What became of a process."""

    code: int
    text: str
    seconds: float


class Processes:
    """The ranks as processes, started without `torchrun`."""

    def __init__(self, ranks: int, *arguments: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.all = []
        for rank in range(ranks):
            env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "moe_export.verify.parallel",
                *map(str, arguments),
            ]
            self.all.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )

    def wait_for(self, words: str) -> None:
        """Until rank 0 says it."""
        for line in self.all[0].stdout:
            if words in line:
                return
        raise AssertionError("rank 0 ended without a word")

    def hit(self, rank: int, how: signal.Signals) -> None:
        os.kill(self.all[rank].pid, how)
        self.since = time.monotonic()

    def ended(self, but: int | None = None, patience: float = 120) -> list[Ended]:
        since = getattr(self, "since", time.monotonic())
        found = []
        for rank, process in enumerate(self.all):
            if rank != but:
                text, _ = process.communicate(timeout=patience)
                found.append(Ended(process.returncode, text, time.monotonic() - since))
        return found

    def kill(self) -> None:
        for process in self.all:
            if process.poll() is None:
                process.kill()
            process.stdout.close()
            process.wait()


@pytest.fixture
def start():
    """Start the ranks of a manifest; whatever is left of them is killed in the end."""
    begun = []

    def start(ranks: int, *arguments: object) -> Processes:
        begun.append(Processes(ranks, *arguments))
        return begun[-1]

    yield start
    for processes in begun:
        processes.kill()


@pytest.fixture
def torchrun(tmp_path):
    """Run the ranks under `torchrun`."""

    def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                   "-m", "moe_export.verify.parallel", *map(str, arguments)]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False
        )

    return torchrun
