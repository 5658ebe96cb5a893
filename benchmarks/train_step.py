"""Time and peak memory of a whole training step: noise, forward, loss, backward, AdamW.

Theirs is the official trainer's `train_step` with torch's AdamW as their train.py makes it; ours is what the training
loop does to a pack, with the fused AdamW that it takes. On one process DeepSpeed and Accelerate add nothing to either
that could be sped up, so they are left away.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Row, interleaved, peak_beyond, timed
from official import OfficialCode
from pairs import Clips, random_pair, randomize
from torch import Tensor, nn

from far_scale.convert.fit import empty_model
from far_scale.model import FAR, FARConfig
from far_scale.objective import add_noise, pack_loss
from far_scale.recipe_sections import ObjectiveSection

LEARNING_RATE = 1e-4
SIDES = ("official", "ours")


@dataclass(frozen=True)
class Case:
    """A model and the frames of its one clip."""

    name: str
    config: FARConfig
    frames: int


def cases(layers: int, heads: int) -> list[Case]:
    short = FARConfig(layers, heads, window=16, actions=4)
    wide = FARConfig(layers, heads, window=64, actions=4)
    long = FARConfig(layers, heads, window=16, context_patch=4, actions=4)
    return [Case("FAR", short, 16), Case("FAR, window 64", wide, 64), Case("FAR-Long", long, 300)]


class Step:
    """One side's model, optimizer and way to make a loss."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], fused: bool, device: torch.device) -> None:
        self.model, self.loss, self.device = model.train(), loss, device
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=fused or None
        )

    @staticmethod
    def official(code: OfficialCode, model: nn.Module, case: Case, device: torch.device) -> Step:
        trainer = code.trainer(model, case.config)
        clips = Clips.random(case.config, 1, case.frames, device)
        batch = {"latent": clips.latents} | (clips.official_conditions(case.config) or {})
        return Step(model, lambda: trainer.train_step(dict(batch))["total_loss"], fused=False, device=device)

    @staticmethod
    def of_ours(model: FAR, case: Case, device: torch.device) -> Step:
        pack = Clips.random(case.config, 1, case.frames, torch.device("cpu")).pack()

        def loss() -> Tensor:
            noisy = add_noise(pack, ObjectiveSection(), case.config, seed=0).to(device)
            velocity = model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
            return pack_loss(velocity, noisy)

        return Step(model, loss, fused=True, device=device)

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


def train(
    code: OfficialCode,
    layers: int,
    heads: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    minutes: float,
) -> Iterator[dict[str, list[Row]]]:
    """The tables of times and of peak memory, after each of their rows."""
    times: list[Row] = []
    memory: list[Row] = []
    for case in cases(layers, heads):
        memory.append(memory_row(code.clone, case, device, dtype))
        times.append(time_row(code, case, device, dtype, repeats, minutes))
        yield {
            "Seconds of a training step, batch 1, medians": times,
            "MB at the peak of a training step, beyond weights and AdamW's moments": memory,
        }


def time_row(
    code: OfficialCode, case: Case, device: torch.device, dtype: torch.dtype, repeats: int, minutes: float
) -> Row:
    """Both sides in turn, after one step each that does not count."""
    pair = random_pair(code, case.config, device, dtype)
    steps = {
        "official": Step.official(code, pair.theirs, case, device),
        "ours": Step.of_ours(pair.ours, case, device),
    }
    for step in steps.values():
        step.run()
    seconds = interleaved(
        {side: step.seconds for side, step in steps.items()}, repeats, minutes, f"{case.name}, {case.frames} frames"
    )
    row = _case_columns(case)
    for name in ("step", "gradients", "update"):
        official, ours = (statistics.median(seconds[side][name]) for side in SIDES)
        row |= {f"{name}, official": official, f"{name}, ours": ours, f"{name}, ratio": official / ours}
    return row | {"repeats": len(seconds["ours"]["step"]), "seconds": seconds}


def memory_row(clone: Path, case: Case, device: torch.device, dtype: torch.dtype) -> Row:
    """One step of either side in a fresh process of its own."""
    peaks: dict[str, float | None] = {}
    context = multiprocessing.get_context("spawn")
    for side in SIDES:
        with context.Pool(1) as pool:
            arguments = (side, clone, case, str(device), dtype, torch.get_num_threads())
            peak = pool.apply(peak_of_step, arguments)
        peaks[side] = None if peak is None else peak / 1e6
    gradients = sum(p.numel() for p in empty_model(case.config).parameters()) * dtype.itemsize
    official, ours = peaks["official"], peaks["ours"]
    share = None if official is None or ours is None else ours / official
    return _case_columns(case) | peaks | {"gradients alone": gradients / 1e6, "ours / official": share}


def peak_of_step(side: str, clone: Path, case: Case, device_name: str, dtype: torch.dtype, threads: int) -> int | None:
    """Bytes of one side's step, in this process, which must be fresh."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if side == "official":
        code = OfficialCode(clone)
        model = code.model(case.config)
        randomize(model)
        step = Step.official(code, model.to(device, dtype), case, device)
    else:
        ours = FAR(case.config)
        randomize(ours)
        step = Step.of_ours(ours.to(device, dtype), case, device)
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.update()  # changes no weight, but makes the moments
    gc.collect()
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what building the model left behind would hide part of the step
    return peak_beyond(step.run, device)


def _case_columns(case: Case) -> Row:
    return {"model": case.name, "frames": case.frames}
