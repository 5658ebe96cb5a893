"""Adopted MDS datasets, compressed ones too, compared with mosaicml-streaming itself."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from far_scale.data.remote import compression as compressions
from far_scale.data.remote import fetch
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards import inspect
from far_scale.data.shards.adopted_samples import SampleReader
from far_scale.data.shards.convert import convert
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from harness.foreign_sets import BOTH, adopted, as_npy, four_channels, json_bytes, npy, packs_of, same, write_tars
from harness.hostile import attempt, damage, watched
from harness.latent_sets import make_sample, read_all, write_set
from harness.mosaic import import_streaming
from harness.refusal import refused
from harness.remote_sets import served

pytestmark = pytest.mark.usefixtures("four_channels")
__all__ = ["four_channels"]

FRAMES = [20 + number % 5 for number in range(22)]
GB = 10**9
COLUMNS = {"__key__": "str", "latent": "ndarray:float16", "actions": "ndarray", "label": "int", "fps": "float32"}


def as_columns(sample: Sample) -> dict[str, Any]:
    assert sample.actions is not None
    return {
        "__key__": sample.key,
        "latent": sample.latents.half().numpy(),
        "actions": sample.actions.numpy(),
        "label": sample.label,
        "fps": np.float32(8),
    }


def write_mds_set(
    folder: Path,
    columns: dict[str, str],
    samples: Callable[[Sample], dict[str, Any]],
    compression: str | None = None,
    frames: list[int] = FRAMES,
) -> Path:
    """A dataset by the library's own writer, of some five samples a shard."""
    streaming = import_streaming()
    limit = 5 * (24 * 16 * 2 + 24 * 8 + 60)
    with streaming.MDSWriter(
        columns=columns, out=str(folder), compression=compression, hashes=["sha1"], size_limit=limit
    ) as out:
        for number, count in enumerate(frames):
            out.write(samples(make_sample(number, count)))
    return folder


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz", "br:3", "bz2", "snappy"])
@pytest.mark.slow
def test_every_sample_is_what_the_library_reads(tmp_path: Path, compression: str | None) -> None:
    theirs = write_mds_set(tmp_path / "theirs", COLUMNS, as_columns, compression)
    before = {path: path.read_bytes() for path in theirs.iterdir()}
    manifest = adopted(theirs, tmp_path / "set", **BOTH)
    node = None if compression is None else NodeCache(tmp_path / "cache", GB)
    ours = ShardSet.open(tmp_path / "set", node)
    assert len(manifest.shards) >= 4 and ours.needs_cache == (compression is not None)
    streaming = import_streaming()
    dataset = streaming.StreamingDataset(
        local=str(tmp_path / "local"), remote=str(theirs), batch_size=1, shuffle=False, validate_hash="sha1"
    )
    read = [ours.read(shard, number) for shard, count in enumerate(ours.samples_per_shard) for number in range(count)]
    for sample, seen in zip(read, dataset, strict=True):
        assert sample.key == seen["__key__"] and sample.label == seen["label"] and sample.fps == seen["fps"]
        assert sample.actions is not None and np.array_equal(sample.actions.numpy(), seen["actions"])
        assert np.array_equal(sample.latents.numpy(), seen["latent"])
    inspect.verify(ours)
    assert {path: path.read_bytes() for path in theirs.iterdir()} == before


@pytest.mark.slow
def test_compressed_shards_are_unpacked_once_per_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = adopted(write_mds_set(tmp_path / "b", COLUMNS, as_columns, "zstd"), tmp_path / "packed", **BOTH)
    own = write_set(tmp_path / "own", FRAMES, samples_per_shard=5)
    np.testing.assert_allclose((packed.mean, packed.std), (own.mean, own.std), rtol=1e-12)
    unpacked: list[int] = []
    original = compressions.decompress
    monkeypatch.setattr(fetch, "decompress", lambda data, *rest: (unpacked.append(len(data)), original(data, *rest))[1])
    for _ in range(2):  # two processes of a node
        shard_set = ShardSet.open(tmp_path / "packed", NodeCache(tmp_path / "cache", GB))
        for shard, count in enumerate(shard_set.samples_per_shard):
            for sample in range(count):
                shard_set.read(shard, sample, start=2, frames=3)
    assert len(unpacked) == len(packed.shards)
    refused(lambda: ShardSet.open(tmp_path / "packed").read(0, 0), "shard.00000.mds.zstd", "through a cache")
    made = convert(shard_set, tmp_path / "tars", "tar")
    assert made.mean == packed.mean
    straight = packs_of(ShardSet.open(tmp_path / "tars"), 8)
    for ahead in (0, GB):
        node = NodeCache(tmp_path / f"cache-{ahead}", GB)
        first = packs_of(ShardSet.open(tmp_path / "packed", node), 3, ahead_bytes=ahead)
        states = {pack.lane: pack.lane_state for pack in first if pack.step == 2}
        rest = packs_of(ShardSet.open(tmp_path / "packed", node), 5, step=3, lane_states=states)
        assert same([*first, *rest], straight)
    file = tmp_path / "b" / "shard.00001.mds.zstd"
    file.write_bytes(file.read_bytes()[:-9] + b"not zstd.")
    broken = ShardSet.open(tmp_path / "packed", NodeCache(tmp_path / "new", GB))
    refused(lambda: broken.read(1, 0), str(file), "cannot be fetched")
    file.unlink()
    gone = ShardSet.open(tmp_path / "packed", NodeCache(tmp_path / "new", GB))
    refused(lambda: gone.read(1, 0), str(file), "it is missing")


def test_remote_and_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    theirs = write_mds_set(tmp_path / "theirs", COLUMNS, as_columns, "gz")
    here = adopted(theirs, tmp_path / "here", **BOTH)
    with served(theirs) as server:
        there = adopted(f"{server.url}/index.json", tmp_path / "there", **BOTH)
        assert there.fingerprint() == here.fingerprint() and set(server.asked.values()) == {1}
        server.asked.clear()
        server.fails["shard.00001.mds.gz"] = (1, "flip")
        inspect.verify(ShardSet.open(tmp_path / "there", NodeCache(tmp_path / "cache", GB)))
        assert server.asked.pop("shard.00001.mds.gz") == 2 and set(server.asked.values()) == {1}


COLUMN_SETS: list[tuple[dict[str, str], Callable[[Sample], dict[str, Any]], dict[str, Any]]] = [
    (
        {"z": "ndarray:float32:24,4,2,2", "y": "str_int", "pickled": "pkl", "rate": "float64"},
        lambda s: {"z": s.latents.float().numpy(), "y": s.label, "pickled": {"a": 1}, "rate": 8.0},
        {"label_in": "y", "labels": 3, "fps": "rate"},
    ),
    (
        {"z": "ndarray", "meta": "json"},
        lambda s: {"z": s.latents.double().numpy(), "meta": {"fps": 8, "acts": s.actions.tolist()}},  # type: ignore[union-attr]
        {"actions_in": "meta:acts", "actions": 4, "fps": "meta:fps"},
    ),
    (
        {"safetensors": "bytes", "json": "bytes", "cls": "uint8"},
        lambda s: {"safetensors": save({"z": s.latents}), "json": json_bytes(fps=8.0), "cls": np.uint8(s.label or 0)},
        {"labels": 3},
    ),
    ({"x": "bytes", "id": "str"}, lambda s: {"x": npy(s.latents.half().numpy()), "id": f"a/{s.key}"}, {"fps": 8.0}),
]


@pytest.mark.parametrize(("columns", "samples", "options"), COLUMN_SETS)
def test_columns_of_every_encoding(
    tmp_path: Path, columns: dict[str, str], samples: Callable[[Sample], dict[str, Any]], options: dict[str, Any]
) -> None:
    theirs = write_mds_set(tmp_path / "theirs", columns, samples, frames=[24] * 12)
    adopted(theirs, tmp_path / "set", **options)
    for number, sample in enumerate(read_all(tmp_path / "set")):
        made = make_sample(number, 24)
        assert torch.equal(sample.latents.bfloat16(), made.latents) and sample.fps == 8
        assert sample.label == (made.label if "labels" in options else None)
        if "actions" in options:
            assert torch.equal(sample.actions, made.actions)
        assert sample.source == (f"a/{made.key}" if "id" in columns else sample.key)
    inspect.verify(ShardSet.open(tmp_path / "set"))


def test_what_is_refused(tmp_path: Path) -> None:
    theirs = write_mds_set(tmp_path / "theirs", COLUMNS, as_columns)
    index = json.loads((theirs / "index.json").read_bytes())
    for each in index["shards"]:  # whose digests would refuse all of these
        each["raw_data"]["hashes"] = {}
    (theirs / "index.json").write_text(json.dumps(index))
    whole = {path.name: path.read_bytes() for path in theirs.iterdir()}
    shard = whole["shard.00001.mds"]
    other = write_mds_set(tmp_path / "other", {**COLUMNS, "latent": "ndarray"}, as_columns) / "shard.00001.mds"
    twice = {**index, "shards": index["shards"][:1] * 2}
    outside = {**index["shards"][0], "raw_data": {"basename": "../x.mds", "bytes": 5, "hashes": {}}}
    cases: list[tuple[str, bytes | None, dict[str, Any], str]] = [
        ("shard.00001.mds", shard[:-1], {}, "its offsets do not fit its size"),
        ("shard.00001.mds", b"garbage", {}, "not an MDS file, or cut off"),
        ("shard.00001.mds", shard.replace(b"ndarray:float16", b"ndarray:float32"), {}, "encoded as ndarray:float32"),
        ("shard.00001.mds", other.read_bytes(), {}, "column 'latent' is encoded as ndarray, not as in the first"),
        (
            "shard.00001.mds",
            whole["shard.00001.mds"].replace(b"clip_006", b"clip_005"),
            {},
            "'clip_005' is there twice",
        ),
        ("shard.00001.mds", None, {}, "shard.00001.mds: this shard is missing"),
        ("index.json", b"{}", {}, "no index of MDS shards"),
        ("index.json", json.dumps({"shards": [outside]}).encode(), {}, "no index of MDS shards"),
        ("index.json", json.dumps(twice).encode(), {}, "named twice"),
        ("index.json", whole["index.json"], {"latents": "label"}, "its latents are no label: it has actions, latent"),
        ("index.json", whole["index.json"], {"label_in": "x", "labels": 3}, "it has no x, but the members"),
        ("index.json", whole["index.json"], {"labels": 2}, "its label is 2, and the set has the labels 0 to 1"),
    ]
    for number, (file, data, options, word) in enumerate(cases):
        (theirs / file).write_bytes(data or b"")
        if data is None:
            (theirs / file).unlink()
        refused(lambda: adopted(theirs, tmp_path / str(number), **options), str(theirs), word)  # noqa: B023
        (theirs / file).write_bytes(whole[file])
    write_tars(tmp_path / "tars", FRAMES[:2], 2, as_npy)
    (tmp_path / "both.txt").write_text("tars\ntheirs\n")
    refused(lambda: adopted(tmp_path / "both.txt", tmp_path / "x"), "some shards are tars and some are MDS files")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_shard_is_checked_against_the_digest_in_its_index(tmp_path: Path, compression: str | None) -> None:
    theirs = write_mds_set(tmp_path / "theirs", COLUMNS, as_columns, compression)
    text = json.loads((theirs / "index.json").read_text())
    raw = text["shards"][1]["raw_data"]
    raw["hashes"] = {"xxh64": "0", "sha1": raw["hashes"]["sha1"][::-1]}
    (theirs / "index.json").write_text(json.dumps(text))
    shard = theirs / (text["shards"][1]["zip_data"] or raw)["basename"]
    refused(lambda: adopted(theirs, tmp_path / "set", **BOTH), str(shard), "its sha1 is not that in its index.json")


def test_numbers_name_no_samples(tmp_path: Path) -> None:
    columns = {"latent": "ndarray:float16", "n": "int"}
    theirs = write_mds_set(
        tmp_path / "theirs", columns, lambda sample: {"latent": sample.latents.half().numpy(), "n": 7}, frames=[5]
    )
    refused(lambda: adopted(theirs, tmp_path / "set", name_in="n", fps=8.0), "its n is number:int, and names are texts")


def test_the_package_that_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = write_mds_set(tmp_path / "theirs", COLUMNS, as_columns, "br:3")
    monkeypatch.setitem(sys.modules, "cramjam", None)
    refused(lambda: adopted(theirs, tmp_path / "set", **BOTH), "needs the package cramjam: pip install '.[mds]'")


@pytest.mark.parametrize("compression", ["zstd", "gz", "bz2", "br", "snappy"])
def test_nothing_unpacks_to_more_than_is_expected(compression: str) -> None:
    import_streaming()
    from streaming.base.compression import compress

    packed = compress(compression, bytes(1 << 20))
    assert compressions.decompress(packed, compression, 1 << 20) == bytes(1 << 20)
    for data, size in [(packed, (1 << 20) - 1), (packed, (1 << 20) + 1), (packed[:-2], 1 << 20), (b"", 5)]:
        with pytest.raises(compressions.DecompressionError):
            compressions.decompress(data, compression, size)


@pytest.fixture
def mds(tmp_path: Path) -> Iterator[Path]:
    """A foreign MDS file, under `watched`."""
    columns = {**COLUMNS, "pickled": "pkl"}
    theirs = write_mds_set(tmp_path / "theirs", columns, lambda s: {**as_columns(s), "pickled": {1}}, frames=[3, 4])
    adopted(theirs, tmp_path / "set", **BOTH)
    read_all(tmp_path / "set")
    with watched(tmp_path):
        yield theirs / "shard.00000.mds"


def test_damaged_foreign_mds_files(mds: Path, tmp_path: Path) -> None:
    rng, whole = random.Random(5), mds.read_bytes()
    reader = SampleReader.of(Manifest.read(tmp_path / "set"))
    read = refusals = rejected = 0
    for _ in range(400):
        mds.write_bytes(damage(whole, rng))
        found = attempt(lambda: reader.scan(mds, str(mds), "shard.00000.mds"), mds)
        refusals += found is None
        rejected += bool(found and found.rejects)
        seen = attempt(lambda: read_all(tmp_path / "set"), mds)
        assert seen is None or [len(sample.latents) for sample in seen] == [3, 4]
        read += seen is not None
    assert read > 50 and refusals > 100 and rejected > 5


@pytest.mark.slow
def test_inspection_through_a_cache(tmp_path: Path) -> None:
    theirs = write_mds_set(tmp_path / "theirs", COLUMNS, as_columns, "zstd")
    adopted(theirs, tmp_path / "set", **BOTH)
    shutil.copy(theirs / "shard.00000.mds.zstd", theirs / "shard.00001.mds.zstd")
    node = NodeCache(tmp_path / "cache", GB)
    assert "dropped:     " + str(theirs / "shard.00001.mds.zstd") in inspect.fix(tmp_path / "set", node)
    inspect.verify(ShardSet.open(tmp_path / "set", node))
