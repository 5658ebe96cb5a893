"""Bitwise comparison of two finished trainings of the same recipe: losses, weights, moments, EMA, lanes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from measure import Row

from far_scale.train import checkpoint
from far_scale.train.checkpoint import FlatPiece

KINDS = {"weight": "weights", "exp_avg": "first moments", "exp_avg_sq": "second moments", "ema": "EMA"}
"""The contents of a checkpoint, by the prefix of tensor names."""


def logged(run: Path) -> list[dict[str, float]]:
    """The lines of a run's log without those of validation."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().split("\n") if line]
    return [line for line in lines if "validation" not in line]


def each_step_once(run: Path, steps: int) -> bool:
    """Whether the log has one line for every step from 1 to `steps`, in order."""
    return [line["step"] for line in logged(run)] == list(range(1, steps + 1))


def lanes(run: Path, steps: int) -> object:
    """The state of the lanes after the last step."""
    return checkpoint.read_state(checkpoint.step_folder(run, steps))["lanes"]


def loss_difference(run: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses."""
    ours, theirs = (torch.tensor([line["loss"] for line in logged(r)], dtype=torch.float64) for r in (run, other))
    return ((ours - theirs).abs() / theirs.abs()).max().item()


def compare(run: Path, other: Path, steps: int) -> list[Row]:
    """One row per thing that must be bitwise equal; `largest difference` is None where there is no number."""
    rows: list[Row] = []

    def add(what: str, equal: bool, difference: float | None) -> None:
        rows.append({"what": what, "equal": equal, "largest difference": difference})

    once = each_step_once(run, steps) and each_step_once(other, steps)
    add("every step once in log.jsonl", once, None)
    ours, theirs = ([line["loss"] for line in logged(r)] for r in (run, other))
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else None
    add("losses", ours == theirs, largest)
    for kind, name in KINDS.items():
        tensors, others = _tensors(run, steps, kind), _tensors(other, steps, kind)
        equal = (
            bool(tensors)
            and tensors.keys() == others.keys()
            and all(torch.equal(tensors[n], others[n]) for n in tensors)
        )
        add(
            name,
            equal,
            max((float((tensors[n] - others[n]).abs().max()) for n in tensors.keys() & others.keys()), default=0.0),
        )
    add("lanes", lanes(run, steps) == lanes(other, steps), None)
    return rows


def _tensors(run: Path, steps: int, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of one kind in the checkpoint after the last step."""
    folder = checkpoint.step_folder(run, steps)
    stored = checkpoint.read_metadata(folder).state_dict_metadata
    sizes = {name: entry.size.numel() for name, entry in stored.items() if name.split("/")[0] == kind}
    pieces = {name: FlatPiece(size, 0, torch.empty(size)) for name, size in sizes.items()}
    checkpoint.load(folder, pieces, single_process=True)
    return {name: piece.data for name, piece in pieces.items()}
