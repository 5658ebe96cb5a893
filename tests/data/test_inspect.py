"""A shard set with broken shards: each is reported, and --fix leaves a set of the intact ones."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from far_scale.data.shards import inspect
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.errors import UserError
from far_scale.utils.io import sha256
from harness import processes
from harness.latent_sets import make_sample, write_set

ROOT = Path(__file__).parents[2]
FRAMES = [5, 6, 7, 8, 9, 10, 11]  # one sample a shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", FRAMES, samples_per_shard=1)
    return tmp_path / "set"


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return processes.run(ROOT / "tools" / "inspect_shards.py", *arguments)


def break_five(folder: Path) -> None:
    """Shard 0 has a flipped bit in a latent, 1 is cut off, 2 is missing, 3 lacks its index, 5 has another index."""
    tar = folder / "shard-000000.tar"
    row, data = ShardSet.open(folder).index(0).samples[0], bytearray(tar.read_bytes())
    data[row.tensors_offset + row.tensors_bytes - 1] ^= 1
    tar.write_bytes(data)
    os.truncate(folder / "shard-000001.tar", 4096)
    (folder / "shard-000002.tar").unlink()
    (folder / "shard-000003.index.json").unlink()
    index = folder / "shard-000005.index.json"
    index.write_text(index.read_text().replace('"fps":8.0', '"fps":9.0'))


def test_fix_drops_broken_shards_only(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    break_five(folder)
    files = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    done = tool(folder, "--fix", "--verify")
    assert done.returncode == 0, done.stderr
    dropped = [line for line in done.stdout.splitlines() if line.startswith("dropped:")]
    words = ["SHA-256", "truncated", "missing", "index is missing", "SHA-256"]
    for line, number, word in zip(dropped, [0, 1, 2, 3, 5], words, strict=True):
        assert f"shard-{number:06d}" in line and word in line
    assert "2 samples in 2 shards; 5 samples are dropped" in done.stdout and "verified" in done.stdout
    assert (folder / "manifest.json.before-fix").read_bytes() == before
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == files

    shard_set, whole = ShardSet.open(folder), [make_sample(4, 9), make_sample(6, 11)]
    for shard, made in enumerate(whole):
        assert torch.equal(shard_set.read(shard, 0).latents, made.latents)
    everything = torch.cat([made.latents for made in whole]).double()
    np.testing.assert_allclose(shard_set.manifest.mean, everything.mean(dim=(0, 2, 3)).numpy(), rtol=1e-12)
    np.testing.assert_allclose(shard_set.manifest.std, everything.std(dim=(0, 2, 3), correction=0).numpy(), rtol=1e-9)
    assert not list(folder.glob(".*"))


def test_verify_counts_broken_shards(folder: Path) -> None:
    opened = ShardSet.open(folder)
    break_five(folder)
    with pytest.raises(UserError, match=r"shard-000000.tar: its SHA-256 .*5 shards are broken: .* --fix` drops them"):
        inspect.verify(opened)


def test_nothing_to_fix(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "nothing to fix: all 7 shards" in inspect.fix(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_an_intact_shard_nothing_changes(folder: Path) -> None:
    for tar in folder.glob("*.tar"):
        tar.unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = tool(folder, "--fix")
    assert done.returncode == 2 and "none of its 7 shards is intact, nothing is changed" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_second_fix_keeps_the_first_manifest(folder: Path) -> None:
    first = (folder / "manifest.json").read_bytes()
    (folder / "shard-000006.tar").unlink()
    inspect.fix(folder)
    second = (folder / "manifest.json").read_bytes()
    (folder / "shard-000000.tar").unlink()
    assert "5 samples in 5 shards; 1 samples are dropped" in inspect.fix(folder)
    assert (folder / "manifest.json.before-fix").read_bytes() == first
    assert (folder / "manifest.json.before-fix-2").read_bytes() == second


def test_wrong_statistics_are_reported_and_fixed(folder: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.model_copy(update={"std": tuple(2 * std for std in manifest.std)}).write(folder)
    with pytest.raises(UserError, match="mean and std"):
        inspect.verify(ShardSet.open(folder))
    assert "7 samples in 7 shards; 0 samples are dropped" in inspect.fix(folder)
    np.testing.assert_allclose(Manifest.read(folder).std, manifest.std, rtol=1e-12)


def test_sums_that_do_not_match_the_latents(folder: Path) -> None:
    path = folder / "shard-000002.index.json"
    values, manifest = json.loads(path.read_text()), json.loads((folder / "manifest.json").read_text())
    values["sums"]["total"][1] += 1
    path.write_text(json.dumps(values))
    manifest["shards"][2]["index_sha256"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "shard-000002.tar: the sums in its index" in inspect.fix(folder)
    inspect.verify(ShardSet.open(folder))
