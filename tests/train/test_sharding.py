"""Four ranks as two nodes of two: every way to share out a model trains alike, and resumes in every other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.writer import ShardWriter
from far_scale.train.deepspeed_adapter import can_reduce_once
from harness.latent_sets import FACTS, read_all
from harness.launch import ROOT
from harness.plain_training import train_plainly
from harness.processes import started

pytestmark = pytest.mark.slow

LAYOUTS = {
    "zero1": "train.zero_stage=1",
    "zero3": "train.zero_stage=3 train.deepspeed.zero_hpz_partition_size=1",
    "hpz": "train.zero_stage=3",
}
# Four packs a rank and step.
PACKS = {
    "packs_each": "train.zero_stage=3 train.reduce_once=false",
    "packs_auto": "train.zero_stage=3",
}
if can_reduce_once():
    PACKS["packs_once2"] = "train.zero_stage=2 train.reduce_once=true"
    PACKS["packs_once_bf16"] = "train.zero_stage=3 train.reduce_once=true train.precision=bf16"
RESUMED = ["zero1-zero3", "zero3-hpz", "hpz-zero1"]


def write_twice(shards: Path, out: Path) -> Path:
    """Every sample of `shards` two times, so that there is one for each of 16 lanes."""
    manifest = Manifest.read(shards)
    facts = dataclasses.replace(
        FACTS, latent_shape=manifest.latent_shape, autoencoder=manifest.autoencoder, actions=4, labels=0
    )
    with ShardWriter(out, facts, 4) as writer:
        for turn in range(2):
            for sample in read_all(shards):
                writer.write(dataclasses.replace(sample, key=f"{sample.key}-{turn}"))
    return out


@pytest.fixture(scope="module")
def runs(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout for 10 steps, and again from another one's checkpoint of step 5."""
    out = tmp_path_factory.mktemp("sharding")
    more = f"data.lanes=16 train.steps=4 data.shards={write_twice(recorded_shards, out / 'shards')}"
    packs = {name: f"{overrides} {more}" for name, overrides in PACKS.items()}
    validated = f"validation.every=10 validation.clips=4 validation.shards={recorded_shards}"
    asked = {**{name: f"{overrides} {validated}" for name, overrides in LAYOUTS.items()}, **packs}
    layouts = ",".join(f"{name} {overrides}" for name, overrides in asked.items())
    worker = ROOT / "tests/harness/sharding_worker.py"
    with started(4, out / "output", worker, recorded_shards, out, layouts, ranks_a_node=2) as ranks:
        ends = [rank.end(400) for rank in ranks]
    assert [status for status, _ in ends] == [0] * 4, "\n".join(output[-2000:] for _, output in ends)
    return out


@pytest.fixture(scope="module")
def plain(recorded_shards: Path) -> torch.Tensor:
    return torch.tensor(train_plainly(recorded_shards)[0], dtype=torch.float64)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def logged(run: Path, key: str = "loss") -> torch.Tensor:
    return torch.tensor([line[key] for line in lines(run) if "validation" not in line], dtype=torch.float64)


@pytest.mark.parametrize("name", [*LAYOUTS, *RESUMED])
def test_every_layout_trains_as_plain_pytorch(runs: Path, plain: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(logged(runs / name), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["zero3", "hpz", *RESUMED])
def test_every_layout_validates_with_the_ema(runs: Path, name: str) -> None:
    """Not with what hpZ keeps of the weights that were there before."""
    (expected,) = (line["validation"] for line in lines(runs / "zero1") if "validation" in line)
    (found,) = (line["validation"] for line in lines(runs / name) if "validation" in line)
    assert abs(expected["ema"]["loss"] / expected["weights"]["loss"] - 1) > 1e-4
    for weights in ("weights", "ema"):
        assert found[weights]["loss"] == pytest.approx(expected[weights]["loss"], rel=1e-6)


@pytest.mark.skipif(not can_reduce_once(), reason="this DeepSpeed reduces each pack")
def test_four_packs_are_reduced_once_where_there_are_several_nodes(runs: Path) -> None:
    counts = {name: json.loads((runs / f"{name}.json").read_text()) for name in PACKS}
    assert counts == {
        "packs_each": [4] * 4, "packs_auto": [1] * 4, "packs_once2": [1] * 4, "packs_once_bf16": [1] * 4,
    }  # fmt: skip


def test_reducing_once_trains_alike(runs: Path) -> None:
    for name in PACKS:
        tolerance = 5e-3 if name.endswith("bf16") else 1e-6
        for key in ("loss", "grad_norm"):
            expected = logged(runs / "packs_each", key)
            torch.testing.assert_close(logged(runs / name, key), expected, rtol=tolerance, atol=0)


def test_the_log_says_how_the_model_is_shared_out(runs: Path) -> None:
    said = (runs / "output" / "rank-0.out").read_text()
    assert "sharding: ZeRO-3, hpZ 2: 2 nodes of 2 ranks, " in said
    assert "sharding: ZeRO-1\n" in said and "sharding: ZeRO-3, hpZ 1: as the recipe sets\n" in said
