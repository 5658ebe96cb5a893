"""MDS and WebDataset: the same bytes and packs; conversion both ways; hostile files are refused."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from far_scale.data.loader.pack_loader import Pack, PackLoader
from far_scale.data.loader.packing import PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards import inspect
from far_scale.data.shards.convert import convert
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.mds import MAX_SAMPLES, check_fits, write_mds
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.stream import index_shard, member_reader, read_samples, stream
from far_scale.data.shards.table import ShardTable
from far_scale.utils.errors import UserError
from harness import processes
from harness.hostile import ALLOWED_BYTES, HUGE, attempt, damage, right, watched
from harness.latent_sets import FACTS, make_sample, read_all, write_set
from harness.mosaic import import_streaming
from harness.refusal import refused

FRAMES = [5, 9, 6, 7, 12, 5, 8, 6, 11, 7]


def both(tmp_path: Path, frames: list[int] = FRAMES, samples_per_shard: int = 3) -> tuple[Path, Path]:
    """The same set as tars and as MDS files."""
    tars, mds = tmp_path / "tars", tmp_path / "mds"
    write_set(tars, frames, samples_per_shard)
    convert(ShardSet.open(tars), mds, "mds")
    return tars, mds


def members(folder: Path, file: str) -> list[tuple[str, bytes, bytes]]:
    with open(folder / file, "rb") as opened:
        samples = read_samples(member_reader(file, opened), with_data=True)
        return [(row.key, metadata, tensors) for row, metadata, tensors in samples]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_conversion_is_lossless_both_ways(tmp_path: Path) -> None:
    tars, mds = both(tmp_path)
    (tars / "rejected.jsonl").write_text('{"source": "v", "key": "k", "reason": "broken"}\n')
    again = tmp_path / "again"
    convert(ShardSet.open(tars), tmp_path / "with_rejects", "mds")
    convert(ShardSet.open(tmp_path / "with_rejects"), again, "tar")
    made = contents(again)
    assert json.loads(made.pop("conversion.json"))["format"] == "tar"
    assert made == contents(tars)  # tars, indexes, manifest and rejects, to the last byte

    before, after = Manifest.read(tars), Manifest.read(mds)
    assert after.shard_format == "mds" and before.shard_format == "tar"
    assert [shard.file for shard in after.shards] == [f"shard.{n:05d}.mds" for n in range(4)]
    own = {"shards"}
    assert after.model_dump(exclude=own) == before.model_dump(exclude=own)  # statistics among them
    for number, (tar, file) in enumerate(zip(before.shards, after.shards, strict=True)):
        assert members(tars, tar.file) == members(mds, file.file)
        assert ShardSet.open(tars).index(number).sums == ShardSet.open(mds).index(number).sums
    inspect.verify(ShardSet.open(mds))
    assert "MDS" in inspect.describe(ShardSet.open(mds)) and "tars" in inspect.describe(ShardSet.open(tars))


def test_gaps_in_the_numbers_are_kept(tmp_path: Path) -> None:
    """The number of a shard without samples is left out."""
    tars = tmp_path / "tars"
    write_set(tars, FRAMES, 3)
    manifest = Manifest.read(tars)
    manifest.model_copy(update={"shards": ShardTable((manifest.shards[0], manifest.shards[3]))}).write(tars)
    made = convert(ShardSet.open(tars), tmp_path / "mds", "mds")
    assert [shard.file for shard in made.shards] == ["shard.00000.mds", "shard.00003.mds"]
    back = convert(ShardSet.open(tmp_path / "mds"), tmp_path / "back", "tar")
    assert back == Manifest.read(tars)


def test_streaming_datasets_read_the_same_bytes(tmp_path: Path) -> None:
    streaming = import_streaming()
    tars, mds = both(tmp_path)
    expected = [sample for shard in Manifest.read(tars).shards for sample in members(tars, shard.file)]
    for dataset in (
        streaming.LocalDataset(str(mds)),
        streaming.StreamingDataset(local=str(mds), batch_size=1, shuffle=False, validate_hash="sha256"),
    ):
        read = [(sample["__key__"], sample["json"], sample["safetensors"]) for sample in dataset]
        assert read == expected


def test_files_equal_those_of_the_mds_writer(tmp_path: Path) -> None:
    streaming = import_streaming()
    _, mds = both(tmp_path, samples_per_shard=len(FRAMES))
    columns = {"__key__": "str", "json": "bytes", "safetensors": "bytes"}
    with streaming.MDSWriter(columns=columns, out=str(tmp_path / "library"), hashes=["sha256"], size_limit=None) as out:
        for key, facts, tensors in members(mds, "shard.00000.mds"):
            out.write({"__key__": key, "json": facts, "safetensors": tensors})
    assert (mds / "shard.00000.mds").read_bytes() == (tmp_path / "library" / "shard.00000.mds").read_bytes()
    assert json.loads((mds / "index.json").read_text()) == json.loads((tmp_path / "library/index.json").read_text())


def same(first: Pack, second: Pack) -> bool:
    assert first.actions is not None and second.actions is not None
    assert first.labels is not None and second.labels is not None
    facts = [(pack.keys, pack.clip_frames, pack.lane, pack.step, pack.lane_state) for pack in (first, second)]
    return (
        facts[0] == facts[1]
        and torch.equal(first.latents, second.latents)
        and torch.equal(first.actions, second.actions)
        and torch.equal(first.labels, second.labels)
    )


@pytest.mark.parametrize("tokens_per_pack", [None, 24])
@pytest.mark.slow
def test_a_thousand_packs_are_the_same_in_both_formats(tmp_path: Path, tokens_per_pack: int | None) -> None:
    chance = random.Random(0)
    tars, mds = both(tmp_path, [chance.randrange(4, 16) for _ in range(90)], 7)
    clips = None if tokens_per_pack else 2
    packing = PackingConfig(4, (2, 4), 1, 8, 5, clips_per_pack=clips, tokens_per_pack=tokens_per_pack)
    loaders = []
    for where in (tars, mds):
        shard_set = ShardSet.open(where)
        loaders.append(PackLoader(shard_set, LatentScaling.of(shard_set.manifest, "channel"), range(4), packing))
    with loaders[0] as first, loaders[1] as second:
        pairs = [pair for steps in islice(zip(first, second, strict=True), 250) for pair in zip(*steps, strict=True)]
    assert len(pairs) == 1000 and all(same(*pair) for pair in pairs)
    assert len({key for pack, _ in pairs for key in pack.keys}) > 500


def test_conversion_continues_after_a_kill(tmp_path: Path) -> None:
    tars, mds = both(tmp_path)
    out = tmp_path / "out"
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from far_scale.data.shards import convert as module
        from far_scale.data.shards.shard_set import ShardSet
        write, done = module.write_mds, []
        def write_or_die(path, samples, count):
            if len(done) == 2:
                path.write_bytes(b"half of a shard")
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(path)
            write(path, samples, count)
        module.write_mds = write_or_die
        module.convert(ShardSet.open({str(tars)!r}), Path({str(out)!r}), "mds")
    """
    ended = processes.run("-c", code)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (out / "manifest.json").exists() and not (out / "index.json").exists()
    assert [path for path in out.iterdir() if ".part" in path.name]
    (out / "shard.00001.index.json").unlink()  # as if the kill had come between a shard and its index
    whole = (out / "shard.00000.mds").stat().st_mtime_ns
    convert(ShardSet.open(tars), out, "mds")
    assert (out / "shard.00000.mds").stat().st_mtime_ns == whole
    assert contents(out) == contents(mds)
    convert(ShardSet.open(tars), out, "mds")  # nothing is left to do
    assert contents(out) == contents(mds)


def test_conversion_refuses(tmp_path: Path) -> None:
    tars, mds = both(tmp_path)
    source = ShardSet.open(tars)
    refused(lambda: convert(source, tmp_path / "x", "tar"), str(tars), "is tar already")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    refused(lambda: convert(source, tmp_path / "full", "mds"), "files here already")
    write_set(tmp_path / "other", FRAMES[:4], 3)
    refused(lambda: convert(ShardSet.open(tmp_path / "other"), mds, "mds"), str(mds), "another set")

    shard = tars / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 1
    shard.write_bytes(bytes(data))
    refused(lambda: convert(source, tmp_path / "y", "mds"), str(shard), "SHA-256")
    assert sorted(path.name for path in (tmp_path / "y").iterdir() if "0002" in path.name) == []
    assert not (tmp_path / "y" / "manifest.json").exists()


@pytest.mark.slow
def test_the_command_lines(tmp_path: Path) -> None:
    tars, mds = both(tmp_path)
    tools = Path(__file__).parents[2] / "tools"

    def run(*arguments: object) -> tuple[int, str]:
        ended = processes.run(*arguments)
        return ended.returncode, ended.stdout + ended.stderr

    status, text = run(tools / "convert_shards.py", tars, "--out", tmp_path / "m", "--format", "mds")
    assert status == 0 and "4 shards, 10 samples" in text and contents(tmp_path / "m") == contents(mds)
    status, text = run(tools / "inspect_shards.py", mds, "--verify")
    assert status == 0 and "verified" in text
    status, text = run(tools / "convert_shards.py", tars, "--out", tmp_path / "t", "--format", "tar")
    assert status == 2 and text.startswith("error: ") and len(text.splitlines()) == 1


def test_inspection_of_mds_files(tmp_path: Path) -> None:
    _, mds = both(tmp_path)
    index = mds / "index.json"
    values = json.loads(index.read_text())
    for text in (None, "{", "[" * 5000, json.dumps({**values, "shards": values["shards"][1:]})):
        index.unlink(missing_ok=True)
        if text is not None:
            index.write_text(text)
        refused(lambda: inspect.verify(ShardSet.open(mds)), str(index), "--fix")
    assert str(index) in inspect.fix(mds)
    inspect.verify(ShardSet.open(mds))
    (mds / "shard.00001.mds").write_bytes(b"no shard")
    assert "left:        7 samples in 3 shards" in inspect.fix(mds)
    inspect.verify(ShardSet.open(mds))
    streaming_shards = json.loads(index.read_text())["shards"]
    assert [shard["raw_data"]["basename"] for shard in streaming_shards] == [f"shard.{n:05d}.mds" for n in (0, 2, 3)]


def test_a_manifest_holds_one_format(tmp_path: Path) -> None:
    _, mds = both(tmp_path)
    path = mds / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][1]["file"] = "shard-000001.tar"
    path.write_text(json.dumps(values))
    refused(lambda: Manifest.read(mds), "some shards are tars and some are MDS files")


def test_what_does_not_fit_into_an_mds_file(tmp_path: Path) -> None:
    tars, _ = both(tmp_path)
    row = ShardSet.open(tars).index(0).samples[0]
    check_fits(tars, [row])
    refused(lambda: check_fits(tars, [row._replace(tensors_bytes=1 << 31)] * 2), str(tars), "lower --samples-per-shard")
    with pytest.raises(ValueError, match="1 samples, not 2"):
        write_mds(tmp_path / "x.mds", [("a", b"{}", b"")], 2)


# Fuzzing, as in test_fuzz.py.


@pytest.fixture
def mds(tmp_path: Path) -> Iterator[Path]:
    """An MDS set that is watched."""
    _, mds = both(tmp_path, [5, 6, 7], 2)
    read_all(mds)
    with watched(mds):
        yield mds


def read_shard(path: Path) -> list[Sample]:
    """All readers of a single MDS file, which must agree."""
    rows = index_shard(path)
    samples = list(stream([str(path)]))
    assert [(row.key, row.frames) for row in rows] == [(sample.key, len(sample.latents)) for sample in samples]
    return samples


@pytest.mark.slow
def test_damaged_mds_files(mds: Path) -> None:
    chance, path = random.Random(1), mds / "shard.00000.mds"
    whole, made = path.read_bytes(), read_all(mds)
    rows = ShardSet.open(mds).index(0).samples
    read = refusals = 0
    for _ in range(600):
        data = damage(whole, chance)
        path.write_bytes(data)
        samples = attempt(lambda: read_shard(path), path)
        assert samples is None or right(samples)
        seen = attempt(lambda: read_all(mds), path)
        assert seen is None or (right(seen) and len(seen) == 3)
        for row, sample, original in zip(rows, seen or [], made, strict=False):
            spans = (row.json_offset, row.json_bytes), (row.tensors_offset, row.tensors_bytes)
            if all(data[at : at + size] == whole[at : at + size] for at, size in spans):
                assert torch.equal(sample.latents, original.latents) and sample.source == original.source
        read, refusals = read + (seen is not None), refusals + (samples is None)
    assert read > 100 and refusals > 200


def test_every_number_of_an_mds_file_replaced(mds: Path) -> None:
    path = mds / "shard.00000.mds"
    whole = path.read_bytes()
    rows = index_shard(path)
    offsets = [4 * n for n in range(2 + len(rows))]  # count and offsets
    offsets += [row.json_offset - len(row.key) - 12 + 4 * n for row in rows for n in range(3)]  # sizes
    numbers = {0, 1, 81, MAX_SAMPLES, MAX_SAMPLES + 1, len(whole), *(n % 2**32 for n in HUGE)}
    for at in offsets:
        old = int(np.frombuffer(whole[at : at + 4], "<u4")[0])
        for number in {*numbers, old + 1, old - 1} - {old}:
            path.write_bytes(whole[:at] + np.asarray(number % 2**32, "<u4").tobytes() + whole[at + 4 :])
            assert attempt(lambda: read_shard(path), path) is None


def test_hostile_mds_files(mds: Path) -> None:
    path = mds / "shard.00000.mds"
    whole = path.read_bytes()
    (key, facts, tensors), *_ = members(mds, path.name)
    cases: list[list[tuple[str, bytes, bytes]]] = [
        [("../../etc", facts, tensors)],
        [("x" * 81, facts, tensors)],
        [("", facts, tensors)],
        [(key, facts, tensors)] * 2,
        [(key, facts, b"")],
        [(key, b"", tensors)],
        [(key, b" " * (1 << 16) + facts, tensors)],
    ]
    for case in cases:
        write_mds(path, case, len(case))
        assert attempt(lambda: read_shard(path), path) is None
    for columns in (b'"pkl"  ', b'"bytes"'):  # a column that the library would unpickle
        path.write_bytes(whole.replace(b'"bytes"', columns, 1))
        assert (attempt(lambda: read_shard(path), path) is None) == (columns != b'"bytes"')
    path.write_bytes(whole + b"\0")
    assert attempt(lambda: read_shard(path), path) is None
    with open(path, "wb") as file:  # a hole that claims as many samples as could ever be
        file.write(np.asarray(2**32 - 1, "<u4").tobytes())
        file.truncate(64 * ALLOWED_BYTES)
    assert attempt(lambda: read_shard(path), path) is None
    os.truncate(path, 0)
    assert attempt(lambda: read_shard(path), path) is None


# What the writer refuses, since no reader would take it.


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("MAX_JSON_BYTES", ("its JSON would have", "shorter name")),
        ("MAX_TENSORS_BYTES", ("its tensors would have", "cut the video")),
    ],
)
def test_samples_above_the_readers_limits_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, words: tuple[str, ...]
) -> None:
    from far_scale.data.shards import writer

    monkeypatch.setattr(writer, limit, 60)
    refused(lambda: write_set(tmp_path / "set", [5], 1), "videos/clip 0.mp4", "60 at most", *words)
    assert list((tmp_path / "set").iterdir()) == []


def test_sets_above_the_readers_limits_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from far_scale.data.shards import index, manifest

    monkeypatch.setattr(index, "MAX_INDEX_BYTES", 500)
    refused(lambda: write_set(tmp_path / "a", [5] * 9, 9), "shard-000000.index.json", "9 samples", "lower --samples")
    monkeypatch.undo()
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 2000)
    refused(lambda: write_set(tmp_path / "b", [5] * 9, 1), "manifest.json", "9 shards", "raise --samples-per-shard")


def test_a_source_that_is_too_long_for_any_reader(tmp_path: Path) -> None:
    from far_scale.data.shards.writer import ShardWriter

    with pytest.raises(UserError, match="its JSON would have"), ShardWriter(tmp_path / "set", FACTS, 1) as out:
        out.write(replace(make_sample(0, 4), source="x" * 70_000))
