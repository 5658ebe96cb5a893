"""The node's cache: shared by processes, below its limit, intact after any kill."""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from far_scale.data.remote import fetch
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.table import ShardTable
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256
from harness.drill import wait_until
from harness.latent_sets import make_sample, write_set
from harness.launch import ROOT
from harness.processes import start
from harness.remote_sets import served, sizes_seen

FRAMES = [20 + number % 5 for number in range(24)]
READER = ROOT / "tests/harness/remote_sets.py"
GB = 10**9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=2)
    return tmp_path / "set"


class Reader:
    """A process that reads `samples`, and prints a line for each."""

    def __init__(self, url: str, cache: Path, limit: int, samples: list[tuple[int, int]]) -> None:
        self.samples, folder = samples, Path(tempfile.mkdtemp(dir=cache.parent))
        self.output, self.errors = folder / "output", folder / "errors"
        order = " ".join(f"{shard}.{sample}" for shard, sample in samples)
        self.process = start(READER, url, cache, limit, order, output=self.output, errors=self.errors)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def assert_right(self) -> None:
        """It ends well, and what it read are the samples that were written."""
        assert self.process.wait(60) == 0, self.errors.read_text()
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len(lines) == len(self.samples)
        for (shard, sample), line in zip(self.samples, lines, strict=True):
            number = 2 * shard + sample
            made = make_sample(number, FRAMES[number]).latents.float()
            assert line == [shard, sample, made.sum().item(), number]


@pytest.mark.slow
def test_three_processes_share_a_cache_smaller_than_the_set(folder: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in folder.glob("shard-*")]
    limit = sum(sizes) // 3
    orders = []
    for seed in range(3):
        samples = [divmod(number, 2) for number in range(24)] * 5
        random.Random(seed).shuffle(samples)
        orders.append(samples)
    cache = tmp_path / "cache"
    cache.mkdir()
    digests = {path.name: sha256(path) for path in folder.glob("shard-*")}
    asked_though_there: list[str] = []
    with served(folder) as server:
        server.watch = lambda name: (
            name in digests and (cache / digests[name]).exists() and asked_though_there.append(name)
        )
        readers = [Reader(server.url, cache, limit, samples) for samples in orders]
        seen = sizes_seen(cache, lambda: all(reader.process.poll() is not None for reader in readers))
        for reader in readers:
            reader.assert_right()
        assert max(seen) <= limit + 3 * max(sizes)
        assert max(server.asked.values()) > 3, "what was evicted was fetched again"
        assert not asked_though_there, "and nothing while it was there"
    kept = [path for path in cache.iterdir() if path.name != "lock"]
    assert sum(path.stat().st_size for path in kept) <= limit and not list(cache.glob("*.part"))


@pytest.mark.slow
def test_a_set_that_fits_is_fetched_once_by_all_processes(folder: Path, tmp_path: Path) -> None:
    samples = [divmod(number, 2) for number in range(24)]
    with served(folder) as server:
        for reader in [Reader(server.url, tmp_path / "cache", GB, samples) for _ in range(3)]:
            reader.assert_right()
        assert {count for name, count in server.asked.items() if name != "manifest.json"} == {1}
        assert len(server.asked) == 25


@pytest.mark.slow
def test_a_process_killed_while_fetching_harms_no_other(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with served(folder) as server:
        server.fails["shard-000003.tar"] = (1, "hang")
        victim = Reader(server.url, cache, GB, [(3, 0)])
        while not server.asked["shard-000003.tar"]:
            time.sleep(0.01)
        waiting = Reader(server.url, cache, GB, [(3, 1), (4, 0)])  # for the same file, until the lock is free
        while server.asked["manifest.json"] != 2:
            time.sleep(0.01)
        time.sleep(0.3)
        assert server.asked["shard-000003.tar"] == 1 and waiting.process.poll() is None
        victim.kill()
        waiting.assert_right()
        assert server.asked["shard-000003.tar"] == 2 and not list(cache.glob("*.part"))


def test_partial_files_of_a_killed_process_do_not_count(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with served(folder) as server:
        shard_set = ShardSet.open(server.url, NodeCache(cache, GB))
        left = cache / f"{'a' * 64}.part"
        left.write_bytes(bytes(10_000))
        other = cache / "not-ours.txt"
        other.write_text("somebody's notes")
        shard_set.read(0, 0)
        assert not left.exists() and other.exists()


@pytest.mark.slow
def test_killed_at_random_moments(folder: Path, tmp_path: Path) -> None:
    """All named files in the cache are complete."""
    cache, limit = tmp_path / "cache", sum(path.stat().st_size for path in folder.glob("shard-*")) // 2
    samples = [divmod(number, 2) for number in range(24)] * 200
    dice = random.Random(5)
    with served(folder) as server:
        for _ in range(2):
            victims = [Reader(server.url, cache, limit, dice.sample(samples, len(samples))) for _ in range(2)]
            assert wait_until(lambda victims=victims: all(victim.output.stat().st_size for victim in victims))
            time.sleep(dice.uniform(0, 0.3))
            for victim in victims:
                victim.kill()
        for path in cache.iterdir():
            if len(path.name) == 64:
                assert sha256(path) == path.name
        Reader(server.url, cache, limit, samples[:24]).assert_right()


def test_least_recently_used_file_is_evicted_and_stays_readable_while_open(folder: Path, tmp_path: Path) -> None:
    shards = sorted(folder.glob("shard-*.tar"))
    limit = sum(path.stat().st_size for path in shards[:4]) - 1
    limit += sum(path.stat().st_size for path in folder.glob("*.index.json"))
    with served(folder) as server:
        node = NodeCache(tmp_path / "cache", limit)
        shard_set = ShardSet.open(server.url, node)
        digests = [entry.sha256 for entry in shard_set.manifest.shards]
        for shard in range(12):
            shard_set.index(shard)  # small, and the first to be read
        for shard in (0, 1, 2):
            shard_set.read(shard, 0)
            time.sleep(0.02)
        shard_set.read(0, 1)  # now 1 is the oldest
        indexes = [entry.index_sha256 for entry in shard_set.manifest.shards]
        for digest in indexes:
            os.utime(node.folder / digest)
        first = shard_set._files[1]
        shard_set.read(3, 0)
        assert digests[1] not in node and all(digests[shard] in node for shard in (0, 2, 3))
        assert first.read(0, 512), "its bytes are there as long as it is open"
        assert 1 not in shard_set._files._values, "and the set has let go of it"
        assert torch.equal(shard_set.read(1, 0).latents, make_sample(2, FRAMES[2]).latents)
        assert server.asked[shards[1].name] == 2 and server.asked[shards[0].name] == 1


def test_a_file_of_another_size_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    with served(folder) as server:
        node = NodeCache(tmp_path / "cache", GB)
        digest = ShardSet.open(server.url, node).manifest.shards[0].sha256
        (node.folder / digest).write_bytes(b"half")
        assert ShardSet.open(server.url, node).read(0, 0).key == "clip_000"
        assert (node.folder / digest).stat().st_size == (folder / "shard-000000.tar").stat().st_size


def test_prefetch_stays_below_the_limit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads may exceed it by the files being fetched; prefetches wait for room."""
    monkeypatch.setattr(fetch, "STALL_SECONDS", 600.0)
    with served(folder) as server:
        probe = ShardSet.open(server.url, NodeCache(tmp_path / "probe", GB))
        first, second = probe.manifest.shards[:2]
        node = NodeCache(tmp_path / "cache", max(first.bytes, second.bytes))
        server.fails[first.file] = (1, "hang")
        stop = threading.Event()

        def hang() -> None:
            with fetch.interruptible(stop), pytest.raises(fetch.Interrupted):
                node.open(f"{server.url}/{first.file}", first.sha256, first.bytes)

        thread = threading.Thread(target=hang)
        thread.start()
        while not server.asked[first.file]:
            time.sleep(0.01)
        node.fetch_ahead(f"{server.url}/{second.file}", second.sha256, second.bytes)
        assert second.sha256 not in node and server.asked[second.file] == 0
        os.close(node.open(f"{server.url}/{second.file}", second.sha256, second.bytes))
        assert second.sha256 in node
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def test_clear_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file/cache: Not a directory; give a folder"):
        NodeCache(tmp_path / "file/cache", GB)
    with served(folder) as server:
        with pytest.raises(UserError, match=r"data\.cache_gb=0\.001 is too small for a shard of http://127"):
            shards = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB)).manifest.shards
            big = [entry.model_copy(update={"bytes": 10**7}) for entry in shards]
            manifest = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB)).manifest
            ShardSet(
                server.url, manifest.model_copy(update={"shards": ShardTable(big)}), NodeCache(tmp_path / "c", 10**6)
            )
        with pytest.raises(UserError, match="is read in training only"):
            ShardSet.open(server.url)
    assert ShardSet.open(folder, None).read(0, 0).key == "clip_000", "a local set needs no cache"


def test_a_full_disk_is_a_clear_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(folder) as server:
        shard_set = ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB))
        shard_set.index(0)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(fetch.os, "write", full)
        with pytest.raises(UserError, match=r"cache: no space left on this disk; lower data\.cache_gb"):
            shard_set.read(0, 0)
    assert not list((tmp_path / "cache").glob("*.part"))
