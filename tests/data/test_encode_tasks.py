"""Encoding in tasks: the same bytes for any number; kills, damaged videos and missing tasks are reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from far_scale.data.encode.job import EncodingJob
from far_scale.data.encode.plan import encode_videos, plan_encoding
from far_scale.data.encode.tasks import encode_task, merge_tasks
from far_scale.data.shards import inspect
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.find import find_videos
from far_scale.data.video.sources import find_sources
from far_scale.data.video.transforms import FrameTransform
from far_scale.data.video.videos import write_mp4
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256
from harness import processes

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[2] / "tools" / "encode_latents.py"
AUTOENCODER = "compact-vizdoom-f8c32"
PER_SHARD = 2


def command(videos: Path, out: Path, *more: object) -> list[str]:
    settings = ["--autoencoder", AUTOENCODER, "--samples-per-shard", PER_SHARD, "--actions", 4, "--min-frames", 16]
    return [sys.executable, *map(str, [TOOL, "--videos", videos, "--out", out, "--workers", 1, *settings, *more])]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}


def run(videos: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return processes.run(*command(videos, out, *more)[1:], timeout=300)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1].removeprefix("error: ")


def planned(videos: Path, out: Path, device: str | None = "cpu") -> EncodingJob:
    return plan_encoding(
        find_sources(videos), out, AUTOENCODER, "bfloat16", PER_SHARD, 4, 0, 16, FrameTransform(64), device
    )


@pytest.fixture(scope="module")
def mixed(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight recorded episodes; of four more a cut .npz, a cut and a short one side by side, and a cut .mp4."""
    folder = tmp_path_factory.mktemp("mixed")
    whole = sorted(recorded.glob("*.npz"))
    for number, path in enumerate(whole):
        shutil.copy(path, folder / f"{number:02d}.npz")
    data = whole[0].read_bytes()
    (folder / "00-cut.npz").write_bytes(data[: len(data) // 2])
    (folder / "03-cut.npz").write_bytes(data[:-9])
    with np.load(whole[1]) as episode:
        np.savez(folder / "03-short.npz", frames=episode["frames"][:9], actions=episode["actions"][:9])
        write_mp4(folder / "whole.mp4", episode["frames"], 8)
    data = (folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "07-cut.mp4").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture(scope="module")
def single_run(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those videos, encoded by one run without tasks, in two processes."""
    out = tmp_path_factory.mktemp("single_run") / "set"
    encode_videos(
        find_videos(mixed), out, AUTOENCODER, "bfloat16", PER_SHARD, 4, min_frames=16, workers=2, max_rejected=0.4
    )
    return out


def test_rejects_are_listed_and_the_rest_is_the_same(mixed: Path, single_run: Path, recorded_shards: Path) -> None:
    rejected = [json.loads(line) for line in (single_run / "rejected.jsonl").read_text().splitlines()]
    assert [reject["source"] for reject in rejected] == ["00-cut.npz", "03-cut.npz", "03-short.npz", "07-cut.mp4"]
    for reject, reason in zip(
        rejected,
        ["not a whole .npz", "not a whole .npz", "9 frames, fewer than the 16", "cut off"],
        strict=True,
    ):
        assert reject["reason"].startswith(reason) and str(mixed) not in reject["reason"]
    made, whole = ShardSet.open(single_run), ShardSet.open(recorded_shards)
    # sorted, two a shard: 00-cut 00 | 01 02 | 03-cut 03-short | 03 04 | 05 06 | 07-cut 07
    assert [shard.file[6:12] for shard in made.manifest.shards] == ["000000", "000001", "000003", "000004", "000005"]
    assert made.samples_per_shard == [1, 2, 2, 2, 1]
    samples = [made.read(shard, row) for shard, count in enumerate(made.samples_per_shard) for row in range(count)]
    assert [sample.source for sample in samples] == [f"{number:02d}.npz" for number in range(8)]
    for number, sample in enumerate(samples):
        right = whole.read(number // 2, number % 2)
        assert sample.latents.equal(right.latents) and sample.actions.equal(right.actions)
    assert made.manifest.mean == pytest.approx(whole.manifest.mean, rel=1e-12)
    inspect.verify(made)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_any_number_of_tasks_makes_the_same_bytes(mixed: Path, single_run: Path, tmp_path: Path, tasks: int) -> None:
    out = tmp_path / "set"
    for task in reversed(range(tasks)):
        assert encode_task(planned(mixed, out), task, tasks, 1, 0.4) == 6 // tasks
        assert not (out / "manifest.json").exists()
    manifest = merge_tasks(planned(mixed, out, device=None), tasks, 0.4)
    assert (len(manifest.shards), manifest.samples, manifest.frames) == (5, 8, 192)
    assert digests(out) == digests(single_run)


def test_tasks_side_by_side_and_one_killed(mixed: Path, single_run: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "set", ("--tasks", 2, "--max-rejected", 0.4)
    tasks = [
        subprocess.Popen(
            command(mixed, out, "--task", task, *more),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1)
    ]
    # Task 1 has the shards 1, 3 and 5.
    while not (out / "shard-000001.index.json").exists():
        assert tasks[1].poll() is None
        time.sleep(0.001)
    os.kill(tasks[1].pid, signal.SIGKILL)
    tasks[1].communicate()
    _, progress = tasks[0].communicate(timeout=300)
    assert tasks[0].returncode == 0 and "frame/s" in progress and "6 of 6 videos" in progress
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert not (out / "shard-000005.index.json").exists()
    (out / ".shard-000005.1.part.tar").write_bytes(b"left by a kill in mid-write")
    message = complaint(run(mixed, out, "--merge", *more))
    assert "of 6 shards are missing or not whole" in message and "run --task 1 of --tasks 2 again" in message
    assert not (out / "manifest.json").exists()
    assert run(mixed, out, "--task", 1, *more).returncode == 0
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())  # not made again
    done = run(mixed, out, "--merge", *more)
    assert "5 shards, 8 samples, 192 frames; 4 videos rejected, see" in done.stdout, done.stderr
    assert digests(out) == digests(single_run)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(mixed, out, "--max-rejected", 0.4).returncode == 0  # all of it once more: there is nothing to do
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_merge_names_what_is_missing(mixed: Path, single_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(UserError, match="nothing was encoded here yet; run the tasks first, then --merge"):
        planned(mixed, out, device=None)
    shutil.copytree(single_run, out)
    job = planned(mixed, out, device=None)
    (out / "manifest.json").unlink()
    (out / "shard-000004.index.json").unlink()
    with open(out / "shard-000001.tar", "r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(UserError, match=r"2 of 6 shards .* not whole: 1, 4; run --task 0, 1 of --tasks 4 again"):
        merge_tasks(job, 4, 0.4)
    shutil.copy(single_run / "shard-000004.index.json", out)
    shutil.copy(single_run / "shard-000001.tar", out)
    without_first = (single_run / "rejected.jsonl").read_text().partition("\n")[2]  # without 00-cut.npz
    (out / "rejected.jsonl").write_text(without_first)
    with pytest.raises(UserError, match=r"1 of 6 shards .* not whole: 0; run --task 0 of --tasks 4 again"):
        merge_tasks(job, 4, 0.4)
    (out / "rejected.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"rejected\.jsonl: not the list of rejects that was written"):
        merge_tasks(job, 4, 0.4)
    assert not (out / "manifest.json").exists()
    shutil.copy(single_run / "rejected.jsonl", out)
    merge_tasks(job, 4, 0.4)
    assert digests(out) == digests(single_run)


def test_too_many_rejects_fail(mixed: Path, single_run: Path, tmp_path: Path) -> None:
    out, merged = tmp_path / "set", tmp_path / "merged"
    message = "1 of 12 videos are rejected, more than --max-rejected 0.05 allows, first 00-cut.npz: not a whole"
    for _ in range(2):  # at once, when it is run again
        with pytest.raises(UserError, match=message):
            encode_task(planned(mixed, out), 0, 2, 1, 0.05)
        # it stopped at the first shard that made it certain
        assert sorted(path.name for path in out.iterdir()) == [
            "encoding.json",
            "rejected-000000.jsonl",
            "shard-000000.index.json",
            "shard-000000.tar",
            "videos-000000.jsonl",
        ]
    shutil.copytree(single_run, merged, ignore=shutil.ignore_patterns("manifest.json", "rejected.jsonl"))
    shutil.copy(single_run / "rejected.jsonl", merged / "rejected-000000.jsonl")
    with pytest.raises(UserError, match="4 of 12 videos are rejected"):
        merge_tasks(planned(mixed, merged), 2, 0.3)
    assert (merged / "rejected.jsonl").exists() and not (merged / "manifest.json").exists()
    merge_tasks(planned(mixed, merged), 2, 0.34)
    assert digests(merged) == digests(single_run)


def test_task_numbers_out_of_range(mixed: Path, single_run: Path) -> None:
    for task, tasks in ((2, 2), (-1, 2)):
        with pytest.raises(UserError, match=f"--task {task} of --tasks 2: tasks count from 0 to 1"):
            encode_task(planned(mixed, single_run), task, tasks, 1, 0.4)
    assert encode_task(planned(mixed, single_run), 9, 10, 1, 0.4) == 0  # more tasks than shards: nothing to do


def test_when_all_are_rejected_there_is_no_set(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 1 videos are rejected; .*rejected\.jsonl says why"):
        encode_videos([mixed / "07-cut.mp4"], tmp_path / "set", AUTOENCODER, max_rejected=1.0)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_lists_with_labels_and_actions(recorded: Path, tmp_path: Path) -> None:
    files = sorted(recorded.glob("*.npz"))[:3]
    for number, path in enumerate(files):
        shutil.copy(path, tmp_path / f"{number}.npz")
    np.save(tmp_path / "turns.npy", np.full(24, 2))
    (tmp_path / "list.jsonl").write_text(
        '{"video": "2.npz", "label": 1}\n{"video": "0.npz", "label": 0, "actions": "turns.npy"}\n'
    )
    (tmp_path / "list.csv").write_text("video,label,actions\n2.npz,1,\n0.npz,0,turns.npy\n")
    assert find_sources(tmp_path / "list.csv") == find_sources(tmp_path / "list.jsonl")
    done = run(tmp_path / "list.csv", tmp_path / "set", "--labels", 2)
    assert done.returncode == 0, done.stderr
    shard_set = ShardSet.open(tmp_path / "set")
    first, second = shard_set.read(0, 0), shard_set.read(0, 1)
    assert [(first.source, first.label), (second.source, second.label)] == [("0.npz", 0), ("2.npz", 1)]
    with np.load(files[2]) as episode:
        assert first.actions.tolist() == [2] * 24 and second.actions.tolist() == episode["actions"].tolist()
    (tmp_path / "list.csv").write_text("video,label,actions\n\n2.npz,one,\n")
    with pytest.raises(UserError, match=r"list\.csv:3: `label` is 'one'"):
        find_sources(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("video,label,actions\n2.npz,0,\n0.npz,1,turns.npy\n")
    assert "videos 2 with fingerprint" in complaint(run(tmp_path / "list.csv", tmp_path / "set", "--labels", 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": "0.npz"}\n{"video": 3}\n', r"list\.jsonl:2: has \['video'\]; a line has `video`"),
        ('{"video": "0.npz", "class": 3}\n', r"list\.jsonl:1: has \['class', 'video'\]"),
        ('{"video": "0.npz"\n', r"list\.jsonl:1: no JSON"),
        ('{"video": "0.npz", "label": -1}\n', r"`label` is -1; it must be the number of a class"),
        ('{"video": "0.npz", "label": "run"}\n', "`label` is 'run'"),
        ('{"video": "0.npz", "actions": 4}\n', "`actions` is 4"),
        ('{"video": "0.npz"}\n\n{"video": "0.npz"}\n', r"list\.jsonl:3: .*0\.npz is listed already \(.*jsonl:1\)"),
        ("\n", "lists no video"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path / "list.jsonl")


def test_ucf101_folders_and_split_lists(tmp_path: Path) -> None:
    videos = tmp_path / "UCF-101"
    for name in ("Archery", "JumpRope", "JumpingJack"):
        for group in (1, 8):
            (videos / name).mkdir(parents=True, exist_ok=True)
            (videos / name / f"v_{name}_g{group:02d}_c01.avi").write_bytes(b"x")
    train, test = tmp_path / "trainlist01.txt", tmp_path / "testlist01.txt"
    train.write_text("JumpRope/v_JumpRope_g08_c01.avi 48\r\nArchery/v_Archery_g08_c01.avi 3\r\n")
    test.write_text("JumpRope/v_JumpRope_g01_c01.avi\nJumpingJack/v_JumpingJack_g01_c01.avi\n")
    with pytest.raises(UserError, match=r"classInd\.txt: there is no such list"):
        find_sources(videos, train)
    (tmp_path / "classInd.txt").write_text("3 Archery\r\n47 JumpingJack\r\n48 JumpRope\r\n")
    found = [(source.name, source.label) for source in find_sources(videos, train)]
    assert found == [("Archery/v_Archery_g08_c01.avi", 2), ("JumpRope/v_JumpRope_g08_c01.avi", 47)]
    found = [(source.name, source.label) for source in find_sources(videos, test)]
    assert found == [("JumpRope/v_JumpRope_g01_c01.avi", 47), ("JumpingJack/v_JumpingJack_g01_c01.avi", 46)]
    for text, message in [
        ("Golf/v_Golf_g01_c01.avi 3\n", r"trainlist01\.txt:1: Golf/v_Golf_g01_c01\.avi is not in .*UCF-101"),
        ("\nJumpRope/v_JumpRope_g08_c01.avi 47\n", r"trainlist01\.txt:2: .* does not fit classInd\.txt"),
        ("", "names no video"),
    ]:
        train.write_text(text)
        with pytest.raises(UserError, match=message):
            find_sources(videos, train)
    with pytest.raises(UserError, match=r"absent\.txt: there is no such list"):
        find_sources(videos, tmp_path / "absent.txt")
    (tmp_path / "classInd.txt").write_text("Archery\n")
    with pytest.raises(UserError, match=r"classInd\.txt:1: 'Archery' is no number"):
        find_sources(videos, test)
