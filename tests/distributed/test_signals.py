"""Signals that ask for a stop arrive whatever a library does to the signal mask; PYTHONUNBUFFERED keeps its meaning."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.launch import ROOT, environment

UNBLOCKED = """
import multiprocessing, os, signal, time
from multiprocessing import resource_tracker
from far_scale.distributed.signals import StopSignals

signals = StopSignals()
resource_tracker.ensure_running()  # as by the first pool of processes: it unblocks SIGINT and SIGTERM
for number in (signal.SIGTERM, signal.SIGINT):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
time.sleep(0.5)  # Python forgets signals that come while it forks
child.terminate()  # a forked process still ends by it
child.join()
print(child.exitcode, signals.received, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
while signals.received is None:
    time.sleep(0.01)
print(signals.received, signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
time.sleep(3.2)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_library_that_unblocks_signals_does_not_make_them_end_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNBLOCKED], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "-15 None\nSIGTERM True\n" and done.returncode == 75
    assert "SIGINT again: ending at once" in done.stderr


def test_lines_come_at_once_where_python_is_asked_not_to_buffer() -> None:
    code = "from far_scale.utils.command_line import never_fail_to_print as n; n(); print(1); import os; os._exit(0)"
    done = subprocess.run([sys.executable, "-u", "-c", code], cwd=ROOT, env=environment(), capture_output=True)
    assert done.stdout == b"1\n"


@pytest.mark.parametrize(
    "module", ["far_scale.train.__main__", "far_scale.cli.train_autoencoder", "far_scale.cli.main"]
)
def test_training_commands_load_no_torch_before_they_block_signals(module: str) -> None:
    """Threads that torch starts when it is loaded must inherit the signal mask."""
    code = f"import sys, {module}; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
