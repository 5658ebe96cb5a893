"""Remote shard sets: all kinds of URLs, failing servers, prefetch, and clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from far_scale.config.recipe import load_recipe
from far_scale.data.loader.lanes import Lane, LaneOrder
from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.loader.shard_prefetch import ShardPrefetch, shards_ahead
from far_scale.data.remote import fetch
from far_scale.data.remote.cache import NodeCache
from far_scale.data.remote.fetch import Interrupted, fetch_bytes, interruptible
from far_scale.data.shards.errors import DamagedError
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.exit_codes import REFUSED
from far_scale.utils.errors import UserError
from far_scale.utils.urls import is_remote, join_url, redact_url
from harness.latent_sets import make_sample, write_set
from harness.launch import small_recipe
from harness.processes import start_training
from harness.remote_sets import WebServer, served

FRAMES = [20 + number % 5 for number in range(22)]
GB = 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=5)
    return tmp_path / "set"


@pytest.fixture
def server(folder: Path) -> Iterator[WebServer]:
    with served(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, and half a second until a stalled transfer fails."""
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "STALL_SECONDS", 0.5)


def all_right(shard_set: ShardSet) -> None:
    """All samples are those that were written."""
    for number, frames in enumerate(FRAMES):
        read, made = shard_set.read(*divmod(number, 5)), make_sample(number, frames)
        assert torch.equal(read.latents, made.latents) and read.key == made.key and read.label == made.label


def stand_in(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of that name on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_over_http(server: WebServer, tmp_path: Path) -> None:
    all_right(ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB)))
    assert set(server.asked.values()) == {1} and len(server.asked) == 1 + 2 * 5
    again = ShardSet.open(server.url + "/", NodeCache(tmp_path / "cache", GB))
    all_right(again)
    assert server.asked["manifest.json"] == 2 and sum(server.asked.values()) == 12, "shards come out of the cache"


def test_through_a_pipe(folder: Path, tmp_path: Path) -> None:
    all_right(ShardSet.open(f"pipe:cat '{folder}'/{{file}} | cat", NodeCache(tmp_path / "cache", GB)))


def test_from_s3_and_gs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = tmp_path / "asked"
    aws = f'echo "$@" >> {requests}; [ "$1 $2" = "s3 cp" ] && exec cat "{folder}/${{4#s3://bucket/some/set/}}"'
    gsutil = f'echo "$@" >> {requests}; [ "$1 $2" = "-q cat" ] && exec cat "{folder}/${{3#gs://bucket/some/set/}}"'
    stand_in(tmp_path / "bin", "aws", aws, monkeypatch)
    stand_in(tmp_path / "bin", "gsutil", gsutil, monkeypatch)
    for scheme in ("s3", "gs"):
        all_right(ShardSet.open(f"{scheme}://bucket/some/set", NodeCache(tmp_path / f"cache-{scheme}", GB)))
    lines = requests.read_text().splitlines()
    assert lines[0] == "s3 cp --only-show-errors s3://bucket/some/set/manifest.json -"
    assert "-q cat gs://bucket/some/set/shard-000000.tar" in lines and len(lines) == 22


def test_a_command_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^s3://bucket/set/manifest.json: needs the command `aws`, which is not inst"):
        ShardSet.open("s3://bucket/set", NodeCache(tmp_path / "cache", GB))


@pytest.mark.parametrize("how", ["status", "cut", "flip", "hang"])
def test_temporary_failures_are_retried(
    server: WebServer, tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    shard_set = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB))
    tries = 1 if how in ("flip", "hang") else 3  # what is flipped twice alike is not tried a third time
    server.fails["shard-000001.tar"] = (tries, how)
    all_right(shard_set)
    assert server.asked["shard-000001.tar"] == 1 + tries and not list((tmp_path / "cache").glob("*.part"))
    lines = [line for line in capfd.readouterr().err.splitlines() if "shard-000001.tar: attempt" in line]
    reason = {"status": "503", "cut": "status 18", "flip": "SHA-256", "hang": "nothing came for 0.5 s"}[how]
    assert len(lines) == tries and all(reason in line and "of 6" in line for line in lines)


def test_refused_requests_are_not_retried(server: WebServer) -> None:
    with pytest.raises(fetch.FetchError, match=r"none.json: cannot be fetched .*404.*; attempt 1,"):
        fetch.fetch_bytes(f"{server.url}/none.json", 1000)
    assert server.asked["none.json"] == 1


@pytest.mark.slow
def test_permanent_failures_end_in_one_error(server: WebServer, folder: Path, tmp_path: Path) -> None:
    shard_set = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB))
    server.fails["shard-000002.tar"] = (99, "status")
    with pytest.raises(
        DamagedError, match=r"^http://127.*/shard-000002.tar: cannot be fetched .*503.*; attempt 6,.*check the URL"
    ):
        shard_set.read(2, 0)
    with pytest.raises(DamagedError, match="cannot be fetched"):
        shard_set.read(2, 1)
    assert server.asked["shard-000002.tar"] == fetch.ATTEMPTS, "what was tried in vain is not tried again"
    (folder / "shard-000003.tar").write_bytes((folder / "shard-000003.tar").read_bytes()[:-512])
    with pytest.raises(
        DamagedError, match=r"shard-000003.tar: .*cut off after \d+ of \d+ bytes, twice alike; attempt 2"
    ):
        shard_set.read(3, 0)
    (folder / "shard-000001.index.json").write_text("{}")
    with pytest.raises(
        DamagedError, match=r"shard-000001.index.json: .*its SHA-256 is not the manifest's, twice alike"
    ):
        shard_set.read(1, 0)
    with (folder / "shard-000000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DamagedError, match=r"shard-000000.tar: .*it has more than the \d+ bytes"):
        shard_set.read(0, 0)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_missing_manifest(server: WebServer, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"/some/set/other/manifest.json: cannot be fetched \(curl ended with status 22"
    ):
        ShardSet.open(f"{server.url}/other", NodeCache(tmp_path / "cache", GB))


def test_attempts_end_after_a_time_limit(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TOTAL_SECONDS", 0.0)
    server.fails["manifest.json"] = (99, "status")
    with pytest.raises(UserError, match="attempt 1, 0 s in all"):
        fetch_bytes(f"{server.url}/manifest.json", 1 << 20)


def test_pauses_grow_and_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 1.0)
    pauses: dict[int, list[float]] = {7: [], 8: []}
    for pid, seen in pauses.items():
        monkeypatch.setattr(fetch.os, "getpid", lambda pid=pid: pid)
        monkeypatch.setattr(fetch, "pause", lambda seconds, seen=seen: seconds and seen.append(seconds))
        with pytest.raises(UserError, match="sh ended with status 1: no message"):
            fetch_bytes("pipe:false {file}", 10)
    for seen in pauses.values():
        assert len(seen) == fetch.ATTEMPTS - 1
        assert all(0.5 * 2**number <= seconds <= 1.5 * 2**number for number, seconds in enumerate(seen))
    assert pauses[7] != pauses[8]


@pytest.mark.slow
def test_interrupted_fetches_end_soon(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "STALL_SECONDS", 60.0)
    server.fails["manifest.json"] = (9, "hang")
    event, ended = threading.Event(), threading.Event()

    def read() -> None:
        with interruptible(event), pytest.raises(Interrupted):
            fetch_bytes(f"{server.url}/manifest.json", 1 << 20)
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    while not server.asked["manifest.json"]:
        time.sleep(0.01)
    event.set()
    assert ended.wait(20)
    thread.join()


def test_processes_of_a_pipe_that_hangs_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"nothing came for 0\.5 s"):
        fetch_bytes(f"pipe:sh -c 'echo $$ > {tmp_path}/pid; sleep 1000; true'; true", 10)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} is still there: {state}")


def test_urls() -> None:
    assert join_url("http://h/a/set/?sig=x%2F", "f.tar") == "http://h/a/set/f.tar?sig=x%2F"
    assert redact_url("https://me:secret@h/a?sig=secret") == "https://h/a"
    assert (
        is_remote("s3://b/c")
        and is_remote("pipe:cat {file}")
        and not is_remote("shards/train")
        and not is_remote("C:x")
    )
    for url, words in (("ftp://h/a", "ftp://h/a: shard sets are read from"), ("pipe:cat f", r"needs \{file\} where")):
        with pytest.raises(UserError, match=words):
            is_remote(url)


def test_recipe_errors_for_urls() -> None:
    remote = "data.shards=https://host/set"
    with pytest.raises(UserError, match=r"data\.shards: it is remote .* set data\.cache_dir"):
        load_recipe("demo_cpu", [remote])
    with pytest.raises(UserError, match=r"data\.prefetch_gb: 4 is more than data\.cache_gb, 3"):
        load_recipe("demo_cpu", [remote, "data.cache_dir=c", "data.cache_gb=3"])
    with pytest.raises(UserError, match=r"data\.shards: ftp://h/s: shard sets are read from a folder, s3://"):
        load_recipe("demo_cpu", ["data.shards=ftp://h/s"])
    recipe = load_recipe("demo_cpu", [remote, "data.cache_dir=c"])
    assert recipe.hash() == load_recipe("demo_cpu").hash()


def loader(shard_set: ShardSet, **changes) -> PackLoader:
    packing = PackingConfig(lanes=4, frames=6, frame_stride=3, shuffle_window=4, seed=7, clips_per_pack=2)
    return PackLoader(shard_set, LatentScaling.of(shard_set.manifest, "channel"), range(4), packing, **changes)


def read(packs: PackLoader, steps: int) -> list[list[Pack]]:
    with packs:
        return list(islice(packs, steps))


@pytest.mark.slow
def test_packs_equal_those_of_the_local_set(server: WebServer, folder: Path, tmp_path: Path) -> None:
    here = read(loader(ShardSet.open(folder)), 12)
    size = sum(path.stat().st_size for path in folder.glob("shard-*.tar"))
    for ahead, limit in ((0, GB), (GB, GB), (size // 3, size // 2)):
        node = NodeCache(tmp_path / f"cache-{ahead}-{limit}", limit)
        remote = read(loader(ShardSet.open(server.url, node), ahead_bytes=ahead), 12)
        for ours, theirs in zip(remote, here, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a.keys, a.lane_state, a.clip_frames) == (b.keys, b.lane_state, b.clip_frames)
                assert torch.equal(a.latents, b.latents)


def test_prefetched_shards_are_those_that_the_lane_reads() -> None:
    counts = [5, 3, 8, 1, 7, 2, 6]
    for window in (1, 4):
        order = LaneOrder(counts, 3, 11, window)
        for lane in range(3):
            for begin in (0, 3, 9, 25):
                walk = Lane(order, lane)
                walk.go_to(begin)
                reads = [next(walk).shard for _ in range(40)]
                ahead = list(islice(shards_ahead(order, lane, begin), 60))
                for distance, shard in enumerate(reads):
                    # It stands there, and no later than where the shuffled lane may come to it.
                    assert any(shard == other and before < distance + 2 * window for before, other in ahead)
                assert [before for before, _ in ahead] == sorted(before for before, _ in ahead)


def test_prefetch_is_bounded_by_bytes(server: WebServer, tmp_path: Path) -> None:
    node = NodeCache(tmp_path / "cache", GB)
    shard_set = ShardSet.open(server.url, node)
    sizes = [entry.bytes for entry in shard_set.manifest.shards]
    order = LaneOrder(shard_set.samples_per_shard, 1, 0, 1)
    ahead = ShardPrefetch(shard_set, order, [0], 2 * max(sizes) + 1)
    lane = Lane(order, 0)
    first = list(dict.fromkeys(next(lane).shard for _ in range(22)))
    assert ahead.plan({0: 0}) == first[:2]
    ahead.move_to({0: 0})
    while len(list(node.folder.glob("[0-9a-f]*"))) < 4 or list(node.folder.glob("*.part")):
        time.sleep(0.01)
    assert ahead.plan({0: 5}) == first[1:3]
    ahead.move_to({0: 5})
    while shard_set.manifest.shards[first[2]].sha256 not in node:
        time.sleep(0.01)
    ahead.close()
    fetched = {name for name in server.asked if name.endswith(".tar")}
    assert fetched == {shard_set.manifest.shards[shard].file for shard in first[:3]}
    assert all(server.asked[name] == 1 for name in fetched)


def test_a_loader_closes_while_a_shard_hangs(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STALL_SECONDS", 600.0)
    shard_set = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB))
    for number in range(5):
        server.fails[f"shard-{number:06d}.tar"] = (99, "hang")
    packs = loader(shard_set, ahead_bytes=GB)
    while not any(name.endswith("tar") for name in list(server.asked)):
        time.sleep(0.01)
    closing = threading.Thread(target=packs.close)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("packs", "prefetch"))]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_closing_a_loader_wakes_threads_that_wait_for_packs(server: WebServer, tmp_path: Path) -> None:
    fetch.STALL_SECONDS = 600.0
    shard_set = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB))
    for number in range(5):
        server.fails[f"shard-{number:06d}.tar"] = (99, "hang")
    packs = loader(shard_set)
    met: list[BaseException] = []

    def wait() -> None:
        try:
            next(packs)
        except BaseException as error:
            met.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not any(name.endswith("tar") for name in list(server.asked)):
        time.sleep(0.01)
    packs.close()
    waiting.join(20)
    assert [type(error) for error in met] == [Interrupted]


@pytest.mark.slow
def test_two_ranks_train_on_a_remote_set_as_on_a_local_one(recorded_shards: Path, tmp_path: Path) -> None:
    runs = {name: tmp_path / name / "run" for name in ("here", "remote")}
    for run in runs.values():
        run.parent.mkdir()
    few = ["train.steps=5", "optimizer.warmup_steps=2"]
    size = sum(path.stat().st_size for path in recorded_shards.glob("shard-*"))
    remote = [f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_gb={2 * size / GB}", f"data.prefetch_gb={size / GB}"]
    with served(recorded_shards) as server:
        server.fails["shard-000001.tar"] = (1, "cut")
        local = small_recipe(recorded_shards, runs["here"], *few)
        assert start_training(2, local, runs["here"].parent / "out").wait() == [0, 0]
        there = [*small_recipe(recorded_shards, runs["remote"], *few), f"data.shards={server.url}", *remote]
        assert start_training(2, there, runs["remote"].parent / "out").wait() == [0, 0]
        assert server.asked.pop("manifest.json") == 1, "one rank fetches it for all"
        assert server.asked.pop("shard-000001.tar") == 2 and set(server.asked.values()) == {1}
    assert "shard-000001.tar: attempt 1 of 6" in (runs["remote"].parent / "out").read_text()
    losses = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] for run in runs.values()
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.slow
def test_all_ranks_stop_if_one_could_not_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where no aws is
    recipe = ["data.shards=s3://bucket/set", f"data.cache_dir={tmp_path / 'cache'}"]
    statuses = start_training(2, [*small_recipe(tmp_path, tmp_path / "run"), *recipe], tmp_path / "out").wait()
    assert REFUSED in statuses and not set(statuses) - {REFUSED, -9}
    lines = (tmp_path / "out").read_text().splitlines()
    assert any("error: s3://bucket/set/manifest.json: needs the command `aws`" in line for line in lines)
