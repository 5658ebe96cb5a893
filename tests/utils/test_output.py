"""What a run prints never ends it, and Ctrl-C and a closed terminal save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from far_scale.distributed.signals import DUPLICATE_CTRL_C_SECONDS
from far_scale.train import checkpoint
from harness.launch import ROOT, environment, small_recipe
from harness.processes import start

SHORT = ["train.steps=3", "checkpoint.every=2", "optimizer.warmup_steps=1", "model.layers=1", "model.heads=1"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.slow
def test_a_run_whose_output_cannot_be_written_trains_to_its_end(recorded_shards: Path, tmp_path: Path) -> None:
    """Standard output is a pipe that nobody reads any more, standard error lies on a full disk."""
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full:
        training = ["-m", "far_scale.train", *small_recipe(recorded_shards, tmp_path / "run", *SHORT)]
        status = start(*training, output=os.fdopen(write, "wb"), errors=full).wait(timeout=120)
    assert status == 0 and checkpoint.latest_step(tmp_path / "run") == 3


PRINTS = """
import sys
from far_scale.utils.command_line import never_fail_to_print
never_fail_to_print()
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("x" * 100_000, "\\u2713 \\udcff", file=stream, flush=True)
    print("y", end="", file=stream, flush=True)
    stream.buffer.write(b"z")
with open(sys.argv[1], "w") as file:
    file.write("done")
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("harm", [">/dev/full 2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-", "| true", "2>&1 | head -c 10"])
def test_printing_never_fails(harm: str, tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = f'"{sys.executable}" -c "$PROGRAM" {done} {harm}; echo "${{PIPESTATUS[0]}}" > {tmp_path}/status'
    own = {"PROGRAM": PRINTS, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(["bash", "-c", command], env={**environment(), **own}, cwd=ROOT, timeout=60, check=True)
    assert (tmp_path / "status").read_text() == "0\n"
    assert done.read_text() == "done", "and what is printed goes into no file that was opened since"


def test_what_can_be_printed_is(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PRINTS, str(tmp_path / "done")], env={**environment(), "PYTHONUTF8": "1"}, cwd=ROOT,
        capture_output=True, timeout=60,
    )  # fmt: skip
    line = b"x" * 100_000 + " \u2713 \\udcff\n".encode()
    assert finished.stdout == finished.stderr == 3 * line + b"yz"


def test_a_process_that_is_killed_leaves_what_it_printed(tmp_path: Path) -> None:
    program = "from far_scale.utils.command_line import never_fail_to_print as n; n(); print('a line'); "
    program += "import os; os.kill(os.getpid(), 9)"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT, stdout=out, timeout=60)
    assert (tmp_path / "out").read_text() == "a line\n"


WAITS = """
import signal, sys, time
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from far_scale.distributed.signals import StopSignals
signals = StopSignals()
print("ready", flush=True)
while signals.received is None:
    time.sleep(0.01)
print(signals.received, flush=True)
time.sleep(60)
"""


def waiting(how: str = "plain") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, how], env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, restore_signals=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_ctrl_c_ends_at_once() -> None:
    process = waiting()
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)  # as torchrun forwards it
    time.sleep(DUPLICATE_CTRL_C_SECONDS + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert errors == (
        "Ctrl-C: finishing the step, then saving; again to end at once\n[rank 0] SIGINT again: ending at once\n"
    )


def test_a_closed_terminal_stops_a_run_unless_it_was_started_by_nohup() -> None:
    process = waiting()
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None and process.stdout.readline() == "SIGHUP\n"
    process.kill()
    process = waiting("nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "SIGTERM\n"
    process.kill()
