"""What the drills share: the recipe, the undisturbed run that all are compared with, and what a run leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece
from far_scale.utils.event_log import read_events
from harness.processes import Ranks

STEPS = 40
DRILL = [
    f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=2", "train.zero_stage=3", "model.layers=1",
    "model.heads=1",
]  # fmt: skip
RARE = ["checkpoint.every=1000"]  # none but the last and those that a stop asks for


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step stands there once"
    return [line["loss"] for line in lines]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: weights, both moments, EMA."""
    folder = checkpoint.step_folder(run, STEPS)
    stored = checkpoint.read_metadata(folder).state_dict_metadata
    pieces = {name: FlatPiece(m.size.numel(), 0, torch.empty(m.size)) for name, m in stored.items()}
    checkpoint.load(folder, pieces, single_process=True)
    return {name: piece.data for name, piece in pieces.items()}


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Losses, weights, moments and EMA are those of the undisturbed run, bit for bit."""
    assert losses(run) == losses(undisturbed)
    ours, theirs = tensors(run), tensors(undisturbed)
    assert ours.keys() == theirs.keys() and len({name.split("/")[0] for name in ours}) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours_state, theirs_state = (checkpoint.read_state(checkpoint.step_folder(r, STEPS)) for r in (run, undisturbed))
    assert ours_state["lanes"] == theirs_state["lanes"] and ours_state["guard"] == theirs_state["guard"]


def trained_on(out: Path) -> dict[tuple[int, int], list[str]]:
    """Sample keys by step and lane, from the record of a run's ranks."""
    found: dict[tuple[int, int], list[str]] = {}
    for step, lane, keys in map(json.loads, Path(f"{out}.keys").read_text().splitlines()):
        assert found.setdefault((step, lane), keys) == keys, "trained on again after a resume, it is the same"
    return found


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] == kind]


def saved_step(run: Path) -> int:
    return checkpoint.latest_step(run) or 0


def kill_after_checkpoint(launch: Ranks, run: Path, step: int) -> None:
    """-9 for all ranks as soon as a checkpoint of `step` or later is there."""
    assert wait_until(lambda: saved_step(run) >= step)
    launch.kill()
    launch.wait()


def wait_until(happened: Callable[[], bool], timeout: float = 120) -> bool:
    """Whether it happened in time."""
    end = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
