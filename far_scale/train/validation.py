"""Validation while training: the loss on held-out clips, of the weights and of their EMA, and sampled videos.

The loss is the training's, with noise, timesteps and clean frames that never change: they are drawn by the pack's
number, with a separate seed. So two losses differ only by the weights. The packs do not depend on the number of
ranks: rank r of W computes packs r, r + W, ..., and all errors are added in one order.

Validation does not change training: it draws from no random state of the training, and restores the weights bit for
bit.
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
from far_scale.model.layout import FrameLayout
from far_scale.train.curriculum import Stage, stage_of
from far_scale.train.deepspeed_adapter import use_loaded_weights
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments
from far_scale.train.flow_matching import TIMESTEPS, add_noise, frame_errors
from far_scale.train.held_out import HeldOut
from far_scale.train.metrics import Monitor

TIMESTEP_BANDS = 5
"""Bands of timesteps with a loss each."""

MAX_FRAME_BINS = 16
"""Maximum number of bins of frame indices: in longer clips several indices share one."""


class Validation:
    """Validates at the intervals of the recipe, if any.

    The EMA is evaluated by the training's own engine, which takes one more float32 copy of this rank's part of the
    weights. For sampled videos each rank holds a whole model in the compute dtype.

    Args:
        plan: the run's stages.
        held_out: the clips, or None.
        engine, ema: what to validate.
        monitor: logs the results.
        watchdog: notified of progress.
        processes: the run's.
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
        self._packs: tuple[int, list[Pack]] | None = None  # a stage's index, and this rank's packs for it
        if held_out is None:
            return
        self._validated = broadcast_from_main(lambda: monitor.validated_steps, processes)
        if held_out.videos is not None and held_out.videos.without_lpips is not None:
            monitor.print(f"validation: {held_out.videos.without_lpips}")

    def after_step(self, step: int) -> None:
        """Validate if it is due after `step` and not in the log yet; all ranks call it.

        Raises:
            UserError: a held-out clip can no longer be read.
        """
        if self._held_out is None or step == 0:
            return
        section, is_last = self._held_out.section, step == self._plan[-1].end
        loss_due = is_last or step % section.every == 0
        videos_due = section.sample_every is not None and (is_last or step % section.sample_every == 0)
        if not (loss_due or videos_due) or step in self._validated:
            return
        beat, values, start = partial(self._watchdog.beat, step), dict[str, Any](), time.perf_counter()
        stage = stage_of(self._plan, step - 1)
        with self._monitor.excluded(), evaluating(self._engine):
            if loss_due:
                values["weights"] = self._loss(self._held_out, stage, beat)
                with ema_as_weights(self._engine, self._ema):
                    values["ema"] = self._loss(self._held_out, stage, beat)
            if videos_due and self._held_out.videos is not None:
                values["samples"] = self._held_out.videos.write(step, stage, self._engine, self._ema, beat)
            values["seconds"] = time.perf_counter() - start
            self._monitor.validated(step, values)

    def _loss(self, held_out: HeldOut, stage: Stage, beat: Callable[[], None]) -> dict[str, Any]:
        """`summary` of the loss of the engine's present weights; the same on all ranks."""
        if self._packs is None or self._packs[0] != stage.index:
            self._packs = stage.index, held_out.packs(stage, self._processes)
        config = dataclasses.replace(stage.config, condition_dropout=0.0)
        rows = [np.empty((0, 5))]
        for position, pack in enumerate(self._packs[1]):
            on_host = add_noise(pack, held_out.objective, config, held_out.noise_seed)
            noisy = on_host.to(self._processes.device)
            velocity = self._engine(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)
            errors = frame_errors(velocity, noisy).cpu()
            if held_out.counts(position, self._processes):
                assert isinstance(on_host.layout, FrameLayout)  # validation shares no packs
                timesteps = on_host.timesteps[on_host.layout.window_rows(errors.device)]
                rows.append(_error_rows(pack, stage.config.window, timesteps, errors)[on_host.has_loss.numpy()])
            beat()
        return summary(
            np.concatenate(all_gather_objects(np.concatenate(rows), self._processes.host_group)), held_out.clips
        )


@contextlib.contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Run the engine's model without gradients, and its layers uncompiled, so that they add no graphs.

    An error inside ends the run, so nothing is restored then.
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
    """Compute with the EMA as the engine's weights; restores the weights bit for bit.

    Takes one more float32 copy of this rank's part of the weights. An error inside ends the run, so nothing is restored
    then: that would take all ranks.
    """
    weights = [fragment.weight for fragment in fragments(engine)]
    with torch.no_grad():
        saved = [weight.clone() for weight in weights]
        for weight, average in zip(weights, ema.weights, strict=True):
            weight.copy_(average)
        use_loaded_weights(engine)
        yield
        for weight, original in zip(weights, saved, strict=True):
            weight.copy_(original)
        use_loaded_weights(engine)


def _error_rows(pack: Pack, window: int, timesteps: torch.Tensor, errors: torch.Tensor) -> NDArray[np.float64]:
    """`[Fw, 5]`: pack, clip in it, frame index in the clip, timestep and error of each window frame."""
    frames = [
        (pack.lane, clip, index)
        for clip, count in enumerate(pack.clip_frames)
        for index in range(max(0, count - window), count)
    ]
    return np.column_stack([np.array(frames, dtype=np.float64), timesteps.double().numpy(), errors.double().numpy()])


def summary(rows: NDArray[np.float64], clips: int) -> dict[str, Any]:
    """The values to log, from the errors of all noisy frames.

    Args:
        rows: `[noisy frames, 5]`: pack, clip in it, frame index in the clip, timestep, mean squared error; the rows of
            a pack are together, the packs in any order.
        clips: number of held-out clips; a clip whose frames are all clean counts with loss 0, as in `pack_loss`.

    Returns:
        `loss`, the mean over a clip's noisy frames, then over the clips; `timesteps`, the mean over the frames in each
        band ("1-200" and so on, None without frames); `frames`, the same by frame index from 0 ("0", or "284-287" for
        long clips).
    """
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    _, index, timestep, error = rows[:, 0], rows[:, 2], rows[:, 3], rows[:, 4]
    _, clip = np.unique(rows[:, :2], axis=0, return_inverse=True)
    counts = np.bincount(clip.reshape(-1), minlength=1)
    sums = np.bincount(clip.reshape(-1), weights=error, minlength=1)
    width = TIMESTEPS // TIMESTEP_BANDS
    bands = [(first, first + width - 1) for first in range(1, TIMESTEPS + 1, width)]
    lowest, highest = (int(index.min()), int(index.max())) if len(index) else (0, -1)
    step = -(-(highest - lowest + 1) // MAX_FRAME_BINS) or 1
    bins = [(first, min(first + step - 1, highest)) for first in range(lowest, highest + 1, step)]
    return {
        "loss": float((sums / np.maximum(counts, 1)).sum() / clips),
        "timesteps": {_band_name(*band): _mean(error[_within(timestep, *band)]) for band in bands},
        "frames": {_band_name(*band): _mean(error[_within(index, *band)]) for band in bins},
    }


def _within(values: NDArray[np.float64], first: int, last: int) -> NDArray[np.bool_]:
    return (values >= first) & (values <= last)


def _mean(errors: NDArray[np.float64]) -> float | None:
    return float(errors.mean()) if len(errors) else None


def _band_name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
