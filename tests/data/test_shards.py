"""The shard format: samples are read back, also by WebDataset; damage is reported."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load, save

from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards import inspect
from far_scale.data.shards import shard_set as shards
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.stream import index_shard, stream
from far_scale.data.shards.writer import ShardWriter
from far_scale.utils.errors import UserError
from harness.latent_sets import FACTS, make_sample, write_set
from harness.refusal import refused

FRAMES = [20, 21, 22, 23, 24, 25, 26]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=3)
    return tmp_path / "set"


def rewrite_manifest(folder: Path, change) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def test_whole_samples_round_trip(folder: Path) -> None:
    shard_set = ShardSet.open(folder)
    assert shard_set.samples_per_shard == [3, 3, 1]
    numbers = [(shard, sample) for shard, count in enumerate([3, 3, 1]) for sample in range(count)]
    for number, (shard, sample) in enumerate(numbers):
        read, made = shard_set.read(shard, sample), make_sample(number, FRAMES[number])
        assert (read.key, read.label, read.fps, read.source) == (made.key, made.label, 8.0, made.source)
        assert read.latents.dtype == torch.bfloat16 and torch.equal(read.latents, made.latents)
        assert torch.equal(read.actions, made.actions)
        assert shard_set.frames_of(shard, sample) == FRAMES[number]


def test_part_of_a_sample(folder: Path) -> None:
    shard_set, made = ShardSet.open(folder), make_sample(4, 24)
    part = shard_set.read(1, 1, start=3, frames=5, stride=4)
    assert torch.equal(part.latents, made.latents[3:20:4]) and torch.equal(part.actions, made.actions[3:20:4])
    assert torch.equal(shard_set.read(1, 1, start=23, frames=1).latents, made.latents[23:])
    for start, frames, stride in [(0, 25, 1), (-1, 2, 1), (20, 5, 1), (0, 5, 6), (0, 0, 1)]:
        with pytest.raises(ValueError, match="clip_004, which has 24"):
            shard_set.read(1, 1, start, frames, stride)


def test_only_the_needed_bytes_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real_read = shards._ShardFile.read

    def read(file: shards._ShardFile, offset: int, size: int) -> bytearray:
        sizes.append(size)
        return real_read(file, offset, size)

    monkeypatch.setattr(shards._ShardFile, "read", read)
    ShardSet.open(folder).read(0, 0, start=5, frames=2)
    frame_bytes = 4 * 2 * 2 * 2
    assert sizes[-2:] == [2 * frame_bytes, 2 * 8] and sum(sizes) < 400


def test_manifest_counts_and_statistics(folder: Path) -> None:
    manifest = Manifest.read(folder)
    everything = torch.cat([make_sample(i, f).latents for i, f in enumerate(FRAMES)]).double()
    np.testing.assert_allclose(manifest.mean, everything.mean(dim=(0, 2, 3)).numpy(), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, everything.std(dim=(0, 2, 3), correction=0).numpy(), rtol=1e-12)
    assert (manifest.samples, manifest.frames, manifest.min_frames, manifest.fps) == (7, sum(FRAMES), 20, 8.0)
    assert [shard.min_frames for shard in manifest.shards] == [20, 23, 26]
    assert manifest.latent_shape == (4, 2, 2) and (manifest.actions, manifest.labels) == (4, 3)
    inspect.verify(ShardSet.open(folder))


def test_webdataset_reads_the_tars(folder: Path) -> None:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    plain = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in plain] == [f"clip_{i:03d}" for i in range(7)]
    assert plain[2]["json"] == {"label": 2, "fps": 8.0, "source": "videos/clip 2.mp4", "frames": 22}
    raw = next(iter(webdataset.WebDataset(urls, shardshuffle=False)))
    tensors = load(raw["safetensors"])
    assert set(tensors) == {"latent", "action"} and torch.equal(tensors["latent"], make_sample(0, 20).latents)
    for source in (folder, urls):
        streamed = list(stream(source))
        assert [sample.label for sample in streamed] == [i % 3 for i in range(7)]
        assert all(torch.equal(s.latents, make_sample(i, FRAMES[i]).latents) for i, s in enumerate(streamed))


def test_float16_without_conditions(tmp_path: Path) -> None:
    facts = replace(FACTS, latent_dtype="float16", actions=0, labels=0)
    with ShardWriter(tmp_path, facts, samples_per_shard=2) as writer:
        made = make_sample(0, 5)
        writer.write(replace(made, latents=made.latents.half(), actions=None, label=None, fps=30.0))
        writer.write(replace(made, key="other", latents=made.latents.half(), actions=None, label=None, fps=25.0))
    sample = ShardSet.open(tmp_path).read(0, 1)
    assert sample.latents.dtype == torch.float16 and sample.actions is None and sample.label is None
    assert torch.equal(sample.latents, made.latents.half()) and Manifest.read(tmp_path).fps is None


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / name, FRAMES, samples_per_shard=4)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 5
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_threads_share_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    write_set(tmp_path, [6] * 12, samples_per_shard=1)
    shard_set, wrong = ShardSet.open(tmp_path), []

    def read_all(offset: int) -> None:
        for i in range(300):
            shard = (i * 5 + offset) % 12
            try:
                if not torch.equal(shard_set.read(shard, 0).latents, make_sample(shard, 6).latents):
                    wrong.append(shard)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=read_all, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(shard_set._files._values) == 2


def test_writer_refuses_samples_that_do_not_fit(tmp_path: Path) -> None:
    made = make_sample(0, 5)
    infinite = torch.full_like(made.latents, float("inf"))
    cases = [
        (replace(made, key="a.b"), "key"),
        (replace(made, latents=made.latents.float()), "bfloat16"),
        (replace(made, latents=made.latents[:, :3]), "[F, *(4, 2, 2)]"),
        (replace(made, latents=infinite), "finite"),
        (replace(made, actions=None), "action for each frame"),
        (replace(made, actions=made.actions[:4]), "action for each frame"),
        (replace(made, actions=made.actions + 2), "0 to 3"),
        (replace(made, label=3), "label is 3"),
        (replace(made, label=None), "label is None"),
    ]
    for number, (sample, word) in enumerate(cases):
        folder = tmp_path / str(number)
        writer = ShardWriter(folder, FACTS, samples_per_shard=1)
        refused(lambda writer=writer, sample=sample: writer.write(sample), "videos/clip 0.mp4", word)
        assert list(folder.iterdir()) == []  # nothing half-written
    refused(lambda: ShardWriter(tmp_path / "empty", FACTS, 1).close(), "no sample")


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota")])
def test_full_disk(number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    writer = ShardWriter(tmp_path, FACTS, samples_per_shard=1)
    monkeypatch.setattr("far_scale.utils.io.os.fsync", full)
    refused(lambda: writer.write(make_sample(0, 5)), "shard-000000.tar", reason, "free some space")
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_a_folder_with_shards(folder: Path) -> None:
    refused(lambda: ShardWriter(folder, FACTS, 1), str(folder), "another folder")


def test_manifest_missing_or_not_valid(folder: Path, tmp_path: Path) -> None:
    refused(lambda: ShardSet.open(tmp_path / "nowhere"), "nowhere", "manifest.json", "encode_latents")
    good = (folder / "manifest.json").read_text()
    changes = {
        "latent_shape": lambda m: m.update(latent_shape=[4, 2]),
        "colour": lambda m: m.update(colour="red"),
        "format": lambda m: m.update(format="far_scale.shards/2"),
        "fps": lambda m: m.update(fps="fast"),
        "shards.1.file": lambda m: m["shards"][1].update(file="../other.tar"),
        "shards.0.bytes": lambda m: m["shards"][0].update(bytes=-1),
        "named twice": lambda m: m["shards"].append(m["shards"][0]),
        "4 channels": lambda m: m.update(mean=[0.0]),
    }
    for word, change in changes.items():
        (folder / "manifest.json").write_text(good)
        rewrite_manifest(folder, change)
        refused(lambda: ShardSet.open(folder), "manifest.json", word)
    (folder / "manifest.json").write_text(good[:100])
    refused(lambda: ShardSet.open(folder), "manifest.json", "not a valid manifest", "JSON")


def test_shard_missing_or_truncated(folder: Path) -> None:
    shard = folder / "shard-000001.tar"
    whole = shard.read_bytes()
    opened = ShardSet.open(folder)
    shard.write_bytes(whole[:-512])
    refused(lambda: ShardSet.open(folder), "shard-000001.tar", "truncated")
    refused(lambda: opened.read(1, 0), "shard-000001.tar", "truncated")  # it was cut off after the set was opened
    shard.write_bytes(whole + b"\0" * 512)
    refused(lambda: ShardSet.open(folder), "shard-000001.tar", "not the shard that the manifest describes")
    shard.unlink()
    refused(lambda: ShardSet.open(folder), "shard-000001.tar", "missing")
    refused(lambda: opened.read(1, 0), "shard-000001.tar", "missing")
    refused(lambda: list(stream(folder)), "shard-000001.tar", "missing")


def test_other_bytes_of_the_same_size(folder: Path) -> None:
    shard = folder / "shard-000000.tar"
    whole = shard.read_bytes()
    row = ShardSet.open(folder).index(0).samples[1]
    last = row.tensors_offset + row.tensors_bytes - 1
    shard.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
    ShardSet.open(folder).read(0, 1)  # one flipped bit: only a checksum can tell
    refused(lambda: inspect.verify(ShardSet.open(folder)), "shard-000000.tar", "SHA-256")
    shard.write_bytes(b"\xff" * len(whole))
    refused(lambda: ShardSet.open(folder).read(0, 1), "shard-000000.tar", "clip_001", "not what the index describes")
    wrong_length = whole[: row.tensors_offset] + (1 << 60).to_bytes(8, "little") + whole[row.tensors_offset + 8 :]
    shard.write_bytes(wrong_length)
    refused(lambda: ShardSet.open(folder).read(0, 1), "shard-000000.tar", "header")
    longer = whole.replace(b'"shape":[21,4,2,2]', b'"shape":[99,4,2,2]')
    assert longer != whole
    shard.write_bytes(longer)
    refused(lambda: ShardSet.open(folder).read(0, 1), "shard-000000.tar", "wrong about `latent`")


def test_index_missing_or_changed(folder: Path) -> None:
    index = folder / "shard-000002.index.json"
    text = index.read_text()
    index.write_text(text.replace('"clip_006",26', '"clip_006",27'))
    refused(lambda: ShardSet.open(folder).read(2, 0), "shard-000002.index.json", "SHA-256")
    index.unlink()
    refused(lambda: ShardSet.open(folder).read(2, 0), "shard-000002.index.json", "missing")


def test_manifest_that_miscounts(folder: Path) -> None:
    rewrite_manifest(folder, lambda m: m["shards"][1].update(min_frames=24))
    refused(lambda: inspect.verify(ShardSet.open(folder)), "shard-000001.index.json", "counts")


def test_labels_and_actions_that_the_set_does_not_have(folder: Path) -> None:
    rewrite_manifest(folder, lambda m: m.update(labels=2))
    ShardSet.open(folder).read(0, 1)
    refused(lambda: ShardSet.open(folder).read(0, 2), "shard-000000.tar", "clip_002", "its label is 2", "2 labels")
    rewrite_manifest(folder, lambda m: m.update(labels=3, actions=3))
    refused(lambda: ShardSet.open(folder).read(0, 0), "clip_000", "an action beyond the set's 3")


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_with_unexpected_members(tmp_path: Path) -> None:
    latent = {"latent": torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16)}
    facts = json.dumps({"label": None, "fps": 8, "source": "v", "frames": 2}).encode()
    double = {"latent": torch.zeros(2, 4, 2, 2, dtype=torch.float64)}
    three = {**latent, "action": torch.zeros(3, dtype=torch.int64)}
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"README": b"hello"}, "not a shard"),
        ({"a.jpg": b"x", "a.json": facts}, "jpg"),
        ({"a.json": facts}, "safetensors"),
        ({"a.json": facts, "a.safetensors": b"\x01"}, "cut off"),
        ({"a.json": facts, "a.safetensors": b"\x01" * 400}, "cut off"),
        ({"a.json": facts, "a.safetensors": save({"weight": torch.zeros(2)})}, "weight"),
        ({"a.json": facts, "a.safetensors": save(double)}, "header"),
        ({"a.json": facts, "a.safetensors": save(three)}, "action"),
        ({"a.json": b"{}", "a.safetensors": save(latent)}, "JSON"),
        ({"a.json": facts.replace(b"2}", b"3}"), "a.safetensors": save(latent)}, "2 frames"),
    ]
    for number, (members, word) in enumerate(cases):
        path = tar_of(tmp_path / f"{number}.tar", members)
        refused(lambda path=path: index_shard(path), str(path), word)
        refused(lambda path=path: list(stream([str(path)])), str(path), word)
    whole = tar_of(tmp_path / "whole.tar", {"a.json": facts, "a.safetensors": save(latent)})
    assert len(index_shard(whole)) == len(list(stream([str(whole)]))) == 1
    cut, text = tmp_path / "cut.tar", tmp_path / "text.tar"
    cut.write_bytes(whole.read_bytes()[:1700])
    text.write_bytes(b"this is no tar file\n" * 100)
    for path in (cut, text):
        refused(lambda path=path: index_shard(path), str(path))
        refused(lambda path=path: list(stream([str(path)])), str(path), "not a tar file, or cut off")


def test_streams_from_commands(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    assert [sample.key for sample in stream([f"pipe:cat {tar}"])] == ["clip_000", "clip_001", "clip_002"]
    for command, word in ((f"head -c 5000 {tar}", "cut off"), (f"cat {tar}; exit 3", "exit 3"), ("false", "exit 1")):
        refused(lambda command=command: list(stream([f"pipe:{command}"])), command, word)
    refused(lambda: list(stream(["nowhere://shard.tar"])), "nowhere://shard.tar", "no gopen handler")


def recipe(**changes: object) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The sections data and model."""
    data = {"autoencoder": "some-autoencoder", "latent_shape": [4, 2, 2], "frames": 10, "frame_stride": 2}
    model = {"condition": "action", "classes": 4}
    for name, value in changes.items():
        (model if name in model else data)[name] = value
    return SimpleNamespace(**data), SimpleNamespace(**model)


def test_recipe_that_fits(folder: Path) -> None:
    shard_set = ShardSet.open(folder)
    shard_set.check(*recipe())
    shard_set.check(*recipe(condition="label", classes=3))
    shard_set.check(*recipe(condition="none", classes=0))
    shard_set.check(*recipe(frames=20, frame_stride=1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"autoencoder": "other"}, ["data.autoencoder=other", "by some-autoencoder", "set data.autoencoder"]),
        ({"latent_shape": [4, 8, 8]}, ["data.latent_shape=[4, 8, 8]", "are [4, 2, 2]", "set data.latent_shape"]),
        ({"classes": 5}, ["model.classes=5", "has 4 action classes", "set model.classes=4"]),
        ({"condition": "label", "classes": 4}, ["model.classes=4", "has 3 label classes"]),
        ({"frames": 21, "frame_stride": 1}, ["data.frames=21", "has 20 frames and 21 are needed", "lower data.frames"]),
        ({"frames": 11}, ["data.frames=11 with data.frame_stride=2", "21 are needed"]),
    ],
)
def test_recipe_that_does_not_fit(folder: Path, changes: dict[str, object], words: list[str]) -> None:
    refused(lambda: ShardSet.open(folder).check(*recipe(**changes)), str(folder), *words)


@pytest.mark.parametrize(("condition", "classes"), [("action", 4), ("label", 3)])
def test_recipe_with_a_condition_that_the_set_lacks(tmp_path: Path, condition: str, classes: int) -> None:
    write_set(tmp_path, [20], 1, replace(FACTS, actions=0, labels=0))
    sections = recipe(condition=condition, classes=classes)
    refused(lambda: ShardSet.open(tmp_path).check(*sections), f"model.condition={condition}", f"has no {condition}s")


def test_scaling(folder: Path) -> None:
    manifest = Manifest.read(folder)
    everything = torch.cat([sample.latents for sample in stream(folder)])
    factor = LatentScaling.of(manifest, "factor")
    assert torch.equal(factor.normalise(everything), everything.float() * 0.5)
    channel = LatentScaling.of(manifest, "channel")
    scaled = channel.normalise(everything)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3), correction=0), torch.ones(4))
    for scaling in (factor, channel):
        torch.testing.assert_close(scaling.restore(scaling.normalise(everything)), everything.float())
        assert LatentScaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling
    dead = manifest.model_copy(update={"std": (0.0, 1.0, 1.0, 1.0)})
    assert torch.isfinite(LatentScaling.of(dead, "channel").normalise(everything)).all()
    with pytest.raises(ValueError, match="channels"):
        factor.normalise(everything[:, :3])


def test_manifest_is_read_and_hashed_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Manifest.read(folder)
    assert whole.fingerprint() == hashlib.sha256(whole.model_dump_json().encode()).hexdigest()
    text = (folder / "manifest.json").read_text()
    monkeypatch.setattr("far_scale.data.shards.table._PIECE_CHARACTERS", 500)  # not two shards
    assert Manifest.parse(text.encode(), "manifest.json") == whole
    assert Manifest.parse(json.dumps(json.loads(text)).encode(), "manifest.json").shards[-1] == whole.shards[2]
    assert [shard.file for shard in whole.shards[1:]] == ["shard-000001.tar", "shard-000002.tar"]
    damaged = {
        "shards.2.samples": lambda m: m["shards"][2].update(samples=0),
        "shards.1.bytes": lambda m: m["shards"][1].update(bytes=1.5),
        "shards.2.more": lambda m: m["shards"][2].update(more=1),
        "shards.1: it is longer": lambda m: m["shards"][1].update(file="s" * 600),
        "at least": lambda m: m.update(shards=[]),
    }
    for words, change in damaged.items():
        values = json.loads(text)
        change(values)
        refused(lambda values=values: Manifest.parse(json.dumps(values).encode(), "manifest.json"), words)
    refused(lambda: Manifest.parse(text.replace("}\n  ]", "}").encode(), "manifest.json"), "does not end")
    refused(lambda: Manifest.parse(text.replace("},", "}").encode(), "manifest.json"), "not a valid manifest")


def test_missing_shards_are_checked_in_parts(folder: Path) -> None:
    for number in (0, 2):
        (folder / f"shard-{number:06d}.tar").unlink()
    shard_set = ShardSet.from_manifest(folder, Manifest.text(folder))
    parts = [[number for number, _ in shard_set.missing_shards(part, 2)] for part in range(2)]
    assert parts == [[0, 2], []] and [number for number, _ in shard_set.missing_shards()] == [0, 2]
    with pytest.raises(UserError, match=r"shard-000000\.tar: this shard is missing"):
        ShardSet.open(folder)
