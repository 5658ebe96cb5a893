"""The fork server of the tests: a client that goes at any moment neither ends it nor leaves a program behind."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch

from harness.drill import wait_until
from harness.processes import Process, is_running, run, server_path, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is forked"),
]


def forked(*arguments: object, output: Path | None = None) -> Process:
    process = start(*arguments, output=output)
    assert isinstance(process, Process)
    return process


def test_it_survives_clients_that_go_at_any_moment() -> None:
    for request in (b"", b'{"arguments": ["-c"'):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(server_path())
            client.sendall(request)
    for number in range(60):
        process = forked("-c", "import os; os._exit(0)")
        time.sleep(0.0005 * (number % 20))  # before, while and after it ends
        process._connection.close()
    assert run("-c", "print(1)", timeout=30).stdout == "1\n"


def test_a_program_without_a_client_is_killed_with_what_it_started(tmp_path: Path) -> None:
    output = tmp_path / "pid"
    program = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    process = forked("-c", program, output=output)
    assert wait_until(lambda: output.read_text().endswith("\n"))
    child = int(output.read_text())
    assert is_running(process.pid) and is_running(child)
    process._connection.close()
    assert wait_until(lambda: not is_running(process.pid) and not is_running(child), timeout=30)


def test_global_random_numbers_differ_between_programs() -> None:
    program = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run("-c", program).stdout.split() for _ in range(2))
    assert len(first) == 2 and first[0] != second[0] and first[1] != second[1]
