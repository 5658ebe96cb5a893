"""`torchrun --max_restarts`: workers die, and the run goes on, to the losses of the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from far_scale.utils.event_log import read_events
from harness.launch import free_port, small_recipe
from harness.processes import Process, forked_python, start, start_training

pytestmark = pytest.mark.slow

STEPS = 20
MORE = [f"train.steps={STEPS}", "checkpoint.every=2", "model.layers=1", "model.heads=1", "optimizer.warmup_steps=1"]


@pytest.fixture(scope="module")
def undisturbed(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start_training(2, small_recipe(recorded_shards, run, *MORE), run.parent / "out").wait() == [0, 0]
    return losses(run)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step stands there once"
    return [line["loss"] for line in lines]


def agents(kind: str) -> Iterator[list[str]]:
    """The options of each torchrun."""
    if kind == "standalone":
        yield ["--standalone", "--nproc_per_node=2"]
    elif kind == "one agent":
        yield ["--nproc_per_node=2", f"--master_port={free_port()}"]
    else:
        meeting = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()} --rdzv_id=7"
        for _ in range(2):  # two nodes, on one host
            yield ["--nnodes=2", "--nproc_per_node=1", *meeting.split()]


def worker_of(agent: Process) -> int | None:
    """The youngest training process that an agent has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return next((int(pid) for pid in reversed(children) if b"far_scale.train" in command_of(pid)), None)


def command_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.mark.parametrize(
    "kind, signals",
    [
        ("standalone", (signal.SIGKILL, signal.SIGSEGV)),
        ("one agent", (signal.SIGSEGV, signal.SIGKILL)),
        ("two agents", (signal.SIGKILL, signal.SIGSEGV)),
    ],
)
def test_restarted_by_torchrun_it_goes_on(
    kind: str, signals: tuple[signal.Signals, ...], undisturbed: list[float], recorded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The workers are forked: their start is not what is tested.
    worker = ["--no-python", str(forked_python()), "-m", "far_scale.train"]
    train = [*worker, *small_recipe(recorded_shards, run, *MORE)]
    started: list[Process] = []
    try:
        for number, options in enumerate(agents(kind)):
            torchrun = ["-m", "torch.distributed.run", "--max_restarts=3", *options, *train]
            started.append(start(*torchrun, output=tmp_path / f"out-{number}"))
        end = time.monotonic() + 240
        for death, number in enumerate(signals):
            while len([event for event in read_events(run) if event["event"] == "saved"]) < 2 * (death + 1):
                assert time.monotonic() < end, (tmp_path / "out-0").read_text()[-3000:]
                time.sleep(0.02)
            worker = worker_of(started[-1])
            assert worker is not None
            os.kill(worker, number)
            while len([event for event in read_events(run) if event["event"] == "resumed"]) == death:
                assert time.monotonic() < end, (tmp_path / "out-0").read_text()[-3000:]
                time.sleep(0.02)
        for agent in started:
            assert agent.wait(timeout=max(1.0, end - time.monotonic())) == 0
    finally:
        for agent in started:
            agent.terminate()
        for agent in started:
            agent.wait()
    assert losses(run) == undisturbed
