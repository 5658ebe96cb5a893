"""Training ranks that start in a second: forked from a process that has loaded torch and DeepSpeed already.

As a program it reads one JSON line a launch ({"ranks", "arguments", "log", "nan_in"}), forks the ranks, answers with
their process ids, and when all have ended with their exit statuses (negative: the signal that ended them). Like srun
with --kill-on-bad-exit it kills the others as soon as one ends with an error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.launch import ROOT, environment, free_port


class Launch:
    """A start of some ranks; `pids` are theirs."""

    def __init__(self, zygote: Zygote, pids: list[int]) -> None:
        self._zygote, self.pids = zygote, pids

    def wait(self) -> list[int]:
        """Exit statuses of the ranks, when all have ended."""
        return self._zygote.read()["statuses"]


class Zygote:
    """The process to fork from; a context manager."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT,
            text=True,
        )  # fmt: skip
        assert self.read() == {"ready": True}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def start(self, ranks: int, arguments: list[str], log: Path, nan_in: Sequence[tuple[int, int]] = ()) -> Launch:
        """Start `python -m far_scale.train ARGUMENTS` on so many ranks.

        Their output goes into `log`, and what they trained on into LOG.keys: a JSON line a pack, [step, lane, keys].
        The packs `nan_in`, of (step from 1, lane), have a loss that is not a number.
        """
        assert self._process.stdin is not None
        asked = {"ranks": ranks, "arguments": arguments, "log": str(log), "nan_in": nan_in}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Launch(self, self.read()["pids"])

    def read(self) -> dict:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def _rank(rank: int, ranks: int, port: int, arguments: list[str], log: str, nan_in: list[list[int]]) -> None:
    from far_scale.train import loop
    from far_scale.train.__main__ import run

    train_step, pack_loss = loop.train_step, loop.pack_loss
    bad: list[bool] = []  # of the packs whose loss comes next

    def recorded_step(engine, batch, *others):
        with open(f"{log}.keys", "a") as keys:
            keys.writelines(json.dumps([pack.step, pack.lane, pack.keys]) + "\n" for pack in batch.packs)
        bad.extend([pack.step + 1, pack.lane] in nan_in for pack in batch.packs)
        return train_step(engine, batch, *others)

    def harmed_loss(velocity, noisy):
        loss = pack_loss(velocity, noisy)
        return loss * float("nan") if bad.pop(0) else loss

    loop.train_step, loop.pack_loss = recorded_step, harmed_loss
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests were started by nohup
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    status = run(arguments)
    sys.stdout.flush()
    os._exit(status)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print on the standard output
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  (what takes long is loaded once)

    import far_scale.train.loop  # noqa: F401

    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        asked, port = json.loads(line), free_port()
        pids = []
        for rank in range(asked["ranks"]):
            pid = os.fork()
            if pid == 0:
                _rank(rank, asked["ranks"], port, asked["arguments"], asked["log"], asked["nan_in"])
            pids.append(pid)
        answers.write(json.dumps({"pids": pids}) + "\n")
        statuses: dict[int, int] = {}
        while len(statuses) < len(pids):
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] not in (0, 75):
                for other in pids:
                    if other not in statuses:
                        os.kill(other, signal.SIGKILL)
        answers.write(json.dumps({"statuses": [statuses[pid] for pid in pids]}) + "\n")


if __name__ == "__main__":
    _serve()
