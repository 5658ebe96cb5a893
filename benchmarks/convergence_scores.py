"""Scores of a model's predictions of held-out episodes against the truth, clip by clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Row
from torch import Tensor

from far_scale.convert.model_dir import load_model_dir
from far_scale.data.video.find import find_videos
from far_scale.data.video.videos import read_video
from far_scale.evaluation.metric_networks import LPIPS
from far_scale.evaluation.rollouts.episodes import decode_frame
from far_scale.evaluation.rollouts.psnr_ssim import frame_ssim, psnr
from far_scale.evaluation.rollouts.runner import prepare_rollout
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.sampler import cache_bytes, roll_out

SAMPLING_SEED = 0
_CLIPS_AT_ONCE = 16


@dataclass(frozen=True)
class Scoring:
    """What is given and what is predicted of an episode."""

    given: int
    frames: int
    context_noise: float = 0.0


class Score(NamedTuple):
    """One number a clip, each a mean over its predicted frames; pixels in 0..1.

    Attributes:
        cache_mb: of keys and values that sampling keeps of a clip.
    """

    lpips: list[float]
    mse: list[float]
    ssim: list[float]
    cache_mb: float = 0.0

    def psnr(self) -> float:
        """Of the mean squared error over all clips."""
        return psnr(sum(self.mse) / len(self.mse))


class Held:
    """Held-out episodes.

    Args:
        source: a folder of videos, or a shard set.
        episodes: how many of them.
        steps: Euler steps.
        lpips: the network.
    """

    def __init__(self, source: Path, episodes: int, steps: int, lpips: LPIPS) -> None:
        self.source, self._episodes, self._steps, self._lpips = source, episodes, steps, lpips

    def settings(self) -> dict[str, Any]:
        """What scores depend on beside the weights and the scoring."""
        return {"episodes": self._episodes, "steps": self._steps}

    def score(self, model_dir: Path, scoring: Scoring) -> Score:
        """Of a model directory's model, in float32 on the CPU."""
        model, metadata = load_model_dir(model_dir, "cpu", dtype=torch.float32)
        sampling = SamplingConfig(scoring.frames, self._steps, 1.0, SAMPLING_SEED, scoring.context_noise)
        rollout = prepare_rollout(model, metadata, self.source, sampling, scoring.given, self._episodes)
        data, found = rollout.episodes, Score([], [], [])
        for start in range(0, len(data.keys), _CLIPS_AT_ONCE):
            clips = slice(start, min(start + _CLIPS_AT_ONCE, len(data.keys)))
            frames = roll_out(
                model,
                data.context[clips],
                sampling,
                actions=None if data.actions is None else data.actions[clips],
                clip_ids=range(clips.start, clips.stop),
            )
            truth = [data.truth.frame(clips, scoring.given + index) for index in range(scoring.frames)]
            pixels = [
                decode_frame(rollout.autoencoder, metadata.scaling.restore(latents)).clamp(0, 1)
                for latents in frames.unbind(1)
            ]
            self._add(found, pixels, truth)
        size = (metadata.latent_shape[1], metadata.latent_shape[2])
        cache = cache_bytes(model, SamplingConfig(scoring.frames, 1), 1, scoring.given + scoring.frames, size)
        return found._replace(cache_mb=cache / 1e6)

    def repeated(self, scoring: Scoring) -> Score:
        """Of the last given frame, shown for every new one."""
        found = Score([], [], [])
        for file in find_videos(self.source)[: self._episodes]:
            video = torch.from_numpy(read_video(file).frames[: scoring.given + scoring.frames])
            frames = video.permute(0, 3, 1, 2).unsqueeze(1).float() / 255  # [F, 1, 3, h, w]
            last, truth = frames[scoring.given - 1], frames[scoring.given :]
            self._add(found, [last] * len(truth), list(truth))
        return found

    def _add(self, found: Score, pixels: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
        """Frames `[B, 3, h, w]` of some clips, one after the other."""
        of_frames = [
            torch.stack([self._lpips(a, b), (a - b).square().mean((1, 2, 3)), frame_ssim(a, b)])
            for a, b in zip(pixels, truth, strict=True)
        ]
        for metric, values in zip(found[:3], torch.stack(of_frames).mean(0).tolist(), strict=True):
            metric.extend(values)


def repeat_last(held: Held, scorings: Sequence[Scoring]) -> list[Row]:
    """The baseline's rows."""
    rows: list[Row] = []
    for scoring in scorings:
        score = held.repeated(scoring)
        lpips, ssim = (sum(values) / len(values) for values in (score.lpips, score.ssim))
        rows.append(
            {"side": "last given frame", "given": scoring.given, "LPIPS": lpips, "PSNR": score.psnr(), "SSIM": ssim}
        )
    return rows
