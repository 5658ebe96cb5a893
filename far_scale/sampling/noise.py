"""Noise levels and noise of the denoising steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_scale.config.schema import Grid
from far_scale.sampling.config import TRAIN_TIMESTEPS
from far_scale.utils.rng import generator


def euler_sigmas(steps: int, grid: Grid = "official") -> Tensor:
    """The noise levels of `steps` Euler steps, `[steps + 1]` float32, from 1 to 0.

    Args:
        grid: "official": evenly spaced from 1 to 1/1000, then 0, as those of diffusers' FlowMatchEulerDiscreteScheduler
            with shift 1, which the official pipeline uses: the last step has almost no effect. "even": evenly spaced
            from 1 to 0.
    """
    if grid == "even":
        return torch.from_numpy(np.linspace(1.0, 0.0, steps + 1)).float()
    evenly = np.linspace(1.0, 1.0 / TRAIN_TIMESTEPS, steps)
    return torch.from_numpy(np.append(evenly, 0.0)).float()


def frame_noise(seed: int, clip_id: int, frame: int, shape: Sequence[int], purpose: str = "sample") -> Tensor:
    """The noise of one frame of one clip, float32 of `shape`, on the CPU; `frame` counts from 0.

    It depends on nothing else, so neither batch nor device changes a clip. The purpose is "sample" for the noise that a
    frame starts from, and "context noise" for the noise that `context_noise` adds to a finished frame.
    """
    draw = generator(seed, purpose, step=frame, lane=clip_id)
    return torch.from_numpy(draw.standard_normal(tuple(shape), dtype=np.float32))
