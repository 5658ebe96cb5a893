"""Samples videos of the EMA during training, beside the truth, with PSNR, SSIM and LPIPS.

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
from far_scale.convert.model_dir import ModelMetadata, TrainingMetadata, empty_model
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.shard_set import ShardSet
from far_scale.distributed.process_group import Processes, all_gather_objects, all_ranks_or_raise
from far_scale.evaluation.metric_networks import LPIPS
from far_scale.evaluation.rollouts.episodes import Episodes, EpisodeSelection, load_shard_episodes
from far_scale.evaluation.rollouts.psnr_ssim import frame_mse, frame_ssim, psnr
from far_scale.evaluation.rollouts.rollout import Rollout, write_pictures
from far_scale.evaluation.rollouts.runner import load_autoencoder
from far_scale.evaluation.rollouts.video_grid import Pixels, to_uint8
from far_scale.evaluation.weights import load_lpips
from far_scale.sampling.config import SamplingConfig
from far_scale.train.curriculum import Stage
from far_scale.train.deepspeed_adapter import whole_shape
from far_scale.train.ema import ShardedEMA
from far_scale.train.engine import fragments
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog
from far_scale.utils.io import write_json

SOURCES = ("prediction", "repeat_last")
"""What is scored: the model's frames, and the baseline that repeats the last given frame."""


@dataclass(frozen=True)
class _SampledClips:
    """The clips that a rank sampled.

    Attributes:
        prediction, truth: uint8 `[b, T, h, w, 3]`, given frames first; the truth may be known for fewer frames.
        scores: float64 `[sources, 3, b, frames]`: mean squared error, SSIM and LPIPS of new frames with a truth.
    """

    prediction: Pixels
    truth: Pixels
    scores: NDArray[np.float64]


class VideoSampler:
    """Samples the first held-out clips: rank r of W takes clips r, r + W, ...; rank 0 writes and scores all of them.

    Args:
        run: the run directory.
        sampling: the settings.
        dtype: of the computation.
        metadata: of the model that is trained.
        clips: how many to sample.
        opened: the autoencoder and the clips, on the ranks that sample; None on the others.
        processes: all ranks.
        events: log of failures.

    Attributes:
        without_lpips: why there is no LPIPS, and the fix; None where there is.
    """

    def __init__(
        self,
        run: Path,
        sampling: SamplingConfig,
        dtype: torch.dtype,
        metadata: ModelMetadata,
        clips: int,
        opened: tuple[Autoencoder, Episodes] | None,
        processes: Processes,
        events: EventLog,
    ) -> None:
        self._run, self._sampling, self._dtype = run, sampling, dtype
        self._metadata, self._clips, self._processes, self._events = metadata, clips, processes, events
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

        The files are samples.mp4, samples.png and scores.json. A failure to sample or to write is logged as an event.

        Returns:
            On rank 0 the mean scores, and `video`, the MP4's path in the run directory (None if it could not be
            written); None on the other ranks, and where the model gives numbers that are not finite.
        """
        state = gather_ema(engine, ema, self._dtype, keep=self._opened is not None)
        result: _SampledClips | str | None = None
        if self._opened is not None:
            model = empty_model(stage.config).eval()
            model.load_state_dict(state, assign=True)
            autoencoder, clips = self._opened
            rollout = Rollout(model, self._metadata, autoencoder, clips, self._sampling)
            try:
                result = self._sample(rollout, beat)
            except UserError as error:
                result = str(error)
        parts: list[Any] = [None] * self._processes.world_size
        dist.gather_object(result, parts if self._processes.is_main_process else None, group=self._processes.host_group)
        if not self._processes.is_main_process:
            return None
        if (problem := next((part for part in parts if isinstance(part, str)), None)) is not None:
            self._events.emit("validation-failed", step, f"step {step}: no samples: {problem}")
            return None
        return self._write(step, rollout, _merge_ranks(parts), beat)

    def _sample(self, rollout: Rollout, beat: Callable[[], None]) -> _SampledClips:
        clips = slice(self._processes.rank, None, self._processes.world_size)
        prediction, truth, scores = [], [], []
        for frame in rollout.frames(clips, progress=False):
            prediction.append(to_uint8(frame.pixels))
            if frame.truth is not None:
                truth.append(to_uint8(frame.truth))
            if frame.truth is not None and frame.baseline is not None:
                scores.append([self._score(pixels, frame.truth) for pixels in (frame.pixels, frame.baseline)])
            beat()
        frames = np.stack(prediction, axis=1)
        table = np.array(scores).transpose(1, 2, 3, 0) if scores else np.empty((len(SOURCES), 3, len(frames), 0))
        return _SampledClips(frames, np.stack(truth, axis=1) if truth else frames[:, :0], table)

    def _score(self, pixels: Tensor, truth: Tensor) -> NDArray[np.float64]:
        """`[3, b]`: mean squared error, SSIM and LPIPS of frames `[b, 3, h, w]`; LPIPS is NaN without its network."""
        mse = frame_mse(pixels, truth)
        lpips = torch.full_like(mse, torch.nan)
        if self._lpips is not None:
            device = self._processes.device
            lpips = self._lpips(pixels.to(device), truth.to(device)).double().cpu()
        return torch.stack([mse, frame_ssim(pixels, truth).double(), lpips]).numpy()

    def _write(self, step: int, rollout: Rollout, sampled: _SampledClips, beat: Callable[[], None]) -> dict[str, Any]:
        folder = self._run / "validation" / f"step-{step:08d}"
        means = _mean_scores(sampled.scores)
        clip_scores = [_mean_scores(sampled.scores[:, :, [clip]]) for clip in range(self._clips)]
        report = {
            "step": step,
            **rollout.settings(),
            **rollout.truth_settings(),
            **means,
            "clips": [{"key": key, **scores} for key, scores in zip(rollout.episodes.keys, clip_scores, strict=True)],
        }

        def pictures() -> Iterator[tuple[int, Pixels | None, Pixels]]:
            for index in range(sampled.prediction.shape[1]):
                known = index < sampled.truth.shape[1]
                yield index, sampled.truth[:, index] if known else None, sampled.prediction[:, index]
                beat()

        video = folder / "samples.mp4"
        try:
            write_pictures(
                rollout.grid_spec(self._clips), pictures(), rollout.episodes.fps, video, folder / "samples.png"
            )
            write_json(folder / "scores.json", report)
        except (UserError, OSError) as error:
            self._events.emit("validation-failed", step, f"step {step}: the samples cannot be written: {error}")
            return {**means, "video": None}
        return {**means, "video": str(video.relative_to(self._run))}

    def _load_lpips(self, downsample: int) -> str | None:
        """Load the network; returns why there is none, or None."""
        _, height, width = self._metadata.latent_shape
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
        dtype: of the computation.

    Raises:
        UserError: on all ranks alike: the autoencoder is missing, or a clip has too few frames.
    """
    assert recipe.validation is not None
    manifest, section = shards.manifest, recipe.sample
    sampling = SamplingConfig.from_section(section, recipe.sample_frames(), recipe.seed)
    metadata = ModelMetadata(
        autoencoder=manifest.autoencoder,
        scaling=scaling,
        latent_shape=manifest.latent_shape,
        fps=manifest.fps,
        frame_stride=recipe.data.frame_stride,
        classes=manifest.classes,
        training=TrainingMetadata(step=0, recipe_hash=recipe.hash(), weights="ema", far_scale=far_scale.__version__),
    )
    clips = min(recipe.validation.sample_clips, sum(shards.samples_per_shard))
    selection = EpisodeSelection(section.given, sampling.frames, clips, sampling.conditioned)

    def open_clips() -> tuple[Autoencoder, Episodes]:
        autoencoder = load_autoencoder(metadata, processes.device)
        return autoencoder, load_shard_episodes(shards, stage.config, metadata, autoencoder, selection)

    opened = all_ranks_or_raise(lambda: open_clips() if processes.rank < clips else None, processes)
    return VideoSampler(Path(recipe.run_dir), sampling, dtype, metadata, clips, opened, processes, events)


def gather_ema(engine: Any, ema: ShardedEMA, dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
    """The state dict of the model with the EMA's weights, in `dtype`; all ranks call it.

    Parameters are gathered one by one, so that no rank ever holds the whole model in float32.

    Args:
        keep: whether this rank keeps the parameters; otherwise it only sends its part, and gets the buffers.
    """
    parts = {fragment.name: (fragment, part) for fragment, part in zip(fragments(engine), ema.weights, strict=True)}
    state = {name: buffer.detach().to(dtype) for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        whole = torch.zeros(whole_shape(parameter), dtype=dtype, device=engine.device)
        if name in parts:
            fragment, part = parts[name]
            whole.view(-1)[fragment.offset : fragment.offset + len(part)] = part.to(dtype)
        if engine.zero_optimization_stage() > 0:
            dist.all_reduce(whole)  # exact: all ranks but one have 0
        if keep:
            state[name] = whole
    return state


def _merge_ranks(parts: Sequence[_SampledClips | None]) -> _SampledClips:
    """All clips in order, from the W ranks' parts, where rank r has clips r, r + W, ..."""
    sampled = [part for part in parts if part is not None]
    order = np.argsort(
        np.concatenate([np.arange(len(part.prediction)) * len(parts) + r for r, part in enumerate(sampled)])
    )
    return _SampledClips(
        np.concatenate([part.prediction for part in sampled])[order],
        np.concatenate([part.truth for part in sampled])[order],
        np.concatenate([part.scores for part in sampled], axis=2)[:, :, order],
    )


def _mean_scores(table: NDArray[np.float64]) -> dict[str, Any]:
    """`psnr`, `ssim` and `lpips` of each source, from `[sources, 3, clips, frames]`; None where unknown.

    PSNR is that of the mean squared error over all frames, the others are means over the frames, as in `QualityMeter`.
    """
    means: dict[str, Any] = {}
    for source, (mse, ssim, lpips) in zip(SOURCES, table, strict=True):
        values = (psnr(mse.mean()), ssim.mean(), lpips.mean()) if mse.size else (math.nan,) * 3
        finite = [float(value) if math.isfinite(value) else None for value in values]
        means[source] = dict(zip(("psnr", "ssim", "lpips"), finite, strict=True))
    return means
