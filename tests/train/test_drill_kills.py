"""Killed again and again, moved to other rank counts, forked: nothing changes the result."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from far_scale.train import checkpoint
from far_scale.train.checkpoint.folders import fork
from far_scale.utils.event_log import read_events
from harness.drill import (
    DRILL,
    RARE,
    STEPS,
    assert_same_run,
    events,
    kill_after_checkpoint,
    losses,
    saved_step,
    tensors,
    trained_on,
    wait_until,
)
from harness.launch import small_recipe
from harness.processes import start_training
from harness.refusal import refused

pytestmark = pytest.mark.slow


def test_twenty_kills_change_nothing(undisturbed: Path, recorded_shards: Path, tmp_path: Path) -> None:
    """-9 for any rank at random moments: in start-up, in a step and, every other time, in the middle of a save."""
    run, chance = tmp_path / "run", random.Random(0)
    arguments = small_recipe(recorded_shards, run, *DRILL, "checkpoint.every=2")
    while_saving = 0
    for kill in range(20):
        launch = start_training(2, arguments, tmp_path / "out")
        if kill % 4 == 0:  # in start-up, or soon after
            time.sleep(chance.uniform(0, 2))
        elif kill % 2:
            assert wait_until(lambda: any((run / "checkpoints").glob("*.part")))
            time.sleep(chance.uniform(0, 0.1))
            while_saving += any((run / "checkpoints").glob("*.part"))
        else:
            before = len(events(run, "saved"))
            assert wait_until(lambda before=before: len(events(run, "saved")) > before)
            time.sleep(chance.uniform(0, 0.4))
        os.kill(chance.choice(launch.pids), signal.SIGKILL)
        assert -signal.SIGKILL in launch.wait(), (tmp_path / "out").read_text()[-3000:]
    assert while_saving > 0
    resumed_from = checkpoint.latest_step(run)
    assert start_training(2, arguments, tmp_path / "out").wait() == [0, 0]
    assert resumed_from, "the last kill came after a checkpoint, so this was a resume"
    assert_same_run(run, undisturbed)


def test_other_rank_counts_and_stages_train_on_the_same_batches(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    """2 ranks, 1, 2 again; ZeRO-3, 1, 2: with optimizer and EMA, through a checkpoint each."""
    run, out = tmp_path / "run", tmp_path / "out"
    for ranks, stage, until in ((2, 3, 10), (1, 1, 25)):
        arguments = small_recipe(recorded_shards, run, *DRILL, f"train.zero_stage={stage}")
        kill_after_checkpoint(start_training(ranks, arguments, out), run, until)
    arguments = small_recipe(recorded_shards, run, *DRILL, "train.zero_stage=2")
    assert start_training(2, arguments, out).wait() == [0, 0]
    assert trained_on(out) == trained_on(undisturbed.parent / "out")
    assert len(trained_on(out)) == 4 * STEPS
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(undisturbed)), rtol=1e-5, atol=0)
    ours, theirs = tensors(run), tensors(undisturbed)
    for name in (name for name in ours if name.startswith(("weight/", "ema/"))):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    changed = [line for event in events(run, "harmless-changes") for line in event["changes"]]
    assert changed == ["train.zero_stage 3 -> 1", "ranks 2 -> 1", "train.zero_stage 1 -> 2", "ranks 1 -> 2"]


def test_a_fork_goes_on_from_an_earlier_checkpoint_as_another_run(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "branch"
    assert fork(undisturbed, STEPS - 5, run) == STEPS - 5 and not list(tmp_path.glob(".*"))
    assert start_training(2, [str(run / "recipe.yaml")], tmp_path / "out").wait() == [0, 0]
    assert (run / "identity").read_text() != (undisturbed / "identity").read_text()
    assert next((event["event"], event["step"]) for event in read_events(run)) == ("forked", STEPS - 5)
    assert_same_run(run, undisturbed)
    refused(lambda: fork(undisturbed, None, run), str(run), "exists already")
    refused(lambda: fork(undisturbed, 7, tmp_path / "other"), "step-00000007", "there is no such checkpoint")
    refused(lambda: fork(tmp_path, None, tmp_path / "other"), "no checkpoint to fork")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branch", "out", "out.keys"]


def test_a_node_local_checkpoint_is_gone_on_from_where_it_is_newer(
    undisturbed: Path, recorded_shards: Path, tmp_path: Path
) -> None:
    run, out, node = tmp_path / "run", tmp_path / "out", tmp_path / "node"
    more = [*RARE, f"checkpoint.local_dir={node}", "checkpoint.local_every=3"]
    arguments = small_recipe(recorded_shards, run, *DRILL, *more)

    def local_step() -> int:
        """Of the newest file that both ranks have written."""
        steps = [{int(f.parent.name[5:]) for f in node.glob(f"*/*/rank-0000{r}-of-00002.json")} for r in (0, 1)]
        return max(steps[0] & steps[1], default=0)

    def killed_at_local(step: int) -> int:
        launch = start_training(2, arguments, out)
        assert wait_until(lambda: local_step() >= step)
        launch.kill()
        launch.wait()
        return local_step()

    first = killed_at_local(10)
    assert saved_step(run) == 0, "there is no other checkpoint"
    second = killed_at_local(25)
    resumed = [(event["step"], event["text"]) for event in events(run, "resumed")]
    assert resumed[0][0] == first and str(node) in resumed[0][1]
    # A file that is damaged counts as not there: the one before is taken on all ranks.
    newest = next(node.glob(f"*/step-{second:08d}/rank-00001-of-00002.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    older = max(step for step in (int(f.parent.name[5:]) for f in node.glob("*/*/rank-00001*.json")) if step < second)
    assert start_training(2, arguments, out).wait() == [0, 0]
    assert events(run, "resumed")[-1]["step"] == older
    assert_same_run(run, undisturbed)
    assert all(len(list(node.glob(f"*/*/rank-0000{rank}-*.safetensors"))) <= 2 for rank in (0, 1))
