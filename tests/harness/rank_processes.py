"""Ranks started one by one, so that a test sees each one's end and gives each a node of its own name."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.launch import ROOT, environment, free_port


@dataclass(frozen=True)
class Rank:
    """A started rank.

    Attributes:
        process: its process.
        output: file of what it prints, errors included.
    """

    process: subprocess.Popen[bytes]
    output: Path

    def stop(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def end(self, seconds: float) -> tuple[int, str]:
        """Its exit status, of which it has `seconds` to come, and what it printed."""
        try:
            return self.process.wait(timeout=seconds), self.output.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.output.read_text()}") from None


@contextlib.contextmanager
def started(count: int, folder: Path, *arguments: object, ranks_a_node: int = 1) -> Iterator[list[Rank]]:
    """`count` ranks of `python ARGUMENTS`, on nodes n0, n1, ... by name; what is left of them at the end is killed."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    ranks = []
    try:
        for rank in range(count):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "SLURMD_NODENAME": f"n{rank // ranks_a_node}",
            }
            output = folder / f"rank-{rank}.out"
            with output.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env={**environment(), **own},
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            ranks.append(Rank(process, output))
        yield ranks
    finally:
        for one in ranks:
            one.process.kill()
            one.process.wait()
