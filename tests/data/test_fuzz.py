"""Thousands of damaged and hostile shards, indexes and manifests: each is read right, or refused in one line.

Whatever stands in the files, nothing else may happen: no other exception, no file opened outside the set's folder, no
pickle, no allocation beyond what the files' own sizes justify.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.records import MAX_JSON_BYTES
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.stream import index_shard, stream
from far_scale.utils.errors import UserError
from harness.hostile import HUGE, attempt, damage, right, watched
from harness.latent_sets import read_all, write_set

FRAMES = [5, 6, 7]
ODD: list[Any] = [None, True, -1, 0, 1.5, 1e308, "", "1", [], {}, [[]], *HUGE]
NAMES = [
    "../shard-000000.tar",
    "../shard.00000.mds",
    "shard.00000.mds",
    "/etc/passwd",
    "a/../../b.json",
    "shard-000000.tar\n",
    "clip_000.json/..",
    "x" * 90,
    "",
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A watched set of two shards, after one read of each kind, so that late imports are done."""
    folder = tmp_path / "set"
    write_set(folder, FRAMES, samples_per_shard=2)
    (tmp_path / "secret.json").write_text('{"label": 0, "fps": 8.0, "source": "v", "frames": 2}')
    read_all(folder)
    with watched(folder):
        yield folder


def read_shard(folder: Path, name: str) -> list[Sample]:
    """All readers of a single tar, which must agree."""
    rows = index_shard(folder / name)
    samples = list(stream([str(folder / name)]))
    assert [(row.key, row.frames) for row in rows] == [(sample.key, len(sample.latents)) for sample in samples]
    return samples


def seal(folder: Path, number: int = 0, index: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Recompute sizes and checksums of a changed shard, as an attacker would, and change its index."""
    tar, path = folder / f"shard-{number:06d}.tar", folder / f"shard-{number:06d}.index.json"
    values, manifest = json.loads(path.read_text()), json.loads((folder / "manifest.json").read_text())
    data = tar.read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    values |= facts
    if index is not None:
        index(values)
    path.write_text(json.dumps(values))
    manifest["shards"][number] |= facts | {"index_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_damaged_shards(folder: Path) -> None:
    chance, tar = random.Random(1), folder / "shard-000000.tar"
    whole, made = tar.read_bytes(), read_all(folder)
    manifest = Manifest.read(folder)
    rows = ShardSet(folder, manifest).index(0).samples
    read = refused = 0
    for _ in range(1200):
        data = damage(whole, chance)
        tar.write_bytes(data)
        samples = attempt(lambda: read_shard(folder, tar.name), tar)
        assert samples is None or right(samples)
        seen = attempt(lambda: read_all(folder), tar)
        assert seen is None or (right(seen) and len(seen) == 3)
        if seen is not None:
            for row, sample, original in zip(rows, seen, made, strict=False):
                spans = (row.json_offset, row.json_bytes), (row.tensors_offset, row.tensors_bytes)
                if all(data[at : at + size] == whole[at : at + size] for at, size in spans):
                    assert torch.equal(sample.latents, original.latents) and sample.source == original.source
        read, refused = read + (seen is not None), refused + (samples is None)
        if data != whole and chance.random() < 0.1:
            with pytest.raises(UserError, match=tar.name):  # what no reader can see, the checksum does
                ShardSet(folder, manifest).verify_shard(0)
    assert read > 200 and refused > 400


@pytest.mark.slow
def test_damaged_shards_with_matching_checksums(folder: Path) -> None:
    chance, tar = random.Random(2), folder / "shard-000000.tar"
    whole = tar.read_bytes()
    for _ in range(500):
        tar.write_bytes(damage(damage(whole, chance), chance))
        if not tar.stat().st_size:
            continue
        seal(folder)
        seen = attempt(lambda: read_all(folder), tar)
        assert seen is None or (right(seen) and len(seen) == 3)


@pytest.mark.slow
def test_damaged_indexes_and_manifests(folder: Path) -> None:
    chance, index, manifest = random.Random(3), folder / "shard-000000.index.json", folder / "manifest.json"
    good = {path: path.read_bytes() for path in (index, manifest)}
    for _ in range(600):
        manifest.write_bytes(good[manifest])
        index.write_bytes(damage(good[index], chance))
        if index.read_bytes() != good[index]:
            assert attempt(lambda: read_all(folder), index) is None  # its checksum is the manifest's
        index.write_bytes(good[index])
        manifest.write_bytes(damage(good[manifest], chance))
        seen = attempt(lambda: read_all(folder), folder)  # a shard's name or checksum may have become another
        assert seen is None or right(seen)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a JSON document."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], by: Any) -> Any:
    if not at:
        return by
    changed = json.loads(json.dumps(value))
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = by
    return changed


@pytest.mark.slow
def test_every_value_of_index_and_manifest_replaced(folder: Path) -> None:
    index, manifest = folder / "shard-000000.index.json", folder / "manifest.json"
    good = {path: json.loads(path.read_text()) for path in (index, manifest)}
    for at in paths(good[index]):
        for odd in (*ODD, *NAMES):
            changed = replaced(good[index], at, odd)
            text = json.dumps(changed)
            index.write_text(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            sealed = replaced(good[manifest], ("shards", 0, "index_sha256"), digest)
            manifest.write_text(json.dumps(sealed))
            seen = attempt(lambda: read_all(folder), folder)
            assert seen is None or right(seen)
    index.write_text(json.dumps(good[index]))
    for at in paths(good[manifest]):
        for odd in (*ODD, *NAMES):
            manifest.write_text(json.dumps(replaced(good[manifest], at, odd)))
            seen = attempt(lambda: read_all(folder), folder)
            assert seen is None or right(seen)


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def header_of(values: Any) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


def test_hostile_headers_and_metadata(folder: Path) -> None:
    tar, chance = folder / "shard-000000.tar", random.Random(4)
    latent = {"dtype": "BF16", "shape": [2, 4, 2, 2], "data_offsets": [0, 64]}
    facts = {"label": 0, "fps": 8.0, "source": "v", "frames": 2}
    bombs = [
        b"[" * 60_000,
        b'{"latent":' * 6_000,
        b'{"latent":' + b"9" * 60_000 + b"}",
        b'"' + b"\\u" * 9,
        b"\xff\xfe{",
    ]
    headers: list[Any] = [replaced({"latent": latent}, at, odd) for at in paths({"latent": latent}) for odd in ODD]
    headers += [replaced({"latent": latent}, ("latent", "dtype"), name) for name in ("F64", "BOOL", "F8_E4M3", "bf16")]
    headers += [replaced({"latent": latent}, ("latent", "shape"), [size] * n) for size in HUGE for n in (1, 4, 15)]
    texts: list[Any] = [replaced(facts, at, odd) for at in paths(facts) for odd in (*ODD, "\ud800", float("nan"))]
    cases = [(header_of(header), json.dumps(facts).encode()) for header in [*headers, *bombs]]
    cases += [(header_of({"latent": latent}), s if isinstance(s, bytes) else json.dumps(s).encode()) for s in texts]
    cases += [(header_of({"latent": latent}), bomb) for bomb in bombs]
    cases += [(struct.pack("<Q", size % 2**64) + b"{}", json.dumps(facts).encode()) for size in HUGE]
    cases.append((header_of({"latent": latent}), b" " * (MAX_JSON_BYTES + 1)))
    good = 0
    for header, story in cases:
        order = [(tarfile.TarInfo("a.json"), story), (tarfile.TarInfo("a.safetensors"), header + bytes(64))]
        tar_of(tar, order if chance.random() < 0.5 else order[::-1])
        samples = attempt(lambda: read_shard(folder, tar.name), tar)
        good += samples is not None
    assert 0 < good < 40  # a label or a frame rate may well be another; nothing else


def test_hostile_tar_members(folder: Path, tmp_path: Path) -> None:
    tar = folder / "shard-000000.tar"
    whole = tar.read_bytes()
    secret = tmp_path / "secret.json"
    for name in (*NAMES, "a.json.gz", "a.pkl", "a.pyd", "é.json", str(secret)):
        for kind in (
            tarfile.REGTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.DIRTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar_of(tar, [(info, b"{}")])
            assert attempt(lambda: read_shard(folder, tar.name), tar) is None
    linked = tarfile.TarInfo("a.json")
    linked.type, linked.linkname = tarfile.SYMTYPE, str(secret)
    tar_of(tar, [(linked, b"")])
    assert attempt(lambda: read_shard(folder, tar.name), tar) is None
    # Sizes as every dialect of tar may write them, with the checksum made good; on plain members and extended headers.
    sizes = [
        b"77777777777\0",
        b"00777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"-0000000001\0",
        b"0x100000000\0",
    ]
    for at in (0, 1024):
        for kind in b"0\0xgLKS1257":
            for size in sizes:
                block = bytearray(whole[at : at + 512])
                block[124:136], block[156] = size, kind
                block[148:156] = b" " * 8
                block[148:156] = f"{sum(block):06o}\0 ".encode()
                tar.write_bytes(whole[:at] + bytes(block) + whole[at + 512 :])
                assert attempt(lambda: read_shard(folder, tar.name), tar) is None


def test_size_bombs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    tar, index, manifest = (folder / name for name in ("shard-000000.tar", "shard-000000.index.json", "manifest.json"))
    whole = tar.read_bytes()
    tar.write_bytes(gzip.compress(bytes(64 << 20)))  # a tar reader that unpacks would make 64 MB of these 64 KB
    assert attempt(lambda: read_shard(folder, tar.name), tar) is None
    tar.write_bytes(whole)
    monkeypatch.setattr("far_scale.data.shards.manifest.MAX_MANIFEST_BYTES", 1 << 20)
    monkeypatch.setattr("far_scale.data.shards.store.MAX_INDEX_BYTES", 1 << 20)
    good = manifest.read_text()
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 500_000, b'{"shards":[' + b"0," * 300_000 + b"0]}"):
        manifest.write_bytes(text)
        assert attempt(lambda: read_all(folder), manifest) is None
    manifest.write_bytes(good.encode() + b" " * (8 << 20))
    assert attempt(lambda: read_all(folder), manifest) is None
    manifest.write_text(good)
    with open(index, "ab") as file:
        file.truncate(1 << 36)  # a hole: 64 GB that take no place
    assert attempt(lambda: read_all(folder), index) is None
    os.remove(index)
    os.mkfifo(index)  # a reader that opened it would wait for ever
    assert attempt(lambda: read_all(folder), index) is None
