"""Time and peak memory of whole training steps: noise, forward, loss, backward, AdamW.

Theirs is the official trainer's `train_step` with torch's AdamW as their train.py makes it; ours is what the training
loop does to a pack, the feed that draws the noise one step ahead included, with the fused AdamW that it takes. On one
process DeepSpeed and Accelerate add nothing to either that could be sped up, so they are left away.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from measure import Row, attempt, interleaved, peak_beyond, timed
from official import OfficialCode
from pairs import SIDE, Clips, random_pair, randomize
from torch import Tensor, nn

from far_scale.config.schema import ObjectiveSection
from far_scale.model import FAR, FARConfig
from far_scale.model.layers import Checkpointing
from far_scale.model.layout import FrameLayout
from far_scale.train.costs import train_flops
from far_scale.train.device_prefetch import DevicePrefetch
from far_scale.train.flow_matching import pack_loss
from far_scale.train.metrics import compiled_graphs

LEARNING_RATE = 1e-4
OFFICIAL = "official"
GRAPHS = 64  # torch keeps 8 of one function, more than one model needs; here many modes of it take turns


@dataclass(frozen=True)
class Case:
    """A model and the frames of its clips, which all have the same number."""

    name: str
    config: FARConfig
    frames: int
    clips: int = 1

    @property
    def layout(self) -> FrameLayout:
        return self.config.layout((self.frames,) * self.clips, (SIDE, SIDE))


@dataclass(frozen=True)
class Mode:
    """How our model computes its blocks (`FAR.configure_execution`)."""

    compiled: bool = False
    checkpointing: Checkpointing = "none"
    kernel: str = "auto"

    @property
    def name(self) -> str:
        parts = ["compiled" if self.compiled else "eager"]
        if self.checkpointing != "none":
            parts.append(self.checkpointing)
        if self.kernel != "auto":
            parts.append(self.kernel)
        return ", ".join(parts)


class Step:
    """One side's model, optimizer and way to make a loss."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[], Tensor],
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.loss, self.device = model.train(), optimizer, loss, device
        self.compiled = compiled

    @staticmethod
    def official(code: OfficialCode, model: nn.Module, case: Case, device: torch.device) -> Step:
        trainer = code.trainer(model, case.config)
        clips = Clips.random(case.config, case.clips, case.frames, device)
        batch = {"latent": clips.latents} | (clips.official_conditions(case.config) or {})
        return Step(model, _adam(model, fused=False), lambda: trainer.train_step(dict(batch))["total_loss"], device)

    @staticmethod
    def ours(model: FAR, feed: DevicePrefetch, modes: Sequence[Mode], device: torch.device) -> dict[str, Step]:
        """A step in each of the modes, by the mode's name; they share the model, its optimizer and the feed."""
        optimizer = _adam(model, fused=True)

        def loss(mode: Mode) -> Tensor:
            model.configure_execution(mode.compiled, mode.checkpointing, mode.kernel)
            (noisy,) = next(feed).noisy
            return pack_loss(model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout), noisy)

        return {mode.name: Step(model, optimizer, lambda m=mode: loss(m), device, mode.compiled) for mode in modes}

    def gradients(self) -> None:
        self.loss().backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> None:
        self.gradients()
        self.update()

    def seconds(self) -> dict[str, float]:
        gradients, update = timed(self.gradients, self.device), timed(self.update, self.device)
        return {"step": gradients + update, "gradients": gradients, "update": update}


class WarmUp(NamedTuple):
    """Results of the warm-up steps.

    Attributes:
        first: seconds of the very first step, compiling included.
        peak: bytes at the peak of a step beyond what lies there between steps; None where that is not to be known.
    """

    first: float
    peak: int | None

    @staticmethod
    def of(step: Step) -> WarmUp:
        first = timed(step.run, step.device)
        return WarmUp(first, peak_beyond(step.run, step.device))


def measure_case(
    case: Case,
    modes: Sequence[Mode],
    code: OfficialCode | None,
    device: torch.device,
    dtype: torch.dtype,
    peak: float,
    repeats: int,
    minutes: float,
) -> list[Row]:
    """A row for each side: the official code, unless `code` is None, and ours in each of the modes, on the same first
    weights and clips, in turn.

    Args:
        peak: FLOP/s of the device at best.
    """
    torch._dynamo.reset()  # graphs of the case before, which hold its model
    gc.collect()
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    with _steps(case, modes, code, device, dtype) as steps:
        graphs = dict.fromkeys(steps, 0)
        warm: dict[str, WarmUp] = {}
        notes: dict[str, str] = {}
        for name, step in steps.items():
            before = compiled_graphs()
            found, notes[name] = attempt(lambda step=step: WarmUp.of(step), device)
            graphs[name] = compiled_graphs() - before
            if found is None:
                step.optimizer.zero_grad()
            else:
                warm[name] = found

        def run(name: str) -> dict[str, float]:
            before = compiled_graphs()
            taken = steps[name].seconds()
            graphs[name] += compiled_graphs() - before
            return taken

        sides = {name: (lambda name=name: run(name)) for name in warm}
        seconds = interleaved(sides, repeats, minutes, f"{case.name}, {case.frames} frames x {case.clips}")
        compiled = {name for name, step in steps.items() if step.compiled}
    rows = []
    for name in graphs:
        row = {"model": case.name, "frames": case.frames, "clips": case.clips, "side": name}
        row |= _measured(case, seconds.get(name, {}), warm.get(name), name in compiled, peak)
        rows.append(row | {"graphs": graphs[name], "note": notes[name], "seconds": seconds.get(name, {})})
    return [_beside(row, rows[0]) for row in rows]


def _measured(case: Case, seconds: dict[str, list[float]], warm: WarmUp | None, compiled: bool, peak: float) -> Row:
    """A side's figures, None where it failed."""
    medians = {part: statistics.median(taken) for part, taken in seconds.items()}
    row: Row = {part: medians.get(part) for part in ("step", "gradients", "update")}
    row |= _rates(case, row["step"], peak) | {"peak MB": None, "compiling": None}
    if warm is not None:
        row["peak MB"] = None if warm.peak is None else warm.peak / 1e6
        row["compiling"] = max(0.0, warm.first - row["step"]) if compiled else 0.0
    return row | {"repeats": len(seconds.get("step", ()))}


def _rates(case: Case, seconds: float | None, peak: float) -> Row:
    """What the step's seconds mean for the layout's tokens and for the arithmetic that FAR takes at the least."""
    if seconds is None:
        return {"tokens/s": None, "TFLOP/s": None, "MFU": None}
    speed = train_flops(case.config, case.layout) / seconds
    return {"tokens/s": case.layout.tokens / seconds, "TFLOP/s": speed / 1e12, "MFU": speed / peak}


def _beside(row: Row, first: Row) -> Row:
    """The row, and how it compares with the first one: how many times as fast, what share of its peak memory."""
    faster = None if row["step"] is None or first["step"] is None else first["step"] / row["step"]
    share = None if row["peak MB"] is None or not first["peak MB"] else row["peak MB"] / first["peak MB"]
    name = first["side"]
    return row | {f"{name} / this": faster, f"peak / {name}'s": share}


@contextlib.contextmanager
def _steps(
    case: Case, modes: Sequence[Mode], code: OfficialCode | None, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Step]]:
    """The sides by name, the official one first."""
    steps: dict[str, Step] = {}
    if code is None:
        ours = FAR(case.config)
        randomize(ours)
        ours.to(device, dtype)
    else:
        pair = random_pair(code, case.config, device, dtype)
        ours, steps[OFFICIAL] = pair.ours, Step.official(code, pair.theirs, case, device)
    pack = Clips.random(case.config, case.clips, case.frames, torch.device("cpu")).pack()
    packs = itertools.repeat([pack])
    with DevicePrefetch(packs, ObjectiveSection(), case.config, seed=0, device=device) as feed:
        yield steps | Step.ours(ours, feed, modes, device)


def _adam(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    """As both codes start it; None leaves the choice between its unfused ways to torch, as theirs does."""
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=fused or None
    )
