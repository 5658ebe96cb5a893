"""Sequence parallelism: ranks that share packs compute, train and resume as one rank that has them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.latent_sets import write_set
from harness.launch import ROOT
from harness.plain_training import train_plainly
from harness.processes import started

pytestmark = pytest.mark.slow

COMMON = (
    "data.autoencoder=some-autoencoder data.latent_shape=[4,2,2] data.scaling=factor model.patch=1 model.channels=4 "
    "model.heads=3 model.window=3 model.context_patch=2 data.frames=[2,7] sample.given=1 optimizer.warmup_steps=0 "
    "optimizer.clip_norm=0.1 checkpoint.keep=9"
)
LONG_RUN = f"{COMMON} train.zero_stage=3 train.steps=12 data.lanes=2 checkpoint.every=4"
SHORT_RUN = f"{COMMON} train.steps=4"
# Two stages, packs of a budget of tokens, and validation.
STAGES = (
    f"{COMMON} train.zero_stage=2 train.steps=null checkpoint.every=3 data.clips_per_pack=null data.tokens_per_pack=28 "
    'curriculum=[{"steps":2,"frames":4},{"steps":4,"window":2,"tokens_per_pack":40}] '
    "validation.every=3 validation.clips=4"
)
RUNS = {
    "shared": f"{LONG_RUN} train.sequence_parallel=2",
    "alone<shared@4": LONG_RUN,
    "again<alone@8": f"{LONG_RUN} train.sequence_parallel=2 train.activation_checkpointing=attention-kept",
    "zero0": f"{SHORT_RUN} train.zero_stage=0 train.sequence_parallel=2",
    "zero1-bf16": f"{SHORT_RUN} train.zero_stage=1 train.precision=bf16 train.sequence_parallel=2",
    "stages-alone": STAGES,
    "stages-shared": f"{STAGES} train.sequence_parallel=2",
    "dry": f"{SHORT_RUN} train.zero_stage=3 train.sequence_parallel=2",
}


def start(ranks: int, out: Path, cases: str, runs: dict[str, str]) -> Path:
    write_set(out / "shards", [9, 7, 8, 12, 7, 10, 8, 9], 2)
    specs = " ; ".join(
        f"{name} {overrides}{f' validation.shards={out}/shards' if 'validation' in overrides else ''}"
        for name, overrides in runs.items()
    )
    worker = ROOT / "tests/harness/sequence_worker.py"
    with started(ranks, out / "output", worker, out / "shards", out, cases, specs, ranks_a_node=2) as processes:
        ends = [process.end(400) for process in processes]
    assert [status for status, _ in ends] == [0] * ranks, "\n".join(output[-3000:] for _, output in ends)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(2, tmp_path_factory.mktemp("sequence"), "two", RUNS)


@pytest.fixture(scope="module")
def checks(two: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((two / "checks.json").read_text())
    return values


def logged(run: Path, key: str) -> torch.Tensor:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return torch.tensor([line[key] for line in lines if "validation" not in line], dtype=torch.float64)


def keys(out: Path, name: str, ranks: int) -> set[str]:
    """The steps, lanes and keys that a run trained on; every rank of a group has the same."""
    return {line for rank in range(ranks) for line in (out / f"{name}.keys-{rank}").read_text().splitlines()}


def test_outputs_and_gradients_are_those_of_one_rank(checks: dict[str, Any]) -> None:
    errors = {
        name: value for name, value in checks.items() if isinstance(value, list) and name not in ("flops", "elements")
    }
    assert len(errors) == 10
    assert {name: value for name, value in errors.items() if max(value) > 1e-12} == {}


def test_a_rank_keeps_its_share_for_the_backward(checks: dict[str, Any]) -> None:
    assert set(checks["saved"]) == {"none", "attention-kept", "full"}
    assert max(checks["saved"].values()) <= 0.6, checks["saved"]
    assert checks["saved"] == pytest.approx(checks["predicted"], rel=0.02)


def test_only_full_checkpointing_repeats_an_exchange(checks: dict[str, Any]) -> None:
    assert checks["exchanges"] == {"none": 3 * 4, "attention-kept": 3 * 4, "full": 3 * 6}


def test_keys_and_values_of_the_context_are_sent_once(checks: dict[str, Any]) -> None:
    """As `exchanges` has it: each of q, k, v, the output, its log-sum-exp and the gradients, for each token once."""
    found, expected = checks["elements"]
    assert found == expected


def test_ranks_that_have_read_different_clips_stop(checks: dict[str, Any]) -> None:
    assert checks["refuses"] is True


def test_the_ranks_together_do_the_work_of_one(checks: dict[str, Any]) -> None:
    alone, together = checks["flops"]
    assert alone == together


def test_zero_3_trains_as_one_rank(two: Path) -> None:
    """For 12 steps, in the loss and in the norm of the gradient before it is clipped: Adam would hide its scale."""
    plain = train_plainly(two / "shards", *LONG_RUN.split())
    for run in ("shared", "alone", "again"):
        for key, expected in (("loss", plain.losses), ("grad_norm", plain.norms)):
            torch.testing.assert_close(logged(two / run, key), torch.tensor(expected).double(), rtol=1e-5, atol=0)


def test_a_run_goes_on_with_other_groups(two: Path) -> None:
    """The same samples at the same steps, shared or not."""
    of_shared, of_alone, of_again = (keys(two, name, 2) for name in ("shared", "alone", "again"))
    assert len(of_shared) == 12 * 2
    assert of_alone == {line for line in of_shared if json.loads(line)[0] >= 4}
    assert of_again == {line for line in of_shared if json.loads(line)[0] >= 8}
    for rank in (1, 0):  # every rank of a group has all its packs
        assert len((two / f"shared.keys-{rank}").read_text().splitlines()) == 12 * 2


def test_other_stages_of_zero(two: Path) -> None:
    plain = train_plainly(two / "shards", *SHORT_RUN.split())
    for run, tolerance in (("zero0", 1e-5), ("zero1-bf16", 2e-2)):
        for key, expected in (("loss", plain.losses), ("grad_norm", plain.norms)):
            torch.testing.assert_close(logged(two / run, key), torch.tensor(expected).double(), rtol=tolerance, atol=0)


def test_curricula_token_budgets_and_validation(two: Path) -> None:
    for key in ("loss", "grad_norm"):
        alone, shared = (logged(two / f"stages-{how}", key) for how in ("alone", "shared"))
        assert len(alone) == 6
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=0)
    validations = [
        [json.loads(line)["validation"] for line in (two / f"stages-{how}" / "log.jsonl").read_text().splitlines()
         if "validation" in line]
        for how in ("alone", "shared")
    ]  # fmt: skip
    assert len(validations[0]) == len(validations[1]) == 2
    for alone, shared in zip(*validations, strict=True):
        for weights in ("weights", "ema"):
            assert shared[weights]["loss"] == pytest.approx(alone[weights]["loss"], rel=1e-5)


def test_no_pack_is_counted_twice(two: Path) -> None:
    """Clips and tokens a step, by the log's rates and times."""
    for rate in ("clips_per_second", "tokens_per_second"):
        alone, shared = (
            logged(two / f"stages-{how}", rate) * logged(two / f"stages-{how}", "seconds_per_step")
            for how in ("alone", "shared")
        )
        # Rank 0 speaks for all: without groups it has half of the packs, which differ.
        assert (shared / alone).mean() == pytest.approx(1, rel=0.25)


def test_the_log_and_a_dry_run_show_the_groups(two: Path) -> None:
    said = (two / "output" / "rank-0.out").read_text()
    groups = "sequence parallelism: 1 groups of 2 ranks (ranks 0-1), each shares a pack: its frames, and 2+1 heads"
    training, dry_run = said.split("recipe      ")
    assert groups in training and groups in dry_run
    assert "forward: all-to-all" in dry_run and "backward: all-to-all" in dry_run
    assert "ranks       2 x 4 packs a step" in dry_run and "passed" in dry_run


def test_four_ranks(tmp_path: Path) -> None:
    """Two groups on two nodes in training; before, all four in one group, whose ranks have 1 or 2 of 5 heads."""
    run = f"{SHORT_RUN} train.zero_stage=3 train.sequence_parallel=2"
    out = start(4, tmp_path, "four", {"groups": run})
    checks = json.loads((out / "checks.json").read_text())
    errors = {name: checks[name] for name in ("5 heads", "18 heads", "two frames", "Video DiT")}
    assert max(map(max, errors.values())) <= 1e-12, errors
    assert max(checks["saved"].values()) <= 0.4, checks["saved"]
    plain = train_plainly(out / "shards", *SHORT_RUN.split())
    for key, expected in (("loss", plain.losses), ("grad_norm", plain.norms)):
        torch.testing.assert_close(logged(out / "groups", key), torch.tensor(expected).double(), rtol=1e-5, atol=0)
    lanes = [
        {json.loads(line)[1] for line in (out / f"groups.keys-{rank}").read_text().splitlines()} for rank in range(4)
    ]
    assert lanes == [{0, 2}, {0, 2}, {1, 3}, {1, 3}]
