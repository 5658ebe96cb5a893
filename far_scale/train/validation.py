"""Validation while training: the loss on held-out clips, of the weights and of their EMA, and sampled videos.

The loss is the training's function of a pack, at noise, timesteps and clean frames that never change: they are drawn
by the pack's number, under a seed of their own. So two values differ by the weights alone. The packs do not depend on
the number of ranks: rank r of W computes packs r, r + W, ..., and all errors are added up in one order.

Nothing here draws from a random state that training reads, and the weights are put back bit for bit, so a run trains
as it would without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.process_group import Processes, all_gather_objects, broadcast_from_main
from far_scale.health.watchdog import Watchdog
from far_scale.model.layers import Block
from far_scale.train.curriculum import Stage, stage_of
from far_scale.train.deepspeed_adapter import use_loaded_weights
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments
from far_scale.train.flow_matching import TIMESTEPS, add_noise, frame_errors
from far_scale.train.held_out import HeldOut
from far_scale.train.metrics import Monitor

BANDS = 5
"""Bands of timesteps that the loss is given by."""

MOST_BINS = 16
"""Bins of frame indices at most: of longer clips several indices share one."""


class Validation:
    """Validates after the steps that the recipe names; does nothing where it names none.

    The EMA is computed by the training's own engine. Meanwhile there is one more float32 copy of this rank's part of
    the weights; for sampled videos each rank holds a whole model in the precision of the arithmetic.

    Args:
        plan: the run's stages.
        held_out: what to read, or None.
        engine, ema: what to validate.
        monitor: what logs it.
        watchdog: notified while validation goes on.
        processes: who runs it.
    """

    def __init__(
        self,
        plan: list[Stage],
        held_out: HeldOut | None,
        engine: Any,
        ema: ShardedEMA,
        monitor: Monitor,
        watchdog: Watchdog,
        processes: Processes,
    ) -> None:
        self._plan, self._held_out, self._engine, self._ema = plan, held_out, engine, ema
        self._monitor, self._watchdog, self._processes = monitor, watchdog, processes
        self._read: tuple[int, list[Pack]] | None = None  # a stage's index and this rank's packs of it
        if held_out is None:
            return
        self._validated = broadcast_from_main(lambda: monitor.validated_steps, processes)
        if held_out.videos is not None and held_out.videos.without_lpips is not None:
            monitor.say(f"validation: {held_out.videos.without_lpips}")

    def after_step(self, step: int) -> None:
        """Validate where it is due after `step` and not in the log yet; all ranks call it.

        Raises:
            UserError: a held-out clip cannot be read any more.
        """
        if self._held_out is None or step == 0:
            return
        section, last = self._held_out.section, step == self._plan[-1].end
        losses = last or step % section.every == 0
        videos = section.sample_every is not None and (last or step % section.sample_every == 0)
        if not (losses or videos) or step in self._validated:
            return
        beat, values, start = partial(self._watchdog.beat, step), dict[str, Any](), time.perf_counter()
        stage = stage_of(self._plan, step - 1)
        with self._monitor.apart(), evaluating(self._engine):
            if losses:
                values["weights"] = self._loss(self._held_out, stage, beat)
                with ema_as_weights(self._engine, self._ema):
                    values["ema"] = self._loss(self._held_out, stage, beat)
            if videos and self._held_out.videos is not None:
                values["samples"] = self._held_out.videos.write(step, stage, self._engine, self._ema, beat)
            values["seconds"] = time.perf_counter() - start
            self._monitor.validated(step, values)

    def _loss(self, held_out: HeldOut, stage: Stage, beat: Callable[[], None]) -> dict[str, Any]:
        """The `summary` of the loss, of the weights that the engine has now; the same on all ranks."""
        if self._read is None or self._read[0] != stage.index:
            self._read = stage.index, held_out.packs(stage, self._processes)
        config = dataclasses.replace(stage.config, condition_dropout=0.0)
        rows = [np.empty((0, 5))]
        for position, pack in enumerate(self._read[1]):
            drawn = add_noise(pack, held_out.objective, config, held_out.noise_seed)
            noisy = drawn.to(self._processes.device)
            velocity = self._engine(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
            errors = frame_errors(velocity, noisy).cpu()
            if held_out.counts(position, self._processes):
                timesteps = drawn.timesteps[drawn.layout.window_rows(errors.device)]
                rows.append(_rows(pack, stage.config.window, timesteps, errors)[drawn.has_loss.numpy()])
            beat()
        return summary(
            np.concatenate(all_gather_objects(np.concatenate(rows), self._processes.host_group)), held_out.clips
        )


@contextlib.contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Meanwhile the engine's model computes without gradients, and its layers uncompiled: they make no new graphs.

    Not for what fails inside, which ends the run.
    """
    blocks = [module for module in engine.module.modules() if isinstance(module, Block)]
    compiled = [block.compiled for block in blocks]
    for block in blocks:
        block.compiled = False
    engine.eval()
    with torch.no_grad():
        yield
    engine.train()
    for block, before in zip(blocks, compiled, strict=True):
        block.compiled = before


@contextlib.contextmanager
def ema_as_weights(engine: Any, ema: ShardedEMA) -> Iterator[None]:
    """Meanwhile the engine computes with the EMA; afterwards its weights are what they were, bit for bit.

    Takes memory for one more float32 copy of this rank's part of the weights. An error inside ends the run, and leaves
    the EMA there: to put the weights back takes all ranks.
    """
    own = [fragment.weight for fragment in fragments(engine)]
    with torch.no_grad():
        kept = [weight.clone() for weight in own]
        for weight, average in zip(own, ema.weights, strict=True):
            weight.copy_(average)
        use_loaded_weights(engine)
        yield
        for weight, before in zip(own, kept, strict=True):
            weight.copy_(before)
        use_loaded_weights(engine)


def _rows(pack: Pack, window: int, timesteps: torch.Tensor, errors: torch.Tensor) -> NDArray[np.float64]:
    """`[Fw, 5]`: pack, clip in it, frame index in the clip, timestep and error of each window frame."""
    frames = [
        (pack.lane, clip, index)
        for clip, count in enumerate(pack.clip_frames)
        for index in range(max(0, count - window), count)
    ]
    return np.column_stack([np.array(frames, dtype=np.float64), timesteps.double().numpy(), errors.double().numpy()])


def summary(rows: NDArray[np.float64], clips: int) -> dict[str, Any]:
    """What is logged of the errors of all noisy frames.

    Args:
        rows: `[noisy frames, 5]`: pack, clip in it, frame index in the clip, timestep, mean squared error; each pack's
            rows in one piece, the packs in any order.
        clips: held-out clips; one whose frames are all clean counts with loss 0, as in `pack_loss`.

    Returns:
        `loss`, the mean over the clips of a clip's mean over its noisy frames; `timesteps`, the mean over the frames in
        each band ("1-200" and so on, null where there is none); `frames`, that of frame indices ("0", or "284-287"
        where clips are long), from 0.
    """
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    _, index, timestep, error = rows[:, 0], rows[:, 2], rows[:, 3], rows[:, 4]
    _, clip = np.unique(rows[:, :2], axis=0, return_inverse=True)
    counts = np.bincount(clip.reshape(-1), minlength=1)
    sums = np.bincount(clip.reshape(-1), weights=error, minlength=1)
    width = TIMESTEPS // BANDS
    bands = [(first, first + width - 1) for first in range(1, TIMESTEPS + 1, width)]
    lowest, highest = (int(index.min()), int(index.max())) if len(index) else (0, -1)
    step = -(-(highest - lowest + 1) // MOST_BINS) or 1
    bins = [(first, min(first + step - 1, highest)) for first in range(lowest, highest + 1, step)]
    return {
        "loss": float((sums / np.maximum(counts, 1)).sum() / clips),
        "timesteps": {_name(*band): _mean(error[_within(timestep, *band)]) for band in bands},
        "frames": {_name(*band): _mean(error[_within(index, *band)]) for band in bins},
    }


def _within(values: NDArray[np.float64], first: int, last: int) -> NDArray[np.bool_]:
    return (values >= first) & (values <= last)


def _mean(errors: NDArray[np.float64]) -> float | None:
    return float(errors.mean()) if len(errors) else None


def _name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
