"""Jobs on a real SLURM: the shipped scripts and tools/submit.py, through warnings, requeues, kills and bad input."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from far_scale.utils.event_log import read_events
from harness.launch import ROOT
from harness.processes import is_running
from harness.slurm_jobs import SCRIPT as CLUSTER_SCRIPT
from harness.slurm_jobs import Cluster, started_cluster, steps_logged, tiny

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "slurm" / "far_xl.sh"
TWO_NODES = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=10"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started_cluster(tmp_path_factory.mktemp("jobs")) as cluster:
        cluster.fork_python()
        yield cluster


def copied_checkout(folder: Path) -> Path:
    """What jobs need of this checkout, to be broken."""
    for part in ("far_scale", "recipes", "slurm"):
        shutil.copytree(ROOT / part, folder / "checkout" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "checkout"


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run) if event["event"] == kind]


@contextlib.contextmanager
def stopped_until_signalled(cluster: Cluster, job: str, run: Path) -> Iterator[None]:
    """SIGSTOP for the main rank, for which the others wait, until the job is signalled after what is done within."""
    main = json.loads((run / "lease.json").read_text())["pid"]

    def is_signalled() -> bool:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{main}/status").read_text().splitlines())
        pending = int(status["ShdPnd"], 16)
        warnings = (signal.SIGUSR1, signal.SIGTERM)
        return not status["State"].startswith("T") or any(pending >> (number - 1) & 1 for number in warnings)

    os.kill(main, signal.SIGSTOP)
    try:
        yield
        cluster.until(job, "signalled", is_signalled)
    finally:
        os.kill(main, signal.SIGCONT)


def test_a_cluster_goes_with_its_owner(cluster: Cluster) -> None:
    """So tests that are killed leave nothing behind. (The fixture skips where there can be no cluster.)"""
    with subprocess.Popen(["sleep", "600"]) as owner, tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as root:
        subprocess.run(["bash", CLUSTER_SCRIPT, "up", root], env={**os.environ, "OWNER": str(owner.pid)}, check=True)
        daemons = [int(path.read_text()) for path in Path(root, "run").glob("*.pid")]
        assert len(daemons) == 6, "munged, slurmctld, three slurmd, and what watches the owner"
        owner.kill()
        owner.wait()
        cluster.until(None, "the daemons are gone", lambda: not any(is_running(daemon) for daemon in daemons))


def test_stopped_then_requeued_it_resumes_with_its_own_code(
    cluster: Cluster, recorded_shards: Path, tmp_path: Path
) -> None:
    """Two nodes: a signal to the processes, then `scontrol requeue`, and no step is lost or done twice."""
    checkout, run = copied_checkout(tmp_path), tmp_path / "run"
    job = cluster.sbatch(SCRIPT, TWO_NODES, tiny(recorded_shards, run, 60), FAR_SCALE=checkout)
    cluster.until(job, "step 3", lambda: len(steps_logged(run)) >= 3)
    (checkout / "far_scale" / "slurm" / "__main__.py").write_text("raise RuntimeError('not the snapshot')\n")
    (checkout / "far_scale" / "train" / "loop.py").write_text("raise RuntimeError('not the snapshot')\n")
    (checkout / "recipes" / "base.yaml").write_text("no: recipe\n")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.until(job, "requeued", lambda: cluster.show(job)["Restarts"] == "1")
    (stop,) = events(run, "end")
    assert stop["requeue"] and stop["status"] == 75
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stop['step']:08d}\n"
    assert steps_logged(run)[-1] == stop["step"] < 60

    cluster.until(job, "a few more steps", lambda: len(steps_logged(run)) >= stop["step"] + 3)
    cluster.run("scontrol", "requeue", job)
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "2"), cluster.output(job)
    starts = events(run, "start")
    assert [start["restarts"] for start in starts] == [0, 1, 2]
    assert 0 == starts[0]["step"] < starts[1]["step"] < starts[2]["step"] < 60
    assert steps_logged(run) == list(range(1, 61)), "every step is there once"


def test_warning_then_time_limit_then_scancel(cluster: Cluster, recorded_shards: Path, tmp_path: Path) -> None:
    """The warning and the time limit itself start the job again, scancel ends it for good; each saves first.

    No GPUs, two ranks on a node. SLURM looks at its time limits twice a minute, so this run has steps without end, and
    stands still meanwhile, so as not to use the processors.
    """
    run = tmp_path / "run"
    options = "--nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --time=30"
    job = cluster.sbatch(SCRIPT, options, tiny(recorded_shards, run, 50000, "checkpoint.every=50000"))

    def save_and_go_on(restarts: int, update: str) -> int:
        """The step that was saved when the time limit changed so, after which the job runs again."""
        with stopped_until_signalled(cluster, job, run):
            cluster.run("scontrol", "update", f"jobid={job}", update)
        cluster.until(job, "requeued", lambda: cluster.show(job)["Restarts"] == str(restarts))
        cluster.run("scontrol", "update", f"jobid={job}", "timelimit=30")
        # The log may lack its last lines when SLURM shows the requeue.
        cluster.until(job, "stopped", lambda: len(events(run, "stopped")) == restarts)
        saved: int = events(run, "stopped")[-1]["step"]
        cluster.until(job, "goes on", lambda: len(steps_logged(run)) >= saved + 3)
        return saved

    cluster.until(job, "step 3", lambda: len(steps_logged(run)) >= 3)
    warned = save_and_go_on(1, "timelimit=5")  # the warning comes 300 seconds ahead of it: now
    assert "TIME LIMIT" not in cluster.output(job)
    ended = save_and_go_on(2, "endtime=now")
    assert "DUE TO TIME LIMIT" in cluster.output(job)

    cluster.run("scancel", job)
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "2"), cluster.output(job)
    last = steps_logged(run)[-1]
    assert (run / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    assert [start["step"] for start in events(run, "start")] == [0, warned, ended]
    assert steps_logged(run) == list(range(1, last + 1))
    assert not events(run, "end")[-1]["requeue"]


def test_a_dead_node_is_left_behind(cluster: Cluster, recorded_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = cluster.sbatch(SCRIPT, TWO_NODES, tiny(recorded_shards, run, 60))
    cluster.until(job, "step 12", lambda: len(steps_logged(run)) >= 12)
    batch_host, other = cluster.show(job)["BatchHost"], events(run, "start")[0]["nodes"]
    dead = next(node for node in cluster.run("scontrol", "show", "hostnames", other).split() if node != batch_host)
    cluster.kill_node(dead)
    shown = cluster.wait(job)
    cluster.start_node(dead)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    first, second = events(run, "start")
    assert first["step"] == 0 and second["step"] >= 10 and dead not in cluster.run(
        "scontrol", "show", "hostnames", second["nodes"]
    ).split()  # fmt: skip
    assert steps_logged(run) == list(range(1, 61))


def test_a_crash_loop_stops_and_a_bad_recipe_never_starts(
    cluster: Cluster, recorded_shards: Path, tmp_path: Path
) -> None:
    checkout, run = copied_checkout(tmp_path), tmp_path / "run"
    (checkout / "far_scale" / "train" / "loop.py").write_text("raise RuntimeError('a broken edit')\n")
    more = ["faults.starts_without_progress=2"]
    options = TWO_NODES.replace("--nodes=2", "--nodes=1")
    crashing = cluster.sbatch(SCRIPT, options, tiny(recorded_shards, run, 60, *more), FAR_SCALE=checkout)
    bad = cluster.sbatch(SCRIPT, options, ["train.stepps=10", f"run_dir={tmp_path / 'bad'}"])
    lanes = cluster.sbatch(
        SCRIPT, options.replace("--ntasks-per-node=1", "--ntasks-per-node=3"), tiny(recorded_shards, run, 9)
    )
    options_short, warned = options.replace("--time=10", "--time=4"), {"SBATCH_SIGNAL": "USR1@300"}
    short = cluster.sbatch(SCRIPT, options_short, tiny(recorded_shards, run, 9), **warned)
    for job, text in (
        (bad, "train.stepps"),
        (lanes, "4 lanes cannot be shared evenly by 3 ranks"),
        (short, "--signal=USR1@300 and a time limit of 0:04:00"),
    ):
        shown = cluster.wait(job)
        assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "0")
        assert cluster.output(job).startswith("error: ") and text in cluster.output(job)
        assert len(cluster.output(job).splitlines()) == 1
    assert not (tmp_path / "bad").exists()

    shown = cluster.wait(crashing)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "2:0", "2")
    assert [event["event"] for event in read_events(run)] == ["start", "end", "start", "end", "no-progress"]
    assert f"error: job {crashing}: 2 starts in a row reached no checkpoint after step 0" in cluster.output(crashing)


def submit(cluster: Cluster, *arguments: object) -> list[str]:
    """Jobs of tools/submit.py."""
    size = ("--cpus-per-task", 1, "--time", "1:00:00")
    return cluster.run(sys.executable, ROOT / "tools" / "submit.py", "far_xl_ucf101_256_cond", *arguments, *size,
                       PYTHONPATH=ROOT).splitlines()  # fmt: skip


def test_submitit_resumes_after_preemption(cluster: Cluster, recorded_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (job,) = submit(cluster, *tiny(recorded_shards, run, 40), "--nodes", 2, "--gpus-per-node", 1)
    cluster.folder, folder = run, cluster.folder  # submitit keeps a job's output in the run directory
    cluster.until(job, "step 3", lambda: len(steps_logged(run)) >= 3)
    cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), cluster.output(job)
    stopped, done = events(run, "end")
    assert (stopped["status"], stopped["requeue"], done["status"], done["requeue"]) == (75, True, 0, False)
    assert [start["step"] for start in events(run, "start")] == [0, stopped["step"]]
    assert steps_logged(run) == list(range(1, 41))
    cluster.folder = folder


def test_a_chain_of_jobs_replaces_requeues(cluster: Cluster, recorded_shards: Path, tmp_path: Path) -> None:
    """The first is warned and stops, the second ends the training, the third does not even start it."""
    run = tmp_path / "run"
    first, second, third = submit(cluster, *tiny(recorded_shards, run, 60), "--gpus-per-node", 0, "--chain", 3)
    cluster.until(first, "step 3", lambda: len(steps_logged(run)) >= 3)
    assert cluster.show(second)["Reason"] == "Dependency"
    cluster.run("scancel", "--signal=USR2", first)
    assert [cluster.wait(job)["JobState"] for job in (first, second, third)] == ["FAILED", "COMPLETED", "COMPLETED"]
    ends = events(run, "end")
    assert [(end["job"], end["status"], end["requeue"]) for end in ends] == [
        (first, 75, False),
        (second, 0, False),
        (third, 0, False),
    ]
    assert [start["job"] for start in events(run, "start")] == [first, second]
    assert events(run, "start")[1]["step"] == ends[0]["step"]
    assert steps_logged(run) == list(range(1, 61))


def test_the_checkpoints_of_a_run_are_evaluated(
    cluster: Cluster, recorded: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    """By two processes; a job that is warned in the middle is started again and loses nothing."""
    run, evaluation = tmp_path / "run", tmp_path / "run" / "evaluation"
    options, more = "--nodes=1 --gpus-per-node=0 --cpus-per-task=1", ["checkpoint.every=2", "log.wandb.mode=offline"]
    training = cluster.sbatch(SCRIPT, f"{options} --ntasks-per-node=1", tiny(recorded_shards, run, 4, *more))
    assert cluster.wait(training)["ExitCode"] == "0:0", cluster.output(training)

    (tmp_path / "short.yaml").write_text(
        "clips: {source: the demo world, count: 2, size: 64}\nsampling: {given: 4, predicted: 4, steps: 1, batch: 1}\n"
        "metrics: [psnr]\npsnr: {mean_of: set}\n"
    )
    arguments = [str(run), "--protocol", str(tmp_path / "short.yaml"), "--videos", str(recorded)]
    script, cache = SCRIPT.with_name("evaluate.sh"), tmp_path / "cache"
    job = cluster.sbatch(script, f"{options} --ntasks-per-node=2", arguments, FAR_SCALE_CACHE=cache)
    cluster.until(job, "the first is begun", lambda: (evaluation / "short" / "step-00000002").exists())
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(job, "requeued", lambda: cluster.show(job)["Restarts"] == "1")
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.output(job)
    by_step = json.loads((evaluation / "short" / "scores_by_step.json").read_text())
    assert [entry["step"] for entry in by_step["steps"]] == [2, 4]
    assert not list((evaluation / "for_wandb").glob("*.json")), "all scores are in wandb"


def test_an_array_encodes_one_set(cluster: Cluster, recorded: Path, recorded_shards: Path, tmp_path: Path) -> None:
    script, options = SCRIPT.with_name("encode_latents.sh"), "--gpus-per-node=0 --cpus-per-task=1"
    arguments = ["--videos", str(recorded), "--out", str(tmp_path / "set"), "--autoencoder", "compact-vizdoom-f8c32"]
    arguments += ["--samples-per-shard", "2", "--actions", "4", "--min-frames", "16"]
    job = cluster.sbatch(script, f"--array=0-1 {options}", arguments)
    ends = [cluster.wait(f"{job}_{element}") for element in (0, 1)]
    assert [end["ExitCode"] for end in ends] == ["0:0", "0:0"], cluster.output(job)
    merging = [*arguments, "--merge", "--tasks", "2"]
    end = cluster.wait(last := cluster.sbatch(script, f"--dependency=afterany:{job} {options}", merging))
    assert end["ExitCode"] == "0:0", cluster.output(last)
    for path in recorded_shards.iterdir():
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()
