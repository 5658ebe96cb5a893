"""Sampled videos of the EMA while training, beside the truth, with PSNR, SSIM and LPIPS.

shape letters   b clips of one rank   T frames of a clip, given and new   h/w height and width in pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import far_scale
from far_scale.autoencoder import Autoencoder
from far_scale.autoencoder.lpips_network import MIN_SIZE
from far_scale.config.recipe import Recipe
from far_scale.config.schema import SampleSection
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, empty_model
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_gather_objects, all_ranks_or_raise
from far_scale.evaluation.lpips import LPIPS
from far_scale.evaluation.rollouts.episodes import Episodes, Wanted, shard_episodes
from far_scale.evaluation.rollouts.evaluate import load_autoencoder
from far_scale.evaluation.rollouts.metrics import frame_ssim, psnr
from far_scale.evaluation.rollouts.pictures import Pixels, to_uint8
from far_scale.evaluation.rollouts.rollout import RollOut, draw
from far_scale.evaluation.weights import load_lpips
from far_scale.train.curriculum import Stage
from far_scale.train.deepspeed_adapter import whole_shape
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog
from far_scale.utils.io import write_json

SOURCES = ("prediction", "repeat_last")
"""What is scored: the model's frames, and the baseline that shows the last given frame for ever."""


@dataclass(frozen=True)
class _Sampled:
    """What a rank sampled.

    Attributes:
        prediction, truth: uint8 `[b, T, h, w, 3]`, given frames first; the truth may be known of fewer frames.
        scores: float64 `[sources, 3, b, frames]`: squared error, SSIM and LPIPS of new frames with a truth.
    """

    prediction: Pixels
    truth: Pixels
    scores: NDArray[np.float64]


class VideoSampler:
    """Samples the first held-out clips: rank r of W takes clips r, r + W, ...; rank 0 writes and scores all of them.

    Args:
        run: the run directory.
        section: how to sample.
        frames: to predict.
        seed: of the noise, with a clip's number.
        dtype: of the arithmetic.
        card: of the model that is trained.
        clips: how many to sample.
        opened: the autoencoder and the clips, on the ranks that sample.
        processes: who samples.
        events: where it is said that files could not be written.

    Attributes:
        without_lpips: why there is no LPIPS, and the fix; None where there is.
    """

    def __init__(
        self,
        run: Path,
        section: SampleSection,
        frames: int,
        seed: int,
        dtype: torch.dtype,
        card: ModelMetadata,
        clips: int,
        opened: tuple[Autoencoder, Episodes] | None,
        processes: Processes,
        events: EventLog,
    ) -> None:
        self._run, self._section, self._frames, self._seed, self._dtype = run, section, frames, seed, dtype
        self._card, self._clips, self._processes, self._events = card, clips, processes, events
        self._opened = opened
        self._lpips: LPIPS | None = None
        problem = None if opened is None else self._load_lpips(opened[0].downsample)
        self.without_lpips = next(filter(None, all_gather_objects(problem, processes.host_group)), None)
        if self.without_lpips is not None:
            self._lpips = None

    def write(
        self, step: int, stage: Stage, engine: Any, ema: ShardedEMA, beat: Callable[[], None]
    ) -> dict[str, Any] | None:
        """Sample with the EMA and write run_dir/validation/step-XXXXXXXX/; all ranks call it.

        There lie samples.mp4, samples.png and scores.json. A failure to sample or to write is an event, not an error.

        Returns:
            On rank 0 the mean scores, and `video`, the MP4's path in the run directory (None where it could not be
            written); None on the others, and where the model gives numbers that are not finite.
        """
        state = whole_ema(engine, ema, self._dtype, keep=self._opened is not None)
        own: _Sampled | str | None = None
        if self._opened is not None:
            model = empty_model(stage.config).eval()
            model.load_state_dict(state, assign=True)
            autoencoder, clips = self._opened
            steps, guidance = self._section.steps, self._section.guidance
            roll_out = RollOut(
                model,
                self._card,
                autoencoder,
                clips,
                self._frames,
                steps,
                guidance,
                self._seed,
                self._section.context_noise,
            )
            try:
                own = self._sample(roll_out, beat)
            except UserError as error:
                own = str(error)
        parts: list[Any] = [None] * self._processes.world_size
        dist.gather_object(own, parts if self._processes.is_main_process else None, group=self._processes.host_group)
        if not self._processes.is_main_process:
            return None
        if (problem := next((part for part in parts if isinstance(part, str)), None)) is not None:
            self._events.emit("validation-failed", step, f"step {step}: no samples: {problem}")
            return None
        return self._write(step, roll_out, _in_order(parts), beat)

    def _sample(self, roll_out: RollOut, beat: Callable[[], None]) -> _Sampled:
        clips = slice(self._processes.rank, None, self._processes.world_size)
        prediction, truth, scores = [], [], []
        last_given = None
        for frame in roll_out.frames_of(clips, progress=False):
            prediction.append(to_uint8(frame.pixels))
            if frame.truth is not None:
                truth.append(to_uint8(frame.truth))
                if frame.index < roll_out.given:
                    last_given = frame.truth
                elif last_given is not None:
                    scores.append([self._score(pixels, frame.truth) for pixels in (frame.pixels, last_given)])
            beat()
        frames = np.stack(prediction, axis=1)
        table = np.array(scores).transpose(1, 2, 3, 0) if scores else np.empty((len(SOURCES), 3, len(frames), 0))
        return _Sampled(frames, np.stack(truth, axis=1) if truth else frames[:, :0], table)

    def _score(self, pixels: Tensor, truth: Tensor) -> NDArray[np.float64]:
        """`[3, b]`: squared error, SSIM and LPIPS of frames `[b, 3, h, w]`; not a number where there is no network."""
        error = (pixels.double() - truth.double()).square().mean(dim=(1, 2, 3))
        lpips = torch.full_like(error, torch.nan)
        if self._lpips is not None:
            device = self._processes.device
            lpips = self._lpips(pixels.to(device), truth.to(device)).double().cpu()
        return torch.stack([error, frame_ssim(pixels, truth).double(), lpips]).numpy()

    def _write(self, step: int, roll_out: RollOut, sampled: _Sampled, beat: Callable[[], None]) -> dict[str, Any]:
        folder = self._run / "validation" / f"step-{step:08d}"
        means = _scores(sampled.scores)
        each = [_scores(sampled.scores[:, :, [clip]]) for clip in range(self._clips)]
        report = {
            "step": step,
            "given": roll_out.given,
            "frames": roll_out.frames,
            "steps": roll_out.steps,
            "guidance": roll_out.guidance,
            "seed": roll_out.seed,
            "truth": roll_out.data.truth.is_what if roll_out.truth_frames else None,
            "truth_frames": roll_out.truth_frames,
            **means,
            "clips": [{"key": key, **scores} for key, scores in zip(roll_out.data.keys, each, strict=True)],
        }

        def pictures() -> Iterator[tuple[int, Pixels | None, Pixels]]:
            for index in range(sampled.prediction.shape[1]):
                known = index < sampled.truth.shape[1]
                yield index, sampled.truth[:, index] if known else None, sampled.prediction[:, index]
                beat()

        video = folder / "samples.mp4"
        try:
            draw(roll_out.shown(self._clips), pictures(), roll_out.data.fps, video, folder / "samples.png")
            write_json(folder / "scores.json", report)
        except (UserError, OSError) as error:
            self._events.emit("validation-failed", step, f"step {step}: the samples cannot be written: {error}")
            return {**means, "video": None}
        return {**means, "video": str(video.relative_to(self._run))}

    def _load_lpips(self, downsample: int) -> str | None:
        """Load the network; why there is none."""
        _, height, width = self._card.latent_shape
        if min(height, width) * downsample < MIN_SIZE["alex"]:
            return f"no LPIPS: it needs frames of at least {MIN_SIZE['alex']} pixels"
        try:
            self._lpips = load_lpips("alex", self._processes.device)
        except UserError as error:
            return f"no LPIPS: {error}"
        return None


def open_validation_videos(
    recipe: Recipe,
    shards: ShardSet,
    stage: Stage,
    scaling: LatentScaling,
    dtype: torch.dtype,
    processes: Processes,
    events: EventLog,
) -> VideoSampler:
    """Open the first clips of held-out `shards` to sample videos of them; every rank calls it.

    Args:
        recipe: the run's, with a validation section.
        stage: the last that the model samples in.
        scaling: of the training's latents.
        dtype: of the arithmetic.

    Raises:
        UserError: on all ranks alike: the autoencoder is missing, or a clip has too few frames.
    """
    assert recipe.validation is not None
    manifest, sample, frames = shards.manifest, recipe.sample, recipe.sample_frames()
    card = ModelMetadata(
        autoencoder=manifest.autoencoder,
        scaling=scaling,
        latent_shape=manifest.latent_shape,
        fps=manifest.fps,
        frame_stride=recipe.data.frame_stride,
        classes=manifest.classes,
        training=TrainingMetadata(step=0, recipe_hash=recipe.hash(), weights="ema", far_scale=far_scale.__version__),
    )
    clips = min(recipe.validation.sample_clips, sum(shards.samples_per_shard))
    wanted = Wanted(sample.given, frames, clips, conditioned=sample.guidance != -1)

    def open_clips() -> tuple[Autoencoder, Episodes]:
        autoencoder = load_autoencoder(card, processes.device)
        return autoencoder, shard_episodes(shards, stage.config, card, autoencoder, wanted)

    opened = all_ranks_or_raise(lambda: open_clips() if processes.rank < clips else None, processes)
    return VideoSampler(
        Path(recipe.run_dir), sample, frames, recipe.seed, dtype, card, clips, opened, processes, events
    )


def whole_ema(engine: Any, ema: ShardedEMA, dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
    """The state dict of the model with the EMA's weights, in `dtype`; all ranks call it.

    One parameter after the other is put together, so that no rank ever holds the whole in float32.

    Args:
        keep: whether this rank wants it; otherwise it only gives its part, and gets the buffers alone.
    """
    own = {fragment.name: (fragment, part) for fragment, part in zip(fragments(engine), ema.weights, strict=True)}
    state = {name: buffer.detach().to(dtype) for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        whole = torch.zeros(whole_shape(parameter), dtype=dtype, device=engine.device)
        if name in own:
            fragment, part = own[name]
            whole.view(-1)[fragment.offset : fragment.offset + len(part)] = part.to(dtype)
        if engine.zero_optimization_stage() > 0:
            dist.all_reduce(whole)  # exact: where one rank has a number all others have 0
        if keep:
            state[name] = whole
    return state


def _in_order(parts: Sequence[_Sampled | None]) -> _Sampled:
    """All clips in their order, of what each rank sampled of every W-th."""
    there = [part for part in parts if part is not None]
    order = np.argsort(
        np.concatenate([np.arange(len(part.prediction)) * len(parts) + r for r, part in enumerate(there)])
    )
    return _Sampled(
        np.concatenate([part.prediction for part in there])[order],
        np.concatenate([part.truth for part in there])[order],
        np.concatenate([part.scores for part in there], axis=2)[:, :, order],
    )


def _scores(table: NDArray[np.float64]) -> dict[str, Any]:
    """By source `psnr`, `ssim` and `lpips` of `[sources, 3, clips, frames]`, each None where it is not known.

    PSNR is that of the mean squared error over all frames, the others are means over the frames, as in `Meter`.
    """
    found: dict[str, Any] = {}
    for source, (error, ssim, lpips) in zip(SOURCES, table, strict=True):
        values = (psnr(error.mean()), ssim.mean(), lpips.mean()) if error.size else (math.nan,) * 3
        known = [float(value) if math.isfinite(value) else None for value in values]
        found[source] = dict(zip(("psnr", "ssim", "lpips"), known, strict=True))
    return found
