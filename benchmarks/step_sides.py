"""The sides of train_step.py: bare steps of the official code and of ours, and ours as training runs it.

A bare step is noise, forward, loss, backward and AdamW. Theirs is the official trainer's `train_step` with torch's
AdamW as their train.py makes it; ours is what the training loop does to a pack, the feed that draws the noise and
prepares the layout one step ahead included, with the fused AdamW that it takes. A whole step is `train_step` of our
training loop: DeepSpeed's engine with float32 masters, clipping, the guard and the EMA.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from measure import finished_time, timed
from official import OfficialCode
from pairs import Clips
from torch import Tensor, nn

from far_scale.config.recipe import load_recipe
from far_scale.config.schema import FaultsSection, OptimizerSection, TrainSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.process_group import Processes
from far_scale.model import FAR, FARConfig
from far_scale.model.layers import Checkpointing
from far_scale.train.curriculum import stages
from far_scale.train.device_prefetch import Batch
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments, set_learning_rate, start_engine
from far_scale.train.flow_matching import pack_loss
from far_scale.train.loop import train_step
from far_scale.train.sharding import choose_sharding
from far_scale.train.step_guard import StepGuard
from far_scale.utils.event_log import EventLog

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """A model and its clips.

    Attributes:
        frames: of each clip; with varying layouts at most.
        layouts: whether each step has new numbers of frames, from half of `frames` on; the same for all sides.
    """

    name: str
    config: FARConfig
    frames: int
    clips: int = 1
    layouts: Literal["same", "varying"] = "same"

    def packs(self) -> Iterator[list[Pack]]:
        """The packs of each step, one a step, without end."""
        clips = Clips.random(self.config, self.clips, self.frames, torch.device("cpu"))
        if self.layouts == "same":
            yield from itertools.repeat([clips.pack()])
        draw, fewest = random.Random(0), -(-self.frames // 2)
        while True:
            yield [clips.pack([draw.randint(fewest, self.frames) for _ in range(self.clips)])]


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


class Step(ABC):
    """A side: its model, and how it trains a step.

    Attributes:
        clip_frames: frames of the clips of each step so far.
    """

    def __init__(self, device: torch.device, compiled: bool) -> None:
        self.device, self.compiled = device, compiled
        self.clip_frames: list[tuple[int, ...]] = []

    @abstractmethod
    def run(self) -> None:
        """Train a step."""

    @abstractmethod
    def seconds(self) -> dict[str, float]:
        """Train a step; the seconds of all of it ("step"), of forward and backward, and of the update."""

    @abstractmethod
    def recover(self) -> None:
        """Make it ready for the next step after one that failed."""


class BareStep(Step):
    """A step by the model and torch's AdamW alone.

    Args:
        loss: runs the forward; returns the loss and the frames of the clips.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[], tuple[Tensor, tuple[int, ...]]],
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        super().__init__(device, compiled)
        self._optimizer, self._loss = optimizer, loss
        model.train()

    @staticmethod
    def official(code: OfficialCode, model: nn.Module, case: Case, device: torch.device) -> Step:
        trainer = code.trainer(model, case.config)
        clips = Clips.random(case.config, case.clips, case.frames, device)
        batch = {"latent": clips.latents} | (clips.official_conditions(case.config) or {})
        clip_frames = (case.frames,) * case.clips

        def loss() -> tuple[Tensor, tuple[int, ...]]:
            return trainer.train_step(dict(batch))["total_loss"], clip_frames

        return BareStep(model, make_adam(model, fused=False), loss, device)

    @staticmethod
    def ours(
        model: FAR, optimizer: torch.optim.Optimizer, feed: Iterator[Batch], mode: Mode, device: torch.device
    ) -> Step:
        def loss() -> tuple[Tensor, tuple[int, ...]]:
            model.configure_execution(mode.compiled, mode.checkpointing, mode.kernel)
            (noisy,) = next(feed).noisy
            velocity = model(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
            return pack_loss(velocity, noisy), noisy.layout.clip_frames

        return BareStep(model, optimizer, loss, device, mode.compiled)

    def _gradients(self) -> None:
        loss, clip_frames = self._loss()
        loss.backward()
        self.clip_frames.append(clip_frames)

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def run(self) -> None:
        self._gradients()
        self._update()

    def seconds(self) -> dict[str, float]:
        gradients, update = timed(self._gradients, self.device), timed(self._update, self.device)
        return {"step": gradients + update, "gradients": gradients, "update": update}

    def recover(self) -> None:
        self._optimizer.zero_grad()


class EngineModel:
    """Our model as training runs it. All whole steps share it.

    Args:
        source: gives the first weights.
    """

    def __init__(self, source: FAR, dtype: torch.dtype, processes: Processes) -> None:
        (stage,) = stages(load_recipe("demo_cpu", []))
        self.stage, self.processes = replace(stage, config=source.config), processes
        self._source = source
        self._train = TrainSection(steps=1, precision="bf16" if dtype == torch.bfloat16 else "fp32", zero_stage="auto")
        self._optimizer = OptimizerSection(learning_rate=LEARNING_RATE, warmup_steps=0, ema_decay=0.9999)
        self._start()

    def _start(self) -> None:
        model = FAR(self._source.config)
        model.load_state_dict(self._source.state_dict())
        sizes = [parameter.numel() for parameter in model.parameters()]
        self.sharding = choose_sharding(self._train, 1, sizes, self.processes, lambda: 0)
        self.engine: Any = start_engine(model, self._optimizer, self._train, 1, self.processes, self.sharding)
        self.ema = ShardedEMA(fragments(self.engine), self._optimizer.ema_decay)
        self.guard = StepGuard(self.engine, FaultsSection(), self.processes, EventLog(Path(), is_main_process=False))
        self.steps = 0

    def restart(self) -> None:
        """Start it anew: DeepSpeed cannot go on after a backward that failed."""
        self.engine.destroy()
        self._start()

    def __enter__(self) -> EngineModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.destroy()


class WholeStep(Step):
    """A step of our training loop."""

    def __init__(self, training: EngineModel, feed: Iterator[Batch], mode: Mode) -> None:
        super().__init__(training.processes.device, mode.compiled)
        self._training, self._feed, self._mode = training, feed, mode

    def run(self) -> None:
        training, mode = self._training, self._mode
        training.engine.module.configure_execution(mode.compiled, mode.checkpointing, mode.kernel)
        batch = next(self._feed)
        set_learning_rate(training.engine, LEARNING_RATE)
        reduce_once = training.sharding.reduce_once
        train_step(training.engine, batch, training.stage, training.processes, None, training.guard, reduce_once)
        training.ema.update(training.guard.update_mask)
        training.steps += 1
        training.guard.end_step(training.steps, batch.packs)
        self.clip_frames.append(batch.noisy[0].layout.clip_frames)

    def seconds(self) -> dict[str, float]:
        engine, began = self._training.engine, []
        step = engine.step

        def update() -> None:
            began.append(finished_time(self.device))
            step()

        engine.step = update
        start = finished_time(self.device)
        self.run()
        end = finished_time(self.device)
        del engine.step  # the class has the engine's own
        return {"step": end - start, "gradients": began[0] - start, "update": end - began[0]}

    def recover(self) -> None:
        self._training.restart()


def make_adam(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    """As both codes start it; None leaves the choice between its unfused ways to torch, as theirs does."""
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=fused or None
    )
