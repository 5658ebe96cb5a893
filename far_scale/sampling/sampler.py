"""Euler sampling: from noise to new frames, frame by frame, or all frames at once in a model that is not causal.

The flow runs from noise at sigma 1 to data at sigma 0, and the model predicts the velocity noise - data, so one
Euler step from sigma to sigma' < sigma is x += (sigma' - sigma) * velocity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from far_scale.model import FAR, FARConfig
from far_scale.sampling.cache import MultiLevelCache
from far_scale.sampling.config import TRAIN_TIMESTEPS, SamplingConfig
from far_scale.sampling.denoisers import CachedDenoiser, Denoiser, UncachedDenoiser
from far_scale.train.flow_matching import CLEAN
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator


def euler_sigmas(steps: int) -> Tensor:
    """The noise levels of `steps` Euler steps, `[steps + 1]` float32: evenly spaced from 1 to 1/1000, then 0.

    The same as those of diffusers' FlowMatchEulerDiscreteScheduler with shift 1, which the official pipeline uses.
    """
    evenly = np.linspace(1.0, 1.0 / TRAIN_TIMESTEPS, steps)
    return torch.from_numpy(np.append(evenly, 0.0)).float()


def frame_noise(seed: int, clip_id: int, frame: int, shape: Sequence[int], purpose: str = "sample") -> Tensor:
    """The noise of one frame of one clip, float32 of `shape`, on the CPU; `frame` counts from 0.

    It depends on nothing else, so neither batch nor device changes a clip. The purpose is "sample" for the noise that a
    frame starts from, and "context noise" for the noise that `context_noise` adds to a finished frame.
    """
    draw = generator(seed, purpose, step=frame, lane=clip_id)
    return torch.from_numpy(draw.standard_normal(tuple(shape), dtype=np.float32))


@torch.no_grad()
def roll_out(
    model: FAR,
    context: Tensor,
    sampling: SamplingConfig,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    clip_ids: Sequence[int] | None = None,
    progress: bool = False,
) -> Tensor:
    """All frames of `predict_frames`, `[B, F, C, H, W]`; same arguments and errors."""
    return torch.stack(list(predict_frames(model, context, sampling, actions, labels, clip_ids, progress)), dim=1)


@torch.no_grad()
def predict_frames(
    model: FAR,
    context: Tensor,
    sampling: SamplingConfig,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    clip_ids: Sequence[int] | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Predict the frame latents that follow `context`, one after the other.

    The given and the already predicted frames are clean. In a clip longer than the model's window, earlier frames
    become coarse context; a window-only model drops them, and its frame indices restart at 0 with the oldest frame in
    the window.

    A model that is not causal denoises all frames of the clip together, with one sigma for all of them. Given frames
    are inserted by the replacement method (Ho et al. 2022, 'Video Diffusion Models', arXiv 2204.03458, section 3.1):
    before every step they are set to sigma * noise + (1 - sigma) * frame, with the same noise in every step. The new
    frames are yielded in order when all are done.

    Args:
        model: computes in its parameters' dtype and on their device; the state x stays in float32.
        context: `[B, G, C, H, W]` scaled latents of the given frames; G may be 0.
        sampling: the sampling settings.
        actions: `[B, G + F]` integers, the action that led to each frame; only for a model with actions.
        labels: `[B]` integers, one per clip; only for a model with labels.
        clip_ids: one number per clip, which with the seed determines its noise; default 0 ... B - 1.
        progress: show a progress bar of the frames.

    Yields:
        `[B, C, H, W]` float32 scaled latents of one frame, on the model's device.

    Raises:
        UserError: shapes, conditions or settings do not fit the model, or predicted latents are not finite.
    """
    given = context.shape[1] if context.ndim > 1 else 0
    predicted = _predict_frames(model, context, sampling, actions, labels, clip_ids, progress)
    for index, latents in enumerate(predicted, start=given):
        if not latents.isfinite().all():
            raise UserError(
                f"frame {index}: the predicted latents are not finite at guidance {sampling.guidance:g}; lower "
                "the guidance, or take the weights of an earlier step"
            )
        yield latents


@torch.no_grad()
def _predict_frames(
    model: FAR,
    context: Tensor,
    sampling: SamplingConfig,
    actions: Tensor | None,
    labels: Tensor | None,
    clip_ids: Sequence[int] | None,
    progress: bool,
) -> Iterator[Tensor]:
    config, frames, guidance, context_noise = model.config, sampling.frames, sampling.guidance, sampling.context_noise
    sampling.check(config)
    _check_context(config, context, frames)
    batch, given, *frame_shape = context.shape
    clips = list(range(batch)) if clip_ids is None else list(clip_ids)
    if len(clips) != batch or min(clips) < 0:
        raise UserError(f"clip_ids: {clips} is not one number from 0 up for each of the {batch} clips")

    device = model.patch_embedding.weight.device
    action_rows = _condition_rows("actions", actions, config.actions, (batch, given + frames), guidance, device)
    label_rows = _condition_rows("labels", labels, config.labels, (batch,), guidance, device)
    copies = sampling.batch_copies
    sigmas = euler_sigmas(sampling.steps)
    timesteps = (sigmas[:-1] * TRAIN_TIMESTEPS).to(device)
    sigma_steps = (sigmas[1:] - sigmas[:-1]).tolist()

    def draw_noise(frame: int, purpose: str = "sample") -> Tensor:
        return torch.stack([frame_noise(sampling.seed, clip, frame, frame_shape, purpose) for clip in clips]).to(device)

    if not config.causal:
        noise = torch.stack([draw_noise(frame) for frame in range(given + frames)], dim=1)
        yield from _denoise_jointly(model, context.to(noise), noise, sigmas, sampling, action_rows, label_rows)
        return

    seen_timestep = TRAIN_TIMESTEPS * context_noise if context_noise else CLEAN
    denoiser: Denoiser = UncachedDenoiser(model, timesteps, copies, seen_timestep)
    if sampling.use_cache:
        size = (frame_shape[1], frame_shape[2])
        denoiser = CachedDenoiser(model, timesteps, copies, batch, given + frames, size, seen_timestep)

    clean = torch.empty(batch, given + frames, *frame_shape, device=device)
    clean[:, :given] = context
    seen = torch.empty_like(clean) if context_noise else clean

    def add_context_noise(frame: int) -> None:
        if context_noise:
            noise = draw_noise(frame, "context noise")
            seen[:, frame] = context_noise * noise + (1 - context_noise) * clean[:, frame]

    for frame in range(given):
        add_context_noise(frame)
    for frame in tqdm(range(given, given + frames), desc="sampling", unit="frame", disable=not progress):
        actions_so_far = None if action_rows is None else action_rows[:, : frame + 1]
        denoiser.begin_frame(clean[:, :frame], seen[:, :frame], actions_so_far, label_rows)
        x = draw_noise(frame)
        for step, sigma_step in enumerate(sigma_steps):
            x = x + sigma_step * _guided(denoiser.velocity(x, step), guidance)
        clean[:, frame] = x
        add_context_noise(frame)
        yield x


def _guided(velocity: Tensor, guidance: float) -> Tensor:
    """One velocity per clip, combined from those of the null class and of the condition; unchanged without guidance."""
    if guidance <= 1:
        return velocity
    null, conditioned = velocity.chunk(2)
    return null + guidance * (conditioned - null)


def _denoise_jointly(
    model: FAR,
    given: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    sampling: SamplingConfig,
    actions: Tensor | None,
    labels: Tensor | None,
) -> Iterator[Tensor]:
    """The frames after the given ones `[B, G, C, H, W]`, all denoised at once from noise `[B, G + F, C, H, W]`."""
    x, dtype = noise, model.patch_embedding.weight.dtype
    copies, frames = sampling.batch_copies, given.shape[1]
    for sigma, next_sigma in itertools.pairwise(sigmas.tolist()):
        x = torch.cat([sigma * noise[:, :frames] + (1 - sigma) * given, x[:, frames:]], dim=1)
        timesteps = x.new_full((copies * len(x), x.shape[1]), sigma * TRAIN_TIMESTEPS)
        velocity = model(x.to(dtype).repeat(copies, 1, 1, 1, 1), timesteps, actions, labels).float()
        x = x + (next_sigma - sigma) * _guided(velocity, sampling.guidance)
    yield from x[:, frames:].unbind(1)


def cache_bytes(model: FAR, clips: int, frames: int, size: tuple[int, int], guidance: float = 1.0) -> int:
    """Memory of the KV cache for `clips` clips of `frames` frames, given and new ones.

    0 for a model that is not causal: it denoises all frames together.
    """
    if not model.config.causal:
        return 0
    rows = clips * (2 if guidance > 1 else 1)
    return MultiLevelCache.bytes_needed(model.config, rows, frames, size, model.patch_embedding.weight.dtype)


def _condition_rows(
    name: str, classes: Tensor | None, count: int, shape: tuple[int, ...], guidance: float, device: torch.device
) -> Tensor | None:
    """The class indices of the model's batch, rows of the null class before conditioned ones; None without classes.

    `count` is the model's number of classes, which is also the index of its null class.
    """
    if count == 0:
        if classes is not None:
            raise UserError(f"{name}: the model was trained without {name}; leave them out")
        return None
    null = torch.full(shape, count, dtype=torch.int64, device=device)
    if guidance == -1:
        return null
    if classes is None:
        raise UserError(f"{name}: the model needs {name} of shape {list(shape)}; give them, or sample with guidance -1")
    if tuple(classes.shape) != shape:
        raise UserError(f"{name}: the shape is {list(classes.shape)}, needed is {list(shape)}")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise UserError(f"{name}: the dtype is {classes.dtype}, needed are integers (torch.int64)")
    if classes.min() < 0 or classes.max() >= count:
        raise UserError(
            f"{name}: classes {int(classes.min())} to {int(classes.max())} were given; the model has 0 to {count - 1}"
        )
    conditioned = classes.to(device, torch.int64)
    return torch.cat([null, conditioned]) if guidance > 1 else conditioned


def _check_context(config: FARConfig, context: Tensor, frames: int) -> None:
    """Raises UserError where context latents do not fit the model."""
    if context.ndim != 5 or context.shape[0] < 1 or context.shape[2] != config.channels:
        expected = f"[clips, given frames, {config.channels}, height, width]"
        raise UserError(f"context: the shape is {list(context.shape)}, needed is {expected}")
    largest = max(config.patch, config.context_patch)
    if context.shape[3] % largest or context.shape[4] % largest:
        raise UserError(f"context: {list(context.shape[3:])} cannot be cut into patches of {largest}")
    if not config.causal and context.shape[1] + frames > config.window:
        raise UserError(
            f"frames: {context.shape[1]} given and {frames} new ones do not fit the window of {config.window} "
            "of a model that is not causal; ask for fewer"
        )
