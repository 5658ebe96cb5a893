"""The one way in which tests start Python programs and ranks of them.

On a machine without a GPU they are forked from a process that has loaded the large libraries (`fork_server.py`), one
for all processes of pytest. With a GPU, whose driver does not survive a fork, they are started anew.

    run("-m", "far_scale.train", ...)         to the end, as by `subprocess.run([sys.executable, ...])`
    start("tools/x.py", ..., output=FILE)     a `Process` to watch, signal and wait for
    start_ranks(2, "-m", ..., output=FILE)    ranks that find each other, as srun starts them; `Ranks`
    launch(2, "-m", ...)                      such ranks to the end
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from harness.launch import ROOT, environment, free_port

SERVER = Path(__file__).with_name("fork_server.py")
FORKED = Path(__file__).with_name("forked.py")
ENDS_WELL = (0, 75)
"""Exit statuses of a rank after which the others are not killed: done, and to be started again."""


class Process:
    """A started program, with the interface of `subprocess.Popen`.

    Attributes:
        pid: its process id; it leads a session and process group of its own.
        returncode: as in `subprocess`, None while it runs.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._connection = pid, connection
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired where it does not come in `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = _answer(self._connection)["status"]
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def program(path: Path, text: str) -> Path:
    """A bash script that can be run by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def start_fork_server() -> None:
    """Start the process to fork from, for this process and all that it starts: $FORK_SERVER is its socket.

    Whoever connects before it has loaded the libraries waits until then. Beside the socket is `forked_python`.
    """
    folder = tempfile.mkdtemp(prefix="fork", dir="/tmp")  # short: the path of a socket is
    python = Path(folder, "python")
    python.write_text(f'#!/bin/sh\nFORK_SERVER={folder}/socket exec {sys.executable} -S {FORKED} "$@"\n')
    python.chmod(0o755)
    plain = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, SERVER, str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**plain, "DS_ACCELERATOR": "cpu"},
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    os.environ["FORK_SERVER"] = f"{folder}/socket"
    atexit.register(_stop, server, folder)


def _stop(server: subprocess.Popen[bytes], folder: str) -> None:
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
    shutil.rmtree(folder, ignore_errors=True)


def server_path() -> str:
    """The socket of the fork server; without xdist the server is started at the first use."""
    if "FORK_SERVER" not in os.environ:
        start_fork_server()
    return os.environ["FORK_SERVER"]


def forked_python() -> Path:
    """A program that stands for a Python of its own, forked from the fork server."""
    return Path(server_path()).with_name("python")


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it has ended, perhaps between opening and reading
        return False


def _answer(connection: socket.socket) -> dict[str, Any]:
    """The next line; a byte at a time, since the one after it may have come already."""
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(1)
        assert part, "the fork server ended"
        data += part
    answer: dict[str, Any] = json.loads(data)
    return answer


def start(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    output: Path | IO[Any] | None = None,
    errors: Path | IO[Any] | None = None,
    preload: Sequence[str] = (),
) -> Process | subprocess.Popen[bytes]:
    """Start `python ARGUMENTS`.

    Args:
        env: its environment; `environment()` unless given.
        output: file to append standard output to; nowhere unless given.
        errors: likewise of standard error; where standard output goes unless given.
        preload: modules that programs like it need and that are worth to be loaded once.
    """
    texts = [os.fspath(each) if isinstance(each, os.PathLike) else str(each) for each in arguments]
    own = dict(environment() if env is None else env)
    with contextlib.ExitStack() as files:

        def opened(target: Path | IO[Any] | None, otherwise: int) -> int:
            if target is None:
                return otherwise
            return (files.enter_context(open(target, "ab")) if isinstance(target, (str, Path)) else target).fileno()

        nowhere = files.enter_context(open(os.devnull, "r+b")).fileno()
        out = opened(output, nowhere)
        streams = [nowhere, out, opened(errors, out)]
        if torch.cuda.is_available():
            stdin, stdout, stderr = streams
            return subprocess.Popen(
                [sys.executable, *texts], env=own, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(server_path())
        request = {"arguments": texts, "environment": own, "cwd": str(cwd), "preload": list(preload)}
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [data], streams)
        connection.sendall(data[sent:])
        return Process(_answer(connection)["pid"], connection)


def run(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout: float = 240,
    preload: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to the end; output and errors as text. It is killed after `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = start(*arguments, env=env, cwd=cwd, output=output, errors=errors, preload=preload)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, status, output.read_text(), errors.read_text())


class Ranks(list[Any]):
    """The processes of some ranks, by rank."""

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self]

    def wait(self, timeout: float = 600) -> list[int]:
        """Exit statuses of all. As by srun --kill-on-bad-exit the others are killed as soon as one ends badly."""
        end = time.monotonic() + timeout
        while None in (statuses := [process.poll() for process in self]):
            if any(status not in (None, *ENDS_WELL) for status in statuses):
                self.kill()
            assert time.monotonic() < end, f"still running after {timeout} s"
            time.sleep(0.005)
        return [process.returncode for process in self]

    def kill(self) -> None:
        """SIGKILL for all that still run."""
        for process in self:
            process.kill()


def start_ranks(
    count: int, *arguments: object, output: Path | None = None, errors: Path | None = None, ranks_a_node: int = 0,
    by_rank: bool = False, env: Mapping[str, str] | None = None, preload: Sequence[str] = (),
) -> Ranks:  # fmt: skip
    """Start `count` ranks of `python ARGUMENTS`.

    Args:
        output, errors: files that all ranks append to, see `start`.
        ranks_a_node: the ranks are on nodes n0, n1, ... by name, so many on each; 0: all on this host.
        by_rank: `output` is a folder, with a file rank-N.out for each.
    """
    port, ranks = free_port(), Ranks()
    if by_rank:
        assert output is not None
        output.mkdir(parents=True, exist_ok=True)
    for rank in range(count):
        own = {
            **(environment() if env is None else env),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **({"SLURMD_NODENAME": f"n{rank // ranks_a_node}"} if ranks_a_node else {}),
        }
        target = output / f"rank-{rank}.out" if by_rank and output is not None else output
        ranks.append(start(*arguments, env=own, output=target, errors=errors, preload=preload))
    return ranks


def launch(ranks: int, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ranks of `python ARGUMENTS` to the end; the output and errors of all as text, and the worst exit status."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        started = start_ranks(ranks, *arguments, output=output, errors=errors)
        try:
            statuses = started.wait(timeout)
        finally:
            started.kill()
        worst = next((status for status in statuses if status > 0), min(statuses))
        return subprocess.CompletedProcess(arguments, worst, output.read_text(), errors.read_text())


@contextlib.contextmanager
def running_ranks(count: int, *arguments: object, **options: Any) -> Iterator[Ranks]:
    """`start_ranks`, of which those that are left at the end are killed."""
    ranks = start_ranks(count, *arguments, **options)
    try:
        yield ranks
    finally:
        ranks.kill()
        for process in ranks:
            process.wait()


def start_training(ranks: int, arguments: Sequence[object], log: Path, nan_in: Sequence[tuple[int, int]] = ()) -> Ranks:
    """Start `python -m far_scale.train ARGUMENTS` on so many ranks.

    Their output goes into `log`, and what they trained on into LOG.keys: a JSON line a pack, [step, lane, keys]. The
    packs `nan_in`, of (step from 1, lane), have a loss that is not a number.
    """
    worker = Path(__file__).with_name("recorded_training.py")
    return start_ranks(ranks, worker, log, json.dumps(nan_in), *arguments, output=log)


@dataclasses.dataclass(frozen=True)
class Rank:
    """A started rank.

    Attributes:
        process: its process.
        output: file of what it prints, errors included.
    """

    process: Any
    output: Path

    def stop(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def end(self, seconds: float) -> tuple[int, str]:
        """Its exit status, for which it has `seconds`, and what it printed."""
        try:
            return self.process.wait(timeout=seconds), self.output.read_text()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.output.read_text()}") from None


@contextlib.contextmanager
def started(count: int, folder: Path, *arguments: object, ranks_a_node: int = 1) -> Iterator[list[Rank]]:
    """`count` ranks of `python ARGUMENTS` on nodes n0, n1, ... by name, each with a file of output in `folder`.

    What is left of them at the end is killed; none is killed before.
    """
    with running_ranks(count, *arguments, output=folder, by_rank=True, ranks_a_node=ranks_a_node) as ranks:
        yield [Rank(process, folder / f"rank-{rank}.out") for rank, process in enumerate(ranks)]
