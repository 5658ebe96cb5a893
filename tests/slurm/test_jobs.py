"""The launcher without SLURM: snapshots, the limit of starts without progress, requeue decisions, submission."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from far_scale.config.recipe import load_recipe
from far_scale.slurm.job import Job, JobState, check_warning, clock, early_warning
from far_scale.slurm.job_request import JobSize, parse_minutes
from far_scale.slurm.lifecycle import after, count_starts, decide
from far_scale.slurm.snapshot import REFUSED_MARKER, make_snapshot, read_submission
from far_scale.slurm.submit import check_size, draft, submit, train_here
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog, read_events
from harness.launch import ROOT, environment, small_recipe
from harness.processes import run as run_program

pytestmark = pytest.mark.slow

RUNNING = JobState("RUNNING", "None", may_requeue=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [path for folder in ("slurm", "tools", "tests/harness") for path in sorted((ROOT / folder).glob("*.sh"))]
    assert len(scripts) >= 11
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("far_*.sh")), ids=lambda path: path.stem)
def test_a_job_fits_its_recipe(script: Path) -> None:
    """The recipe is there, and the job's ranks divide its lanes."""
    text = script.read_text()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=") for line in text.splitlines() if "#SBATCH --" in line and "=" in line
    )
    recipe = load_recipe(text.split('launch.sh" ')[1].split()[0])
    assert recipe.data.lanes % (int(asked["nodes"]) * int(asked["ntasks-per-node"])) == 0
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and asked["job-name"] == script.stem


def test_a_snapshot_runs_its_own_code_wherever_it_is_started(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = small_recipe(Path("shards"), run, "train.steps=7", "faults.starts_without_progress=4")
    recipe = load_recipe(arguments[0], arguments[1:])
    snapshot = make_snapshot(recipe, arguments, "123")
    assert snapshot == run / "snapshots" / "123" and load_recipe(snapshot / "recipe.yaml") == recipe
    submission = read_submission(snapshot)
    assert (submission.run_dir, submission.steps, submission.starts_without_progress) == (str(run), 7, 4)
    assert submission.command == arguments

    (snapshot / "far_scale" / "slurm" / "__main__.py").write_text("def main():\n    print(__file__)\n")
    # The working folder and PYTHONPATH both offer the checkout's far_scale.
    done = subprocess.run([sys.executable, snapshot], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == str(snapshot / "far_scale" / "slurm" / "__main__.py"), done.stderr

    make_snapshot(recipe, arguments, "123")
    assert "prepare" in (snapshot / "far_scale" / "slurm" / "__main__.py").read_text()
    assert [path.name for path in (run / "snapshots").iterdir()] == ["123"]


def test_starts_are_counted_since_the_last_progress(tmp_path: Path) -> None:
    def note(job: str, restarts: int, step: int) -> None:
        EventLog(tmp_path, is_main_process=True).emit("start", step, "", job=job, restarts=restarts)

    def count(restarts: int, step: int, job: str = "7") -> int:
        return count_starts(tmp_path, Job(job, restarts, "n1", 1), step)

    assert count(0, 0) == 0
    note("7", 0, 0)
    assert count(1, 0) == 1 and count(1, 10) == 0
    note("8", 0, 0)
    note("7", 1, 0)
    assert count(2, 0) == 2 and count(2, 10) == 0
    note("7", 2, 10)
    assert count(3, 10) == 1 and count(3, 0) == 0
    assert count(0, 10) == 0, "an older job with the same number counts nothing"
    note("7", 0, 10)
    assert count(1, 10) == 1
    assert count(1, 10, job="9") == 0


@pytest.mark.parametrize(
    ("status", "done", "state", "requeue", "leaves"),
    [
        (0, True, RUNNING, False, 0),
        (0, False, RUNNING, True, 75),  # srun may see no error after a node's failure
        (2, False, RUNNING, False, 2),
        (2, False, JobState("COMPLETING", "TimeLimit", True), False, 2),
        (75, False, RUNNING, True, 75),
        (1, False, RUNNING, True, 1),
        (137, True, RUNNING, True, 137),
        (75, False, JobState("COMPLETING", "TimeLimit", True), True, 75),
        (75, False, JobState("COMPLETING", "None", True), False, 75),  # scancel, or requeued by SLURM
        (1, False, JobState("CANCELLED", "None", True), False, 1),
        (75, False, JobState("RUNNING", "None", False), False, 75),  # sbatch --no-requeue
        (0, True, JobState("COMPLETING", "TimeLimit", True), False, 0),
    ],
)
def test_requeue_decision(status: int, done: bool, state: JobState, requeue: bool, leaves: int) -> None:
    decision = decide(status, done, state)
    assert (decision.requeue, decision.status) == (requeue, leaves)


def test_a_refusal_counts_if_srun_returns_a_higher_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that srun kills because one of them refused end with statuses above 2."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\necho "JobState=RUNNING Reason=None Requeue=1"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    arguments = small_recipe(Path("shards"), tmp_path / "run")
    snapshot = make_snapshot(load_recipe(arguments[0], arguments[1:]), arguments, "7")
    before = signal.getsignal(signal.SIGTERM)
    try:
        (snapshot / REFUSED_MARKER).touch()
        assert after(snapshot, 137) == 2
        assert (tmp_path / "asked").read_text().split() == ["show"]
        assert after(snapshot, 137) == 137, "the next start is judged by itself"
        assert (tmp_path / "asked").read_text().split() == ["show", "show", "requeue"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [(event["status"], event["requeue"]) for event in read_events(tmp_path / "run")] == [
        (137, False),
        (137, True),
    ]


def test_times_as_sbatch_takes_them() -> None:
    times = {"90": 90, "90:30": 91, "12:00:00": 720, "2-00": 2880, "1-02:30": 1590, "1-00:00:01": 1441, "0": 0}
    assert {text: parse_minutes(text) for text in times} == times
    with pytest.raises(UserError, match="--time soon"):
        parse_minutes("soon")
    assert [clock(seconds) for seconds in (0, 61, 7200, 2 * 86400 + 3)] == [
        "0:00:00",
        "0:01:01",
        "2:00:00",
        "2-0:00:03",
    ]


@pytest.mark.parametrize(
    ("time", "refused"),
    [
        ("4", "0:04:00"), ("0:04:00", "0:04:00"), ("4:00", "0:04:00"), ("3:01", "0:04:00"), ("0-0:4", "0:04:00"),
        ("5", "0:05:00"), ("6:00", "0:06:00"), ("6:01", None), ("0-1", None), ("2-00:00:00", None), ("0", None),
    ],
)  # fmt: skip
def test_a_time_limit_shorter_than_the_warning_is_refused(time: str, refused: str | None, tmp_path: Path) -> None:
    """The warning comes 300 seconds ahead, give or take a minute; a limit of 0 is none."""
    recipe = load_recipe("demo_cpu", [f"run_dir={tmp_path / 'run'}"])
    size = JobSize(nodes=1, gpus_per_node=0, cpus_per_task=1, minutes=parse_minutes(time), partition=None)
    if refused is None:
        check_size(recipe, size)
        return
    for action in (
        lambda _: check_size(recipe, size),
        lambda _: draft(recipe, size, None, ROOT, []),
        lambda _: train_here(recipe, [], size),
    ):
        with pytest.raises(UserError) as error:
            action(recipe)
        assert str(error.value) == (
            f"--time {refused}: the warning comes 300 seconds ahead of the time limit, and SLURM may send it "
            "60 seconds earlier, so it would stop each start at once; ask for more than 0:06:00"
        )
    assert list(tmp_path.iterdir()) == []


def test_groups_of_ranks_that_cross_nodes_are_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("demo_cpu", ["data.lanes=4", "train.sequence_parallel=2"])
    size = JobSize(nodes=1, gpus_per_node=4, cpus_per_task=1, minutes=60, partition=None)
    check_size(recipe, size)
    assert capsys.readouterr().err == ""
    check_size(recipe, replace(size, nodes=4, gpus_per_node=1))
    assert "warning: demo_cpu: train.sequence_parallel: groups of 2 ranks cross nodes of 1, " in capsys.readouterr().err
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "NTASKS": "6"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert (Job.this().ranks, Job.this().ranks_per_node) == (6, 3)


def test_without_slurm_a_time_limit_is_needed(tmp_path: Path) -> None:
    size = JobSize(nodes=1, gpus_per_node=0, cpus_per_task=1, minutes=0, partition=None)
    with pytest.raises(UserError, match="--time 0: means no limit only to SLURM"):
        train_here(load_recipe("demo_cpu", [f"run_dir={tmp_path / 'run'}"]), [], size)


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`controller(limit, script)` sets what a fake scontrol prints about the job around this process."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n[ -e {tmp_path}/$1 ] || exit 1\ncat {tmp_path}/$1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SBATCH_SIGNAL", raising=False)

    def set_output(limit: str, script: str) -> None:
        shown = f"JobId=7 RunTime=00:00:01 TimeLimit={limit} TimeMin=N/A EndTime=2026-11-25T17:56:16\n"
        (tmp_path / "show").write_text(shown)
        (tmp_path / "write").write_text(script)

    return set_output


SCRIPTS = {
    path.stem: path.read_text() for path in sorted((ROOT / "slurm").glob("*.sh")) if "#SBATCH" in path.read_text()
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_job_scripts_warnings_are_read(name: str, controller: Callable[[str, str], None]) -> None:
    lead = 120 if name in ("encode_latents", "evaluate") else 300
    controller(f"00:{lead // 60 + 1:02}:00", SCRIPTS[name])
    early = early_warning("7")
    assert early is not None and re.match(rf"job 7: --signal=\S*USR1@{lead} and a time limit of", early.text)
    controller(f"00:{lead // 60 + 1:02}:01", SCRIPTS[name])
    assert early_warning("7") is None
    assert "launch.sh" in SCRIPTS[name] or "far_scale.slurm check" in SCRIPTS[name]


@pytest.mark.parametrize(
    ("limit", "line", "refused"),
    [
        ("00:04:00", "--signal=USR1@300", True),
        ("00:04:00", "--time=4 --signal=B:USR1@300  # early", True),
        ("00:04:00", "--signal RB:10@240", True),
        ("00:02:00", "--signal=USR1", True),  # then it is a minute
        ("00:03:00", "--signal=USR1", False),
        ("00:04:00", "--signal=USR1@60", False),
        ("00:04:00", "--time=4", False),
        ("1-00:05:00", "--signal=USR1@86650", True),
        ("1-00:05:00", "--signal=USR1@300", False),
        ("UNLIMITED", "--signal=USR1@300", False),
        ("Partition_Limit", "--signal=USR1@300", False),
    ],
)
def test_a_running_job_is_checked(limit: str, line: str, refused: bool, controller: Callable[[str, str], None]) -> None:
    controller(limit, f"#!/bin/bash\n# a job\n#SBATCH {line}\n\necho\n#SBATCH --signal=USR1@9000000\n")
    early = early_warning("7")
    assert (early is not None) == refused
    if early is not None:
        assert "so it would stop each start at once; ask for more than" in early.text and not early.certain


def test_only_a_warning_that_is_certain_refuses_a_job(
    controller: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the command that the scripts call: a --signal on sbatch's command line may override that of the script."""
    controller("00:04:00", "#SBATCH --signal=USR1@300\n")
    text = (
        "job 7: --signal=USR1@300 and a time limit of 0:04:00: the warning comes 300 seconds ahead of "
        "the time limit, and SLURM may send it 60 seconds earlier, so it would stop each start at once; ask "
        "for more than 0:06:00 by --time, or for a later warning submit by SBATCH_SIGNAL=USR1@SECONDS sbatch"
    )
    unseen = " (unless --signal on sbatch's command line asked for a later warning, which cannot be seen here)"
    for certain, status, line in ((False, 0, f"warning: {text}{unseen}\n"), (True, 2, f"error: {text}\n")):
        if certain:
            monkeypatch.setenv("SBATCH_SIGNAL", "USR1@300")
        for module in ("far_scale.slurm", "far_scale.launch"):  # the second by scripts of jobs that are pending
            command = [sys.executable, "-m", module, "check"]
            done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (status, line)


def test_a_job_that_its_warning_stops_at_once_does_not_start_again(
    controller: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Where the script's line made that likely; one that got further was warned later, by sbatch's command line."""
    controller("00:04:00 JobState=RUNNING Reason=None Requeue=1", "#SBATCH --signal=USR1@300\n")
    run = tmp_path / "run"
    arguments = small_recipe(Path("shards"), run)
    snapshot = make_snapshot(load_recipe(arguments[0], arguments[1:]), arguments, "7")
    for step, status in ((3, 75), (4, 2)):
        EventLog(run, is_main_process=True).emit("start", 3 if step == 4 else 0, "", job="7", restarts=0)
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        before = signal.getsignal(signal.SIGTERM)
        try:
            (tmp_path / "requeue").touch()  # the controller takes a requeue
            assert after(snapshot, 75) == status
        finally:
            signal.signal(signal.SIGTERM, before)
    first, second = (event for event in read_events(run) if event["event"] == "end")
    assert first["requeue"] and not second["requeue"]
    assert "job 7: a signal stopped training after at most one step. job 7: --signal=USR1@300 and" in second["text"]


def test_the_warning_of_the_environment_counts_and_no_answer_stops_no_job(
    controller: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    controller("00:04:00", "#SBATCH --signal=USR1@300\n")
    monkeypatch.setenv("SBATCH_SIGNAL", "USR1@30")
    check_warning("7")
    monkeypatch.setenv("SBATCH_SIGNAL", "USR1@1000")
    with pytest.raises(UserError, match="--signal=USR1@1000"):
        check_warning("7")
    (tmp_path / "write").unlink()
    check_warning("7")
    (tmp_path / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    check_warning("7")


def test_a_draft_needs_no_slurm_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = small_recipe(Path("shards"), tmp_path / "run")
    recipe = load_recipe(arguments[0], arguments[1:])
    size = JobSize(nodes=2, gpus_per_node=2, cpus_per_task=6, minutes=1440, partition="big")
    text = draft(recipe, size, None, ROOT, [])
    for option in ("nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=6", "time=1440", "partition=big"):
        assert f"#SBATCH --{option}\n" in text
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --no-requeue\n" in draft(recipe, size, 2, ROOT, [])
    with pytest.raises(UserError, match="4 lanes cannot be shared evenly by 6 ranks"):
        draft(recipe, replace(size, nodes=3), None, ROOT, [])
    with pytest.raises(UserError, match="there is no sbatch here"):
        submit(recipe, arguments, size, None, ROOT, [])
    with pytest.raises(UserError, match="--nodes 2"):
        train_here(recipe, arguments, size)
    assert list(tmp_path.iterdir()) == []


def test_options_after_two_dashes_go_to_sbatch(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    recipe = load_recipe("demo_cpu", [f"run_dir={tmp_path / 'run'}"])
    size = JobSize(nodes=1, gpus_per_node=0, cpus_per_task=1, minutes=60, partition=None)
    options = ["--account=x", "-A", "x", "--exclude", "n[3-4]", "--exclusive", "--time-min=30", "--comment=a b"]
    text = draft(recipe, size, None, ROOT, options)
    assert text.endswith("\n# submitted by: sbatch " + shlex.join(options) + " FILE")
    for refused, message in {
        "--nodes=4": "use --nodes before the --",
        "-N4": "use --nodes before the --",
        "--gpus=4": "use --gpus-per-node before the --",
        "--sig=USR1@60": "does not go with this tool; leave it out",
        "--parsable": "does not go with this tool; leave it out",
        "--test-only": "use --dry-run before the --",
        "-Q": "does not go with this tool; leave it out",  # sbatch would submit, and print no number
        "--wait": "does not go with this tool; leave it out",
        "-D/tmp": "does not go with this tool; leave it out",
        "-sN4": "write each option by itself, -s -N4",
        "account=x": "is not an option of sbatch; write it with dashes, such as --account=x",
    }.items():
        with pytest.raises(UserError) as error:
            draft(recipe, size, None, ROOT, ["--qos=high", refused])
        assert str(error.value) == f"-- {refused}: {message}"
    for before in ("--exclusive", "-H", "-Ax", "--account=x"):  # sbatch would run the word as a script
        with pytest.raises(UserError, match=r"^-- n3: is not an option of sbatch;"):
            draft(recipe, size, None, ROOT, [before, "n3"])
    draft(recipe, size, None, ROOT, ["--dependency=after:7"])
    for dependency in ("--dependency=after:7", "--dep=after:7", "-dafter:7"):
        with pytest.raises(UserError, match=f"-- {dependency}: the jobs of a --chain depend on each other"):
            draft(recipe, size, 2, ROOT, [dependency])


def test_training_here_goes_the_same_way(recorded_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    run = tmp_path / "run"
    size = ["--gpus-per-node", 0, "--cpus-per-task", 1, "--time", 30]
    arguments = [*small_recipe(recorded_shards, run), *size, "--local"]
    done = run_program(ROOT / "tools" / "submit.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
    (snapshot,) = (run / "snapshots").iterdir()
    assert load_recipe(snapshot / "recipe.yaml") == load_recipe(run / "recipe.yaml")
