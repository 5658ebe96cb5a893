"""One job at a time in a run directory: who is refused, who may take over, and what the holder notices."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.distributed.process_group import Processes
from far_scale.train import lease
from far_scale.train.lease import Lease
from far_scale.utils.event_log import read_events
from harness.launch import ROOT, environment
from harness.refusal import refused

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


def held_by(run: Path, **facts: Any) -> None:
    """A lease as another job would leave it; by default of a live process on another machine, renewed now."""
    run.mkdir(exist_ok=True)
    (run / lease.NAME).unlink(missing_ok=True)
    with Lease(run, ALONE):
        holder = json.loads((run / lease.NAME).read_text())
    other = {"token": "another", "host": "n7", "machine": "another", **facts}
    (run / lease.NAME).write_text(json.dumps({**holder, **other}))


def taken(run: Path) -> bool:
    """Whether a job gets the run directory."""
    with Lease(run, ALONE):
        assert json.loads((run / lease.NAME).read_text())["pid"] == os.getpid()
    assert not (run / lease.NAME).exists(), "released at its end"
    return True


def refused_by(run: Path, *words: str) -> None:
    before = (run / lease.NAME).read_bytes()
    refused(lambda: Lease(run, ALONE).__enter__(), str(run / lease.NAME), *words)
    assert (run / lease.NAME).read_bytes() == before and not list(run.glob(".lease*"))


def test_a_second_job_is_refused_by_whatever_path_it_comes(tmp_path: Path) -> None:
    run, other_path = tmp_path / "run", tmp_path / "link"
    with Lease(run, ALONE):
        refused_by(run, f"pid {os.getpid()}", "host ", "another run_dir")
        other_path.symlink_to(run)
        refused_by(other_path, f"pid {os.getpid()}")
    assert taken(run) and not read_events(run)


def test_a_run_that_is_refused_before_it_writes_leaves_no_folder(tmp_path: Path) -> None:
    with Lease(tmp_path / "runs/run", ALONE):
        pass
    assert not list(tmp_path.iterdir())
    with Lease(tmp_path / "runs/run", ALONE):
        (tmp_path / "runs/run/log.jsonl").touch()
    assert (tmp_path / "runs/run/log.jsonl").exists()


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over(tmp_path: Path) -> None:
    held_by(tmp_path, machine=lease._machine())
    refused_by(tmp_path, f"pid {os.getpid()}")
    held_by(tmp_path, machine=lease._machine(), pid_start="1")  # its number was given to another process
    assert taken(tmp_path)
    dead = subprocess.Popen(["true"])
    while lease._process_start(dead.pid):
        time.sleep(0.01)
    held_by(tmp_path, machine=lease._machine(), pid=dead.pid)  # and before its parent has looked at its end
    assert taken(tmp_path)
    dead.wait()
    held_by(tmp_path, machine=lease._machine(), pid=dead.pid, host="n3")
    assert taken(tmp_path)
    (*_, event) = read_events(tmp_path)
    assert event["event"] == "lease" and f"host n3, pid {dead.pid}: that process is dead" in event["text"]


def test_where_the_system_does_not_name_the_machine_only_time_ends_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "readlink", unreadable)
    held_by(tmp_path, machine=lease._machine(), pid_start="1")
    refused_by(tmp_path, "host n7")
    os.utime(tmp_path / lease.NAME, (0, time.time() - 310))
    assert taken(tmp_path)


def test_the_lease_of_another_machine_holds_for_five_minutes(tmp_path: Path) -> None:
    held_by(tmp_path, job="SLURM job 12")
    refused_by(tmp_path, "host n7", "SLURM job 12")
    now = time.time()
    os.utime(tmp_path / lease.NAME, (now, now - 290))
    refused_by(tmp_path, "host n7")
    os.utime(tmp_path / lease.NAME, (now, now - 310))
    assert taken(tmp_path)


def test_a_later_start_of_the_same_slurm_job_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    held_by(tmp_path)
    refused_by(tmp_path, "SLURM job 12")  # a second step of one allocation
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert taken(tmp_path)
    held_by(tmp_path)
    refused_by(tmp_path, "SLURM job 12")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    refused_by(tmp_path, "SLURM job 12")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "another")  # whose jobs have the same numbers
    refused_by(tmp_path, "SLURM job 12")


def test_restarts_of_a_second_torchrun_within_a_slurm_job_do_not_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts workers that were refused again, with a higher count than that of the first one's workers."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for first, second, facts in (("a", "b", {}), ("a", "a", {"machine": lease._machine()}), ("none", "none", {})):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", first)
        held_by(tmp_path, **facts)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", second)
        if first != second or first == "none":
            refused_by(tmp_path, "SLURM job 12")
        else:  # those wait for it to end, see the test after the next
            assert Lease(tmp_path, ALONE)._takeover_reason(json.loads((tmp_path / lease.NAME).read_text()), 1.0) is None


def test_a_restart_by_torchrun_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of all jobs that were not given one
    held_by(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refused_by(tmp_path, "host n7")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    held_by(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert taken(tmp_path)


@pytest.mark.slow
def test_torchruns_rank_0_may_move_to_a_node_of_a_lower_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until the lease ends, or the holder shows that it is alive."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    held_by(tmp_path, restarts=[0, 3])
    monkeypatch.setattr(lease, "VALID_SECONDS", 2.0)
    assert taken(tmp_path)
    held_by(tmp_path, restarts=[0, 3])
    monkeypatch.setattr(lease, "VALID_SECONDS", 300.0)
    renew = f"import os, sys, time; time.sleep(1.5); os.utime({str(tmp_path / lease.NAME)!r})"
    with subprocess.Popen([sys.executable, "-c", renew]):
        refused_by(tmp_path, "torchrun mine")


def test_a_lease_that_was_copied_with_its_directory_holds_nothing(tmp_path: Path) -> None:
    run, copy, moved = tmp_path / "run", tmp_path / "copy", tmp_path / "moved"
    with Lease(run, ALONE):
        shutil.copytree(run, copy)
        assert taken(copy)
        run.rename(moved)
        refused_by(moved, f"pid {os.getpid()}")
        moved.rename(run)


def test_an_unreadable_lease_holds_as_long_as_it_could(tmp_path: Path) -> None:
    for content in ("", "{half", "[]", "[" * 10**5, '{"pid": ' + "9" * 5000 + "}"):
        (tmp_path / lease.NAME).write_text(content)
        refused_by(tmp_path, "host unknown")
        os.utime(tmp_path / lease.NAME, (0, time.time() - 310))
        assert taken(tmp_path)


def test_a_lease_with_values_that_are_none_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for restarts in (5, [1], ["a", None], {}, None):
        held_by(tmp_path, restarts=restarts, pid=[1], directory=3)
        refused_by(tmp_path, "SLURM job 12")


def test_a_lease_with_a_time_in_the_future_ages_from_when_it_is_found(tmp_path: Path) -> None:
    """As in a copy, or after the file server's clock was set back: else nobody could train here until then."""
    held_by(tmp_path)
    os.utime(tmp_path / lease.NAME, (0, time.time() + 10**6))
    refused_by(tmp_path, "host n7", "renewed 0 s ago")
    assert abs((tmp_path / lease.NAME).stat().st_mtime - time.time()) < 100


def test_the_holder_writes_a_lease_anew_that_was_overwritten(tmp_path: Path) -> None:
    with Lease(tmp_path, ALONE) as held:
        for content in ("", "{}", "[" * 10**5):
            (tmp_path / lease.NAME).write_text(content)
            held._renew()
            refused_by(tmp_path, f"pid {os.getpid()}")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with Lease(tmp_path, ALONE):
        refused_by(tmp_path, f"pid {os.getpid()}")
    assert taken(tmp_path)


@pytest.mark.slow
def test_of_many_that_take_over_one_gets_it(tmp_path: Path) -> None:
    for attempt in range(3):
        run = tmp_path / str(attempt)
        held_by(run, machine=lease._machine(), pid_start="1")
        start = time.time() + 0.3
        answers, answer = os.pipe()
        wait_for_the_last, last_answered = os.pipe()
        children = []
        for _ in range(12):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(last_answered)
                    time.sleep(max(0.0, start - time.time()))
                    os.write(answer, _held_or_refused(run))
                    # A holder that ended would rightly be taken over by a job that looks later.
                    os.read(wait_for_the_last, 1)
                finally:
                    os._exit(0)
            children.append(pid)
        received = b"".join(os.read(answers, 1) for _ in children)
        os.close(last_answered)
        for pid in children:
            os.waitpid(pid, 0)
        for end in (answers, answer, wait_for_the_last):
            os.close(end)
        assert sorted(received) == sorted(b"H" + b"R" * 11)


def _held_or_refused(run: Path) -> bytes:
    try:
        Lease(run, ALONE)._acquire()
        return b"H"
    except lease.UserError:
        return b"R"
    except BaseException:
        return b"?"


HOLDER = """
import sys, time
from pathlib import Path
import torch
from far_scale.train import lease
from far_scale.distributed.process_group import Processes
lease.RENEW_SECONDS = 0.5
with lease.Lease(Path(sys.argv[1]), Processes(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_the_holder_renews_and_ends_when_another_has_taken_over(tmp_path: Path) -> None:
    path = tmp_path / lease.NAME
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    os.utime(path, (0, 0))
    wait_until(lambda: path.stat().st_mtime > time.time() - 60)
    own = path.read_bytes()
    path.unlink()
    wait_until(path.exists)
    assert path.read_bytes() == own, "removed, it is made again"
    # Suspended for so long that another job took over.
    holder.send_signal(signal.SIGSTOP)
    os.utime(path, (0, time.time() - 310))
    with Lease(tmp_path, ALONE):
        holder.send_signal(signal.SIGCONT)
        _, errors = holder.communicate(timeout=30)
        assert holder.returncode == 2 and f"taken over by host {lease.host_name()}, pid {os.getpid()}" in errors
        assert json.loads(path.read_text())["pid"] == os.getpid()


def wait_until(happened: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)
