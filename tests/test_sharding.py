"""Four ranks as two nodes of two: every way to share out a model trains alike, and resumes in every other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import ROOT
from plain_training import train_plainly
from rank_processes import started

LAYOUTS = {
    "zero1": "train.zero_stage=1",
    "zero3": "train.zero_stage=3 train.deepspeed.zero_hpz_partition_size=1",
    "hpz": "train.zero_stage=3",
}
RESUMED = ["zero1-zero3", "zero3-hpz", "hpz-zero1"]


@pytest.fixture(scope="module")
def runs(recorded_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout for 20 steps, and again from another one's checkpoint of step 10."""
    out = tmp_path_factory.mktemp("sharding")
    layouts = ",".join(f"{name} {overrides}" for name, overrides in LAYOUTS.items())
    worker = ROOT / "tests/sharding_worker.py"
    with started(4, out / "output", worker, recorded_shards, out, layouts, ranks_a_node=2) as ranks:
        ends = [rank.end(400) for rank in ranks]
    assert [status for status, _ in ends] == [0] * 4, "\n".join(output[-2000:] for _, output in ends)
    return out


@pytest.fixture(scope="module")
def plain(recorded_shards: Path) -> torch.Tensor:
    return torch.tensor(train_plainly(recorded_shards)[0], dtype=torch.float64)


@pytest.mark.parametrize("name", [*LAYOUTS, *RESUMED])
def test_every_layout_trains_as_plain_pytorch(runs: Path, plain: torch.Tensor, name: str) -> None:
    lines = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
    losses = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)


def test_the_log_says_how_the_model_is_shared_out(runs: Path) -> None:
    said = (runs / "output" / "rank-0.out").read_text()
    assert "sharding: ZeRO-3, hpZ 2: 2 nodes of 2 ranks, " in said
    assert "sharding: ZeRO-1\n" in said and "sharding: ZeRO-3, hpZ 1: as the recipe sets\n" in said
