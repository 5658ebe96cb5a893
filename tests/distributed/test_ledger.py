"""The ledger of collectives: what a step sends, as recorded on four ranks of two nodes and as worked out before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.distributed.collective_costs import ModelShapes, ParallelSetup, step_collectives
from far_scale.distributed.ledger import Entry, Key, sent_bytes
from far_scale.model import FAR, FARConfig
from far_scale.train.collectives import collective_setup, expected_collectives
from far_scale.train.deepspeed_adapter import LAST_TESTED, can_reduce_once, installed_version
from far_scale.train.sharding import Sharding
from far_scale.utils.event_log import read_events
from harness.latent_sets import write_set
from harness.launch import ROOT, small_recipe
from harness.processes import started

pytestmark = pytest.mark.slow

FOUR_PACKS = "data.lanes=16 train.reduce_once=false"
ONCE = "data.lanes=16 train.reduce_once=true"
WITHOUT_HPZ = "train.zero_stage=3 train.deepspeed.zero_hpz_partition_size=1"
# No weights ahead and none kept for backward: what DeepSpeed does with models of more than 1e9 parameters.
AGAIN = "train.deepspeed.stage3_prefetch_bucket_size=0 train.deepspeed.stage3_max_reuse_distance=0"
RUNS = {
    "zero0": "train.zero_stage=0 data.lanes=16",
    "zero1": "train.zero_stage=1",
    "zero1-bf16": f"train.zero_stage=1 train.precision=bf16 {FOUR_PACKS}",
    "zero2": f"train.zero_stage=2 {FOUR_PACKS} train.deepspeed.reduce_bucket_size=200_000",
    "zero2-once": f"train.zero_stage=2 {ONCE} train.deepspeed.overlap_comm=true",
    "zero3": f"{WITHOUT_HPZ} {FOUR_PACKS} train.whole_below=1000",
    "zero3-once": f"{WITHOUT_HPZ} {ONCE} train.whole_below=1000",
    "zero3-again": f"{WITHOUT_HPZ} {AGAIN} train.activation_checkpointing=full data.clips_per_pack=null "
    "data.tokens_per_pack=64",
    "zero3-between": f"{WITHOUT_HPZ} model.layers=5 train.deepspeed.stage3_prefetch_bucket_size=100_000 "
    "train.deepspeed.stage3_max_reuse_distance=500_000 train.deepspeed.stage3_max_live_parameters=900_000 "
    "train.deepspeed.reduce_bucket_size=200_000",
    "hpz": f"train.zero_stage=3 {AGAIN}",
    "hpz-bf16": f"train.zero_stage=3 {ONCE} train.precision=bf16 train.whole_below=1000",
    "offload": f"{WITHOUT_HPZ} train.deepspeed.offload_optimizer.device=cpu",
    "shared": f"{WITHOUT_HPZ} train.sequence_parallel=2 train.reduce_once=false train.precision=bf16 model.window=2 "
    "model.context_patch=2 train.activation_checkpointing=full",
    "long": f"train.zero_stage=3 {AGAIN} model.window=2 model.context_patch=2 train.deepspeed.sub_group_size=100_000",
}  # fmt: skip
if not can_reduce_once():
    RUNS = {name: overrides for name, overrides in RUNS.items() if ONCE not in overrides}
COMMON = (
    "train.steps=3 optimizer.warmup_steps=0 checkpoint.every=3 log.every=3 data.frames=4 data.clips_per_pack=1 "
    "sample.given=2 data.autoencoder=some-autoencoder data.latent_shape=[4,2,2] data.scaling=factor model.heads=2 "
    "model.patch=1 model.channels=4"
)


def recipe_of(overrides: str) -> Recipe:
    spec, *others = small_recipe(Path("shards"), Path("run"), *COMMON.split(), *overrides.split())
    return load_recipe(spec, others)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ledger")
    write_set(out / "shards", [4] * 16, 8)
    all_runs = ";".join(f"{name} {COMMON} {overrides}" for name, overrides in RUNS.items())
    with started(
        4, out / "output", ROOT / "tests/harness/ledger_worker.py", out / "shards", out, all_runs, ranks_a_node=2
    ) as ranks:
        ends = [rank.end(300) for rank in ranks]
    assert [status for status, _ in ends] == [0] * 4, "\n".join(output[-2000:] for _, output in ends)
    return out


def recorded(run: Path) -> dict[str, Any]:
    """The run's one event of collectives."""
    (event,) = [event for event in read_events(run) if event["event"] == "collectives"]
    return event


@pytest.mark.parametrize("name", RUNS)
def test_a_step_sends_what_was_predicted(runs: Path, name: str) -> None:
    recipe = recipe_of(RUNS[name])
    assert recipe.train.zero_stage != "auto"
    hpz = recipe.train.zero_stage == 3 and WITHOUT_HPZ not in RUNS[name]
    sharding = Sharding(recipe.train.zero_stage, 2 if hpz else 1, reduce_once=ONCE in RUNS[name])
    with torch.device("meta"):
        shapes = ModelShapes.from_model(FAR(recipe.far_config()))
    expected = step_collectives(shapes, collective_setup(recipe, sharding, 4, 2))
    event = recorded(runs / name)
    assert event["step"] == 3
    found = [
        Entry(Key(row["phase"], row["operation"], row["ranks"], row["nodes"]), row["calls"], row["message_bytes"])
        for row in event["collectives"]
    ]
    if installed_version() >= LAST_TESTED:
        assert sorted(found, key=repr) == sorted(expected, key=repr)
    # PrefixKV versions keep the embedding of timesteps, whose input has no gradient, from one pack to the next.
    assert {entry.key: entry.calls for entry in found} == {entry.key: entry.calls for entry in expected}
    assert event["between"] == pytest.approx(sum(entry.between for entry in expected), rel=0.02)
    assert event["within"] == pytest.approx(sum(entry.within for entry in expected), rel=0.02)


def of_backward(event: dict[str, Any], operation: str) -> list[dict[str, Any]]:
    return [row for row in event["collectives"] if row["phase"] == "backward" and row["operation"] == operation]


def test_with_hpz_no_gather_of_backward_crosses_nodes(runs: Path) -> None:
    (with_hpz,), (without,) = (of_backward(recorded(runs / name), "all-gather") for name in ("hpz", "zero3-again"))
    assert with_hpz["between"] == 0.0 and without["between"] > 0
    assert with_hpz["message_bytes"] == without["message_bytes"] == with_hpz["within"] * 2


@pytest.mark.skipif(not can_reduce_once(), reason="this DeepSpeed reduces after each pack")
def test_four_packs_are_reduced_once(runs: Path) -> None:
    (once,), (four_times,) = (of_backward(recorded(runs / name), "reduce-scatter") for name in ("zero3-once", "zero3"))
    assert (once["calls"], four_times["calls"]) == (1, 4)
    assert four_times["message_bytes"] == 4 * once["message_bytes"]


def test_the_log_has_a_table(runs: Path) -> None:
    said = (runs / "output" / "rank-0.out").read_text()
    assert said.count("collectives of a rank") == len(RUNS)
    assert "collectives of a rank" not in (runs / "output" / "rank-1.out").read_text()
    assert "step 3: 5 collectives, a rank sends 3.1 MB in its node and 3.1 MB to other nodes" in said


def test_a_ring_sends_all_but_its_own_part() -> None:
    # Four ranks on two nodes gather 4 x 25 bytes: in each of 3 rounds each passes 25 bytes to the next, and the second
    # rank of each node to the other node.
    gather = Entry(Key("forward", "all-gather", 4, 2), 1, 100)
    assert (gather.sent, gather.between, gather.within) == (75, 37.5, 37.5)
    assert sent_bytes("all-reduce", 4, 100) == 150 and sent_bytes("broadcast", 1, 100) == 0
    assert Entry(Key("forward", "all-gather", 2, 1), 1, 100).between == 0
    # Of an all-to-all, half of the message goes to the two ranks of the other node.
    exchange = Entry(Key("forward", "all-to-all", 4, 2), 1, 100)
    assert (exchange.within, exchange.between) == (25, 50)


def sent(config: FARConfig, **given: Any) -> Callable[[str], float]:
    """A function of the phase: megabytes to other nodes from a rank of 8 nodes of 8, ZeRO-3 in bf16."""
    with torch.device("meta"):
        shapes = ModelShapes.from_model(FAR(config))
    values = {"ranks": 64, "nodes": 8, "stage": 3, "number_bytes": 2, "gradient_bytes": 2, **given}
    entries = step_collectives(shapes, ParallelSetup(**values))
    return lambda phase: sum(entry.between for entry in entries if entry.key.phase == phase) / 1e6


def test_models_of_up_to_a_billion_parameters_gather_nothing_in_backward() -> None:
    xl, three_billion = FARConfig(28, 18), FARConfig(40, 32)
    assert sent(xl)("backward") == sent(xl, hpz=8)("backward")  # the gradients alone
    gradients = 2 * 3.034e3 * 63 / 64 / 8
    assert sent(three_billion, hpz=8)("backward") == pytest.approx(gradients, rel=0.001)
    assert sent(three_billion)("backward") > 1.5 * gradients


def test_a_dry_run_shows_the_table_of_its_ranks() -> None:
    recipe = recipe_of(RUNS["hpz"])
    assert expected_collectives(recipe, Sharding(3), 1, 1) == []
    lines = expected_collectives(recipe, Sharding(3, 2), 4, 2)
    assert lines[0].startswith("collectives of a rank") and lines[-1].startswith("sum")
    assert lines[1].split() == ["forward:", "all-gather", "4", "2", "10", "2.7", "1.0", "1.0"]
    quantised = recipe_of("train.zero_stage=3 train.deepspeed.zero_quantized_weights=true")
    (line,) = expected_collectives(quantised, Sharding(3), 4, 2)
    assert line == "collectives: unknown for train.deepspeed.zero_quantized_weights=True"
