"""Ranks of tools/train_autoencoder.py, forked from a process that has loaded its largest libraries already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from harness.launch import ROOT

TOOL = ROOT / "tools" / "train_autoencoder.py"
_LOADED_ONCE = ["torch._dynamo", "diffusers.models.autoencoders.autoencoder_dc"]  # an optimizer loads the first one


def end(rank: BaseProcess, seconds: float) -> int | None:
    """The exit status of a rank, None where it has not come after `seconds`; negative: the signal that ended it."""
    rank.join(seconds)
    return rank.exitcode


@contextlib.contextmanager
def started(count: int, output: Path, arguments: Sequence[object]) -> Iterator[list[BaseProcess]]:
    """`count` ranks with these arguments, printing into the file `output`; those left at the end are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED_ONCE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output.parent.mkdir(parents=True, exist_ok=True)
    texts = [str(argument) for argument in arguments]
    ranks = [context.Process(target=_run, args=(rank, count, port, texts, str(output))) for rank in range(count)]
    try:
        for one in ranks:
            one.start()
        yield list(ranks)
    finally:
        for one in ranks:
            one.kill()
            one.join()


def _run(rank: int, count: int, port: int, arguments: list[str], output: str) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    sys.argv = [str(TOOL), *arguments]
    runpy.run_path(str(TOOL), run_name="__main__")
