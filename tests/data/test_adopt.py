"""Adopted WebDataset tars: read like our own sets, and refused in one line where they are broken."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save

from far_scale.data.adopt.sources import find_shards
from far_scale.data.loader.mixture import Mixture
from far_scale.data.remote import fetch
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards import inspect
from far_scale.data.shards import shard_set as shards
from far_scale.data.shards.adopted_samples import SampleReader
from far_scale.data.shards.convert import convert
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.exit_codes import REFUSED
from harness import processes
from harness.foreign_sets import (
    BOTH,
    DEALING,
    LANES,
    adopted,
    as_npy,
    as_pth,
    as_safetensors,
    four_channels,
    json_bytes,
    npy,
    packs_of,
    same,
    tar_of,
    torch_file,
    write_tars,
)
from harness.hostile import attempt, damage, watched
from harness.latent_sets import make_sample, read_all, write_set
from harness.launch import ROOT, small_recipe
from harness.processes import start_training
from harness.refusal import refused
from harness.remote_sets import served
from harness.strangers import Evil

pytestmark = [pytest.mark.usefixtures("four_channels"), pytest.mark.slow]
__all__ = ["four_channels"]

FRAMES = [20 + number % 5 for number in range(22)]
GB = 10**9


@pytest.mark.parametrize("members", [as_npy, as_pth, as_safetensors])
def test_packs_and_resume_are_those_of_our_own_set(tmp_path: Path, members: Callable[[Sample], dict[str, Any]]) -> None:
    write_set(tmp_path / "own", FRAMES, samples_per_shard=5)
    write_tars(tmp_path / "theirs", FRAMES, 5, members)
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    manifest = adopted(tmp_path / "theirs", tmp_path / "set", **BOTH)
    own, theirs = ShardSet.open(tmp_path / "own"), ShardSet.open(tmp_path / "set")
    assert (manifest.mean, manifest.std) == (own.manifest.mean, own.manifest.std)
    assert [entry.source for entry in manifest.shards] == sorted(map(str, before))
    straight = packs_of(own, 12)
    assert same(packs_of(theirs, 12), straight)
    # Two ranks for five steps, then one for seven.
    two = [pack for lanes in ([0, 2], [1, 3]) for pack in packs_of(theirs, 5, lanes)]
    states = {pack.lane: pack.lane_state for pack in two if pack.step == 4}
    rest = packs_of(theirs, 7, step=5, lane_states=states)
    assert same(sorted([*two, *rest], key=lambda pack: (pack.step, pack.lane)), straight)
    inspect.verify(theirs)
    assert "adopted where they lie" in inspect.describe(theirs)
    assert {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before


def test_adopted_tars_are_copied_to_the_nodes_disk(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs", FRAMES, 5, as_npy)
    adopted(tmp_path / "theirs", tmp_path / "set", **BOTH)
    straight = packs_of(ShardSet.open(tmp_path / "set"), 12)
    node = NodeCache(tmp_path / "disk", GB, "data.stage_local")
    shard_set = ShardSet.from_manifest(tmp_path / "set", Manifest.text(tmp_path / "set"), node)
    assert same(packs_of(shard_set, 12), straight)
    for path in [*(tmp_path / "theirs").iterdir(), *(tmp_path / "set").iterdir()]:
        path.unlink()
    assert same(packs_of(shard_set, 12), straight)
    assert shard_set.staged is not None
    counts = shard_set.staged.counts()
    assert (counts.copied_files, counts.opened_at_source) == (10, 0)


def test_the_fingerprint_does_not_depend_on_the_location_of_shards(tmp_path: Path) -> None:
    write_tars(tmp_path / "here", FRAMES[:6], 3, as_npy)
    first = adopted(tmp_path / "here", tmp_path / "a", **BOTH)
    (tmp_path / "here").rename(tmp_path / "there")
    second = adopted(str(tmp_path / "there" / "set-{000000..000001}.tar"), tmp_path / "b", **BOTH)
    assert first.fingerprint() == second.fingerprint() != adopted(tmp_path / "there", tmp_path / "c").fingerprint()
    refused(lambda: ShardSet.open(tmp_path / "a"), str(tmp_path / "here" / "set-000000.tar"), "missing")
    assert ShardSet.open(tmp_path / "b").manifest == second


def latents(frames: int = 6, dtype: Any = np.float32) -> np.ndarray:
    """[F, C, H, W], each number another."""
    return np.arange(frames * 24, dtype=dtype).reshape(frames, 4, 3, 2)


@pytest.mark.parametrize(("layout", "axes"), [("FCHW", (0, 1, 2, 3)), ("CFHW", (1, 0, 2, 3)), ("FHWC", (0, 2, 3, 1))])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_layouts_orders_and_types(tmp_path: Path, layout: str, axes: tuple[int, ...], order: str, dtype: Any) -> None:
    made = latents()
    stored = np.asarray(made.transpose(axes).astype(dtype), order=order)  # type: ignore[call-overload]
    for number, data in enumerate((npy(stored), save({"x": torch.from_numpy(np.ascontiguousarray(stored))}))):
        member = ("npy", "safetensors")[number]
        tar = tar_of(tmp_path / f"{number}.tar", {f"a.{member}": data})
        manifest = adopted(tar, tmp_path / str(number), layout=layout, fps=30.0)
        assert manifest.latent_shape == (4, 3, 2) and manifest.fps == 30
        assert manifest.latent_dtype == {np.float16: "float16", np.float64: "float32"}[dtype]
        shard_set, sizes = ShardSet.open(tmp_path / str(number)), list[int]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards._ShardFile, "read", counting(shards._ShardFile.read, sizes))
            read = shard_set.read(0, 0, start=1, frames=2, stride=3)
        assert np.array_equal(read.latents.double().numpy(), made[1:5:3])
        if order == "C" or member == "safetensors":  # the bytes of the frames 1 to 4, and of the header
            assert sum(sizes) <= 4 * 24 * stored.itemsize + 2 * 128


def counting(read: Callable[..., bytearray], sizes: list[int]) -> Callable[..., bytearray]:
    """`_Tar.read` that notes how much is read."""

    def counted(tar: shards._ShardFile, offset: int, size: int) -> bytearray:
        sizes.append(size)
        return read(tar, offset, size)

    return counted


def test_a_shape_that_allows_several_layouts_must_be_explained(tmp_path: Path) -> None:
    square = tar_of(tmp_path / "a.tar", {"a.npy": npy(latents(4))})
    refused(lambda: adopted(square, tmp_path / "set", fps=5.0), "[4, 4, 3, 2], which may be FCHW or CFHW; name one")
    adopted(square, tmp_path / "set", fps=5.0, layout="CFHW")
    assert np.array_equal(read_all(tmp_path / "set")[0].latents.numpy(), latents(4).transpose(1, 0, 2, 3))


def test_scaled_latents_are_scaled_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tar = tar_of(tmp_path / "a.tar", {"a.npy": npy(latents() * 0.25), "a.json": json_bytes(rate=12)})
    manifest = adopted(tar, tmp_path / "set", scale_factor=0.25, fps="json:rate")
    assert torch.equal(ShardSet.open(tmp_path / "set").read(0, 0).latents, torch.from_numpy(latents()))
    np.testing.assert_allclose(manifest.mean, latents().mean((0, 2, 3)), rtol=1e-12)
    half = tar_of(tmp_path / "b.tar", {"a.npy": npy((latents() * 0.25).astype(np.float16))})
    assert adopted(half, tmp_path / "half", scale_factor=0.25, fps=12.0).latent_dtype == "float32"
    # That autoencoder's latents have a std of 2.
    capfd.readouterr()
    for std, warned in [(2.3, False), (0.5, True), (9.0, True)]:
        noise = np.random.default_rng(0).normal(0.1, std, (50, 4, 3, 2))
        adopted(tar_of(tmp_path / f"{std}.tar", {"a.npy": npy(noise)}), tmp_path / f"{std}", fps=5.0)
        assert ("and 2 is usual of some-autoencoder; if they were scaled" in capfd.readouterr().err) == warned


# Tars of every kind.


def shuffled(members: dict[str, bytes]) -> dict[str, bytes]:
    names = list(members)
    random.Random(3).shuffle(names)
    return {name: members[name] for name in names}


def test_tars_as_programs_write_them(tmp_path: Path) -> None:
    long = "a_folder_with_a_long_name/" * 6
    names = ["train/x.0/0001", "./clip_2", f"{long}клип", "0003"]
    members = {}
    for number, name in enumerate(names):
        members[f"{name}.LATENT.npy"] = npy(latents(number + 3) + number)
        members[f"{name}.json"] = json_bytes(fps=5, label=number)
    ignored = {"README": b"no sample", "__meta__/x.json": b"{}", "._0003.npy": b"of a mac", "a/._1.npy": b"of a mac"}
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        tar = tar_of(tmp_path / f"{number}.tar", {**ignored, **shuffled(members)}, format=form)
        with tarfile.open(tar, "a", format=form) as more:
            for name, kind in (("train.folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "0003.json"
                more.addfile(info)
        adopted(tar, tmp_path / str(number), labels=4)
        found = {sample.source: sample for sample in read_all(tmp_path / str(number))}
        assert set(found) == {name.removeprefix("./") for name in names}
        for label, name in enumerate(names):
            sample = found[name.removeprefix("./")]
            assert np.array_equal(sample.latents.numpy(), latents(label + 3) + label) and sample.label == label
        keys = {sample.key for sample in found.values()}
        assert {"0003", "clip_2"} < keys and len(keys) == 4 and all(len(key) <= 80 and "/" not in key for key in keys)
        inspect.verify(ShardSet.open(tmp_path / str(number)))
    # The same samples as WebDataset finds where those of one stand together.
    del ignored["a/._1.npy"]  # a sample "a/" to WebDataset
    tar = tar_of(tmp_path / "whole.tar", {**ignored, **members}, format=tarfile.PAX_FORMAT)
    adopted(tar, tmp_path / "whole", labels=4)
    seen = [sample["__key__"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)]
    assert [sample.source for sample in read_all(tmp_path / "whole")] == [key.removeprefix("./") for key in seen]


def test_what_webdataset_would_not_read_is_no_silent_loss(tmp_path: Path) -> None:
    members = {"a.npy": npy(latents()), "b.npy": npy(latents())}
    linked = tar_of(tmp_path / "linked.tar", members)
    with tarfile.open(linked, "a") as more:
        for name, kind in (("c.npy", tarfile.LNKTYPE), ("d.npy", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.npy"
            more.addfile(info)
    refused(lambda: adopted(linked, tmp_path / "no", fps=5.0), str(linked), "'c'", "npy is empty, as a link", "(2 of")
    assert adopted(linked, tmp_path / "yes", 0.5, fps=5.0).samples == 2
    one = tar_of(tmp_path / "one.tar", {"c.npy": npy(latents())})
    joined = tmp_path / "joined.tar"
    joined.write_bytes(linked.read_bytes() + one.read_bytes())
    refused(lambda: adopted(joined, tmp_path / "no", fps=5.0), str(joined), "comes more: tars are joined by `tar -A`")


def locations(sources: list[str]) -> list[str]:
    return [shard.location for shard in find_shards(sources)]


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("far_scale.data.adopt.sources._MAX_SHARDS", 900)
    for name in ("b/2.tar", "b/c/1.tar", "a-{0}.tar", "a-00.tar", "a-01.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "list.txt").write_text("b\n\na-{00..01}.tar\n")
    here = [str(tmp_path / name) for name in ("b/2.tar", "b/c/1.tar", "a-00.tar", "a-01.tar")]
    assert locations([str(tmp_path / "list.txt")]) == here
    assert locations(["s3://b/{x,y}.tar", "https://h/z-{08..10}.tar?k=v"]) == [
        "s3://b/x.tar",
        "s3://b/y.tar",
        *(f"https://h/z-{n}.tar?k=v" for n in ("08", "09", "10")),
    ]
    for sources, word in [
        ([here[0], "s3://b/x.tar"], "some shards are remote"),
        ([here[0], str(tmp_path / "b")], "named twice"),
        ([str(tmp_path / "a-{0}.tar")], "without braces"),
        ([str(tmp_path / "a-{0..3.tar")], "do not close"),
        ([str(tmp_path / "a-{00..02}.tar")], "a-02.tar: there is no such shard"),
        (["s3://b/{0..999}.tar"], "more than 900 shards"),
    ]:
        refused(lambda sources=sources: find_shards(sources), word)
    (tmp_path / "empty").mkdir()
    refused(lambda: find_shards([str(tmp_path / "empty")]), "there is no .tar")


def test_folders_are_entered_through_links_and_nothing_is_lost_or_doubled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, store = tmp_path / "folder", tmp_path / "store"
    for name in (
        "folder/a.tar",
        "folder/._a.tar",
        "folder/.trash/b.tar",
        "folder/c.tar.gz",
        "folder/e.md",
        "store/d.tar",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (folder / "linked").symlink_to(store)
    (store / "back").symlink_to(folder)
    assert locations([str(folder)]) == [str(folder / "a.tar"), str(folder / "linked" / "d.tar")]
    assert f"{folder}: skipped 1 compressed tars, such as {folder / 'c.tar.gz'}" in capfd.readouterr().err
    (folder / "latest.tar").symlink_to("a.tar")
    refused(lambda: find_shards([str(folder)]), str(folder / "latest.tar"), f"the same file as {folder / 'a.tar'}")
    for name, text, word in [("empty", "\n", "names no shard"), ("self", "self.txt\n", "this list names itself")]:
        (tmp_path / f"{name}.txt").write_text(text)
        refused(lambda name=name: find_shards([str(tmp_path / f"{name}.txt")]), f"{name}.txt", word)
    (tmp_path / "shard.00000.mds").write_bytes(b"")
    refused(lambda: find_shards([str(tmp_path / "shard.00000.mds")]), "is an MDS file; name the index.json")


def test_labels_may_be_names(tmp_path: Path) -> None:
    labels = [b"\xef\xbb\xbf1\n", b"cat", b" 10 "]
    members = {
        f"{n}.{kind}": data for n, cls in enumerate(labels) for kind, data in (("npy", npy(latents())), ("cls", cls))
    }
    names = ("ant", "bee", "cat", "10")
    tar = tar_of(tmp_path / "a.tar", members)
    refused(lambda: adopted(tar, tmp_path / "no", classes=names, labels=4, fps=5.0), "'2'", "the name of class 3 too")
    names = ("ant", "bee", "cat", *"defghijk")
    adopted(tar, tmp_path / "set", classes=names, labels=11, fps=5.0)
    assert [sample.label for sample in read_all(tmp_path / "set")] == [1, 2, 10]
    inspect.verify(ShardSet.open(tmp_path / "set"))
    for text in ("dog", "1_0"):
        tar = tar_of(tmp_path / f"{text}.tar", {"a.npy": npy(latents()), "a.json": json_bytes(fps=5, label=text)})
        refused(lambda: adopted(tar, tmp_path / text, classes=names, labels=11), repr(text), "is no number")  # noqa: B023


# Refused shards and samples.


def test_samples_that_cannot_be_adopted(tmp_path: Path) -> None:
    good, fps = npy(latents()), json_bytes(fps=5)
    whole = torch.from_numpy(latents())
    damaged = latents()
    damaged[2, 1, 0, 0] = np.nan
    huge = good.replace(b"(6, 4, 3, 2)", b"(9, 4, 3, 2)")
    cases: list[tuple[dict[str, bytes], dict[str, Any], str]] = [
        ({"a.json": fps}, {}, "none that is an array or tensor, but json"),
        ({"a.x.npy": good, "a.y.npy": good, "a.json": fps}, {}, "it has x.npy, y.npy; name it by --latents"),
        ({"a.npy": good}, {}, "it has no json:fps or fps, but the members npy; name one by --fps"),
        ({"a.npy": good, "a.json": b"["}, {}, "its json is no JSON"),
        ({"a.npy": good, "a.json": json_bytes(fps="fast")}, {}, "its json:fps is 'fast', which is no number"),
        ({"a.npy": good, "a.json": fps}, {"labels": 3}, "it has no cls or json:label or"),
        ({"a.npy": good, "a.json": fps, "a.cls": b"7"}, {"labels": 3}, "label is 7, and the set has the labels 0 to 2"),
        ({"a.npy": good, "a.json": fps, "a.cls": b"cat"}, {"labels": 3}, "its cls is 'cat', which is no number"),
        ({"a.npy": good, "a.json": json_bytes(fps=5, actions=[0, 1])}, {"actions": 2}, "2 actions for 6 frames"),
        ({"a.npy": good, "a.json": json_bytes(fps=5, action=[9] * 6)}, {"actions": 2}, "numbers from 0 to 1"),
        ({"a.npy": npy(latents().transpose(0, 2, 3, 1)), "a.json": fps}, {}, "--layout FHWC fits"),
        ({"a.npy": npy(latents()[0]), "a.json": fps}, {}, "[4, 3, 2], and latents have the axes F, C, H and W"),
        ({"a.npy": npy(latents().astype(np.int64)), "a.json": fps}, {}, "latents are float16, bfloat16, float32"),
        ({"a.npy": npy(latents().astype(">f4")), "a.json": fps}, {}, "is an array of type '>f4', not one of <f2"),
        ({"a.npy": npy(np.array([None])), "a.json": fps}, {}, "is an array of type '|O'"),
        ({"a.npy": npy(damaged), "a.json": fps}, {}, "its npy is not finite"),
        ({"a.npy": good[:-4], "a.json": fps}, {}, "of another size than its data"),
        ({"a.npy": huge, "a.json": fps}, {}, "of another size than its data"),
        ({"a.npy": b"text" * 40, "a.json": fps}, {}, "is no .npy file"),
        ({"a.pth": torch_file({"x": whole, "y": whole}), "a.json": fps}, {}, "tensors x, y; name one by --latents pth"),
        ({"a.pth": torch_file([whole]), "a.json": fps}, {}, "holds list, not one dense tensor"),
        ({"a.pth": torch_file(whole.expand(6, 4, 3, 2).to_sparse()), "a.json": fps}, {}, "holds Tensor, not one dense"),
        ({"a.pth": b"text" * 40, "a.json": fps}, {}, "not a zip file"),
        ({"a.pth": torch_file(Evil(tmp_path / "mark")), "a.json": fps}, {}, "holds more than a tensor"),
        ({"a.safetensors": save({"x": whole})[:-4], "a.json": fps}, {}, "does not fit its data"),
        ({"a.safetensors": b"\xff" * 40, "a.json": fps}, {}, "is no safetensors file"),
        ({"a.safetensors": save({"x": whole}), "a.json": fps}, {"latents": "safetensors:z"}, "no tensor 'z', but 'x'"),
    ]
    for number, (members, options, word) in enumerate(cases):
        tar = tar_of(tmp_path / f"{number}.tar", members)
        refused(lambda: adopted(tar, tmp_path / f"out{number}", **options), str(tar), "'a'", word)  # noqa: B023
        assert not (tmp_path / f"out{number}" / "manifest.json").exists()
    assert not (tmp_path / "mark").exists()


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "whole.tar", {"a.npy": npy(latents()), "b.npy": npy(latents())}).read_bytes()
    twice = tar_of(tmp_path / "twice.tar", {"a.npy": npy(latents()), "a.NPY": npy(latents())})
    cases = {
        "cut": (whole[:2000], "cut off"),
        "at-a-member": (whole[: whole.index(b"b.npy")], "cut off"),
        "garbage": (random.Random(0).randbytes(5000), "no tar header where one should be"),
        "empty": (b"", "cut off"),
        "zeros": (bytes(10240), "there is no sample in it"),
        "gz": (gzip.compress(whole), "it is compressed; unpack it first"),
        "twice": (twice.read_bytes(), "'a.npy' is there twice"),
        "name": (whole.replace(b"a.npy", b"a\n.np", 1), "checksum"),
    }
    for name, (data, word) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        refused(lambda: adopted(path, tmp_path / name, fps=5.0), str(path), word)  # noqa: B023


def test_broken_samples_are_listed_up_to_a_fraction(tmp_path: Path) -> None:
    for number in range(3):
        members = {f"{key}.npy": npy(latents(3)) for key in "abcd"}
        if number == 1:
            members["b.npy"], members["e.json"] = npy(latents().transpose(1, 0, 2, 3)), b"{}"
        tar_of(tmp_path / f"{number}.tar", members)
    sources, out = str(tmp_path / "{0..2}.tar"), tmp_path / "set"
    refused(lambda: adopted(sources, tmp_path / "none", fps=5.0), "1.tar", "'b'", "(2 of its samples are broken)")
    refused(lambda: adopted(sources, out, 0.1, fps=5.0), str(out), "2 of 13 samples are broken", "1.tar: sample 'b'")
    manifest = adopted(sources, out, 0.2, fps=5.0)
    assert [entry.samples for entry in manifest.shards] == [4, 3, 4]
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(line["source"], line["key"]) for line in lines] == [(str(tmp_path / "1.tar"), key) for key in "be"]
    assert "[4, 6, 3, 2], not FCHW with C=4" in lines[0]["reason"] and "no member npy, but json" in lines[1]["reason"]
    inspect.verify(ShardSet.open(out))


def test_a_mistake_is_corrected_in_the_same_folder(tmp_path: Path) -> None:
    members = {"README.md": b"no sample", "a.npy": npy(latents().transpose(1, 0, 2, 3)), "a.cls": b"2"}
    tar, out = tar_of(tmp_path / "a.tar", {**members, "b.npy": npy(latents())}), tmp_path / "set"
    refused(lambda: adopted(tar, out, fps=5.0), str(tar), "'README': it has no member npy, but md (2 of its")
    refused(lambda: adopted(tar, out, fps=5.0, layout="CFHW", labels=1), "'README': it has no member npy")
    refused(lambda: adopted(tar, out, fps=5.0, name_in="cls"), "--name-in cls: a tar's samples have the names")
    refused(lambda: adopted(tar, out, classes=("x", "y"), labels=1), "--classes: names 2 classes, and --labels is 1")
    manifest = adopted(tar, out, 0.7, fps=5.0, layout="CFHW", labels=3)
    assert manifest.samples == 1 and len((out / "rejected.jsonl").read_text().splitlines()) == 2


# Resuming, and changed shards.


def test_adoption_resumes_after_a_kill_and_detects_changes(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs", FRAMES[:8], 2, as_npy)
    adopted(tmp_path / "theirs", tmp_path / "whole", **BOTH)
    out = tmp_path / "set"
    code = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from types import SimpleNamespace
        from harness import foreign_sets
        from far_scale.data.adopt import adopt as module
        known = foreign_sets.FACTS.autoencoder
        module.autoencoders.load = lambda name: SimpleNamespace(**known.model_dump(), latent_channels=4)
        original = module._write_index
        def write_or_die(job, number, *rest):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(job, number, *rest)
        module._write_index = write_or_die
        foreign_sets.adopted({str(tmp_path / "theirs")!r}, module.Path({str(out)!r}), actions=4, labels=3)
    """
    ended = processes.run("-c", code)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (out / "manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.index.json")}
    assert len(times) == 2
    manifest = adopted(tmp_path / "theirs", out, **BOTH)
    assert manifest == Manifest.read(tmp_path / "whole")
    assert times == {path: path.stat().st_mtime_ns for path in times}
    refused(
        lambda: adopted(tmp_path / "theirs", out, layout="CFHW", **BOTH),
        str(out),
        "was adopted with layout none, not CFHW",
    )

    shard = tmp_path / "theirs" / "set-000001.tar"
    write_tars(tmp_path / "others", [9, 9, 200, 200], 2, as_npy)
    os.replace(tmp_path / "others" / "set-000001.tar", shard)
    refused(lambda: ShardSet.open(out), str(shard), "adopt the shards again")
    again = adopted(tmp_path / "theirs", out, **BOTH)
    assert [entry.frames for entry in again.shards] == [41, 400, 44, 43] != [entry.frames for entry in manifest.shards]
    inspect.verify(ShardSet.open(out))


def test_processes_end_with_a_killed_adoption(tmp_path: Path, recorded_shards: Path) -> None:
    for number in range(40):
        shutil.copy(recorded_shards / "shard-000000.tar", tmp_path / f"{number}.tar")
    begun = subprocess.Popen(
        [
            *(sys.executable, "tools/adopt_shards.py", str(tmp_path), "--out", str(tmp_path / "set"), "--jobs", "2"),
            *("--autoencoder", Manifest.read(recorded_shards).autoencoder.name, "--layout", "FCHW"),
        ],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    children = Path(f"/proc/{begun.pid}/task/{begun.pid}/children")
    try:
        wait_until(lambda: (tmp_path / "set" / "sources.jsonl").exists() and len(children.read_text().split()) == 3)
        workers = children.read_text().split()
    finally:
        begun.kill()
        begun.wait()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_until(there: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_damage_is_found_skipped_and_dropped(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs", FRAMES, 5, as_npy)
    adopted(tmp_path / "theirs", tmp_path / "set", **BOTH)
    row = ShardSet.open(tmp_path / "set").index(1).samples[2]
    with (tmp_path / "theirs" / "set-000001.tar").open("r+b") as file:
        file.seek(row.latents_offset)
        file.write(b"\0")
    broken = ShardSet.open(tmp_path / "set")
    refused(lambda: broken.read(1, 2), "set-000001.tar", "'clip_007'", "is no .npy file", "adopt the shards again")
    refused(lambda: inspect.verify(broken), "set-000001.tar", "SHA-256")
    packs = packs_of(broken, 8, packing=replace(DEALING, max_damaged=9))
    skipped = {skip.key for pack in packs for skip in pack.skipped}
    assert skipped == {"clip_007"} and not any(key.startswith("clip_007") for pack in packs for key in pack.keys)
    assert "dropped:" in inspect.fix(tmp_path / "set")
    fixed = ShardSet.open(tmp_path / "set")
    assert fixed.manifest.samples == 17 and len(packs_of(fixed, 3)) == 12
    inspect.verify(fixed)


def test_mixtures_and_conversion(tmp_path: Path) -> None:
    own = write_set(tmp_path / "own", FRAMES[:6], samples_per_shard=3)
    write_tars(tmp_path / "theirs", FRAMES[:6], 3, as_pth)
    adopted(tmp_path / "theirs", tmp_path / "set", **BOTH)
    mixture = Mixture([ShardSet.open(tmp_path / "own"), ShardSet.open(tmp_path / "set")], [0.5, 0.5])
    assert {key[0] for pack in packs_of(mixture, 8) for key in pack.keys} == {"1", "2"}

    made = convert(ShardSet.open(tmp_path / "set"), tmp_path / "tars", "tar")
    assert made.adopted is None and made.mean == own.mean
    inspect.verify(ShardSet.open(tmp_path / "tars"))
    for one, other in zip(read_all(tmp_path / "tars"), read_all(tmp_path / "own"), strict=True):
        assert torch.equal(one.latents, other.latents) and (one.key, one.label) == (other.key, other.label)
    convert(ShardSet.open(tmp_path / "tars"), tmp_path / "mds", "mds")
    refused(lambda: convert(ShardSet.open(tmp_path / "set"), tmp_path / "x", "mds"), "--format tar")


# Remote shards.


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)


@pytest.mark.usefixtures("hasty")
def test_remote_shards_over_http(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs", FRAMES, 5, as_safetensors)
    here = adopted(tmp_path / "theirs", tmp_path / "here", **BOTH)
    out = tmp_path / "set"
    with served(tmp_path / "theirs") as server:
        server.fails["set-000002.tar"] = (1, "cut")
        urls = f"{server.url}/set-{{000000..000004}}.tar"
        manifest = adopted(urls, out, **BOTH)
        assert manifest.fingerprint() == here.fingerprint()
        assert server.asked.pop("set-000002.tar") == 2 and set(server.asked.values()) == {1} and len(server.asked) == 4
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
        server.asked.clear()
        assert adopted(urls, out, **BOTH) == manifest and not server.asked, "what is done is not fetched again"
        straight = packs_of(ShardSet.open(tmp_path / "here"), 8)
        for ahead in (0, GB):
            server.asked.clear()
            remote = ShardSet.open(out, NodeCache(tmp_path / f"cache-{ahead}", GB))
            assert same(packs_of(remote, 8, ahead_bytes=ahead), straight)
            assert set(server.asked.values()) == {1}
        inspect.verify(remote)
        # The set itself may be remote as well.
        server.folder = out
        listed = json.loads((out / "manifest.json").read_text())
        for entry, source in zip(listed["shards"], here.shards, strict=True):
            entry["source"] = source.source
        (out / "manifest.json").write_text(json.dumps(listed))
        assert same(packs_of(ShardSet.open(server.url, NodeCache(tmp_path / "cache", GB)), 8), straight)
    without = ShardSet.open(tmp_path / "set")
    assert same(packs_of(without, 2), straight[:8])


def test_remote_shards_need_a_cache_and_pipes_a_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tars(tmp_path / "theirs", FRAMES[:4], 2, as_npy)
    out = tmp_path / "set"
    adopted(f"pipe:cat {tmp_path}/theirs/set-{{000000..000001}}.tar", out, **BOTH)
    assert "pipe:cat" in inspect.describe(ShardSet.open(out))
    cache = NodeCache(tmp_path / "cache", GB)
    refused(lambda: ShardSet.open(out, cache).read(0, 0), "pipe:cat", "FAR_SCALE_PIPES=1")
    monkeypatch.setenv("FAR_SCALE_PIPES", "1")
    assert ShardSet.open(out, cache).read(0, 0).key == "clip_000"
    refused(lambda: ShardSet.open(out).read(0, 0), "is remote or compressed", "--cache-dir")
    before = (out / "manifest.json").read_bytes()
    refused(lambda: inspect.fix(out), "--cache-dir")  # and not: no shard is whole
    assert (out / "manifest.json").read_bytes() == before


@pytest.mark.usefixtures("hasty")
def test_training_on_remote_shards_of_others_and_resume_on_fewer_ranks(recorded_shards: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    own = ShardSet.open(recorded_shards)
    for shard, count in enumerate(own.samples_per_shard):
        with webdataset.TarWriter(str(theirs / f"{shard}.tar")) as out:
            for sample in (own.read(shard, number) for number in range(count)):
                assert sample.actions is not None
                acts = {"actions": sample.actions.tolist(), "fps": sample.fps}
                out.write({"__key__": sample.key, "safetensors": save({"z": sample.latents}), "json": acts})
    whole, parts = tmp_path / "whole/run", tmp_path / "parts/run"
    for run in (whole, parts):
        run.parent.mkdir()
    few = ["optimizer.schedule=constant", "optimizer.warmup_steps=2", "train.steps=4"]
    with served(theirs) as server:
        adopted(f"{server.url}/{{0..3}}.tar", tmp_path / "set", autoencoder="compact-vizdoom-f8c32", actions=4)
        server.asked.clear()
        local = small_recipe(recorded_shards, whole, *few)
        assert start_training(1, local, whole.parent / "out").wait() == [0]
        remote = small_recipe(tmp_path / "set", parts, *few)
        assert start_training(1, remote, tmp_path / "refused").wait() == [REFUSED]
        remote += [f"data.cache_dir={tmp_path / 'cache'}"]
        assert start_training(2, [*remote, "train.steps=2"], parts.parent / "out").wait() == [0, 0]
        assert start_training(1, remote, parts.parent / "out").wait() == [0]
        assert set(server.asked.values()) == {1}
    assert "come through a cache; set data.cache_dir" in (tmp_path / "refused").read_text()
    read = [sorted((run.parent / "out.keys").read_text().splitlines()) for run in (whole, parts)]
    assert read[0] == read[1] and len(read[0]) == 4 * LANES
    losses = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, parts)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)  # float32, summed up by other ranks


# Hostile manifests and tars.


def test_a_manifest_has_only_own_or_only_adopted_shards(tmp_path: Path) -> None:
    write_tars(tmp_path / "theirs", FRAMES[:4], 2, as_npy)
    adopted(tmp_path / "theirs", tmp_path / "set", **BOTH)
    path = tmp_path / "set" / "manifest.json"
    text = path.read_text()
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m.pop("adopted"),
        lambda m: m["shards"][0].pop("source"),
        lambda m: m["shards"][0].update(source="s3://bucket/x.tar"),
        lambda m: m["shards"][0].update(source="../x.tar"),
        lambda m: m["shards"][0].update(source="/x}.tar"),
        lambda m: m["adopted"].update(layout="HWFC"),
        lambda m: m["adopted"].update(scale_factor=0),
    ]
    for change in changes:
        values = json.loads(text)
        change(values)
        path.write_text(json.dumps(values))
        refused(lambda: ShardSet.open(tmp_path / "set"), str(path), "not a valid manifest")


@pytest.fixture
def tar(tmp_path: Path) -> Iterator[Path]:
    """A foreign tar with every kind of member, under `watched`."""
    tensor = torch.from_numpy(latents(3).astype(np.float16))
    members = {"a.npy": npy(tensor.numpy()), "a.json": json_bytes(fps=5, label=1, actions=[0, 1, 1])}
    long = {f"{'folder/' * 15}b{suffix[1:]}": data for suffix, data in members.items()}
    path = tar_of(tmp_path / "theirs.tar", {**members, **long}, format=tarfile.PAX_FORMAT)
    adopted(path, tmp_path / "set", actions=2, labels=2)
    read_all(tmp_path / "set")
    with watched(tmp_path):
        yield path


def test_damaged_foreign_tars(tar: Path, tmp_path: Path) -> None:
    rng, whole = random.Random(4), tar.read_bytes()
    reader = SampleReader.of(Manifest.read(tmp_path / "set"))
    read = refusals = rejected = 0
    for _ in range(400):
        tar.write_bytes(damage(whole, rng))
        found = attempt(lambda: reader.scan(tar, str(tar), "shard-000000.tar"), tar)
        refusals += found is None
        if found is not None:
            rejected += bool(found.rejects)
            assert all(len(reason.splitlines()) == 1 and len(reason) < 400 for _, reason in found.rejects)
        seen = attempt(lambda: read_all(tmp_path / "set"), tar)
        assert seen is None or all(sample.latents.shape == (3, 4, 3, 2) for sample in seen)
        read += seen is not None
    assert read > 100 and refusals > 100 and rejected > 10


def test_the_command_line(tmp_path: Path) -> None:
    """By two processes, with the autoencoder that ships."""
    for number in range(3):
        made = make_sample(number, 6).latents.repeat(1, 8, 4, 4)
        tar_of(tmp_path / f"{number}.tar", {"a.latent.pt": torch_file(made), "a.cls": b"%d" % number})
    (tmp_path / "names").write_text("x\ny\nz\n")
    options = ["--out", tmp_path / "set", "--autoencoder", "compact-vizdoom-f8c32", "--fps", 5, "--jobs", 2]
    tool = Path(__file__).parents[2] / "tools" / "adopt_shards.py"
    ended = processes.run(tool, tmp_path / "{0..2}.tar", *options, "--classes", tmp_path / "names")
    assert ended.returncode == 0 and "3 shards, 3 samples, 18 frames" in ended.stdout, ended.stderr
    text = inspect.describe(ShardSet.open(tmp_path / "set"))
    assert "3 labels: 'x', 'y', 'z'" in text and "latent.pt as FCHW" in text and "at 5 frames/s" in text
