"""Euler sampling: from noise to new frames, one frame after the other, or all together in a model that is not causal.

The flow runs from noise at sigma 1 to data at sigma 0, and the model predicts the velocity noise - data, so one
Euler step from sigma to sigma' < sigma is x += (sigma' - sigma) * velocity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from far_scale.model import FAR, FARConfig
from far_scale.sampling.cache import MultiLevelCache
from far_scale.sampling.denoisers import CachedDenoiser, Denoiser, UncachedDenoiser
from far_scale.train.flow_matching import CLEAN
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

TRAIN_TIMESTEPS = 1000


def euler_sigmas(steps: int) -> Tensor:
    """The noise levels of `steps` Euler steps, `[steps + 1]` float32: evenly from 1 to 1/1000, then 0.

    They are those of diffusers' FlowMatchEulerDiscreteScheduler with shift 1, which the official pipeline uses.
    """
    evenly = np.linspace(1.0, 1.0 / TRAIN_TIMESTEPS, steps)
    return torch.from_numpy(np.append(evenly, 0.0)).float()


def check_steps(steps: int) -> None:
    """Refuse numbers of Euler steps that make no difference to each other.

    Raises:
        UserError: it is not from 1 to the number of timesteps that the model was trained on.
    """
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise UserError(f"steps={steps}: 1 to {TRAIN_TIMESTEPS} Euler steps a frame can be taken")


def frame_noise(seed: int, clip_id: int, frame: int, shape: Sequence[int], purpose: str = "sample") -> Tensor:
    """The starting noise of one frame of one clip, float32 of `shape`, on the CPU; `frame` counts from 0.

    It depends on nothing else, so neither the batch nor the device changes what a clip becomes. The noise that
    `context_noise` adds to a finished frame is that of another `purpose`, "context noise".
    """
    draw = generator(seed, purpose, step=frame, lane=clip_id)
    return torch.from_numpy(draw.standard_normal(tuple(shape), dtype=np.float32))


@torch.no_grad()
def roll_out(
    model: FAR,
    context: Tensor,
    frames: int,
    steps: int,
    guidance: float = 1.0,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    clip_ids: Sequence[int] | None = None,
    progress: bool = False,
    cache: bool = True,
    context_noise: float = 0.0,
) -> Tensor:
    """All of `predict_frames`' frames, `[B, F, C, H, W]`; arguments and errors as there."""
    predicted = predict_frames(
        model, context, frames, steps, guidance, actions, labels, seed, clip_ids, progress, cache, context_noise
    )
    return torch.stack(list(predicted), dim=1)


@torch.no_grad()
def predict_frames(
    model: FAR,
    context: Tensor,
    frames: int,
    steps: int,
    guidance: float = 1.0,
    actions: Tensor | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    clip_ids: Sequence[int] | None = None,
    progress: bool = False,
    cache: bool = True,
    context_noise: float = 0.0,
) -> Iterator[Tensor]:
    """Predict the `frames` frame latents that follow `context`, one after the other.

    The given and the already predicted frames are clean. A clip longer than the model's window keeps its earlier
    frames as coarse context in a model with context; a window-only model forgets them, and the frame indices of its
    sliding window restart at 0 with the oldest frame it still sees.

    A model that is not causal denoises all frames of the clip together, with one sigma for all of them. Given frames
    are put in by the replacement method (Ho et al. 2022, 'Video Diffusion Models', arXiv 2204.03458, section 3.1):
    before every step they are set to sigma * noise + (1 - sigma) * frame, with a noise of their own that stays the
    same. The new frames are yielded in order once all are done.

    Args:
        model: its parameters' dtype and device are those of the computation; the state x stays in float32.
        context: `[B, G, C, H, W]` scaled latents of the given frames; G may be 0.
        frames: how many frames to predict, F.
        steps: Euler steps a frame, or a clip in a model that is not causal; each runs the model once (on twice the
            batch with guidance).
        guidance: above 1, classifier-free guidance: null + guidance * (conditioned - null); 1, conditioned only
            (or a model without conditions); -1, the null class only.
        actions: `[B, G + F]` integers, the action that led to each frame; for a model with actions, and only there.
        labels: `[B]` integers, one a clip; for a model with labels, and only there.
        seed: names the noise, together with `clip_ids`.
        clip_ids: one number a clip, 0 ... B - 1 unless given.
        progress: show a progress bar of the frames.
        cache: keep keys and values of clean frames (see `cache_bytes`); without, every step recomputes them. Nothing
            is kept in a model that is not causal.
        context_noise: share s of noise in the frames that a new one sees in its window, given ones and predicted ones:
            they are s * noise + (1 - s) * frame with timestep 1000 s, as by `objective.context_noise`; 0 for clean
            frames. The frames that are yielded, and coarse context, are without.

    Yields:
        `[B, C, H, W]` float32 scaled latents of one frame, on the model's device.

    Raises:
        UserError: shapes, conditions, guidance or context noise that do not fit the model.
    """
    config = model.config
    _check_sizes(config, context, frames, steps)
    check_context_noise(config, context_noise)
    batch, given, *frame_shape = context.shape
    clips = list(range(batch)) if clip_ids is None else list(clip_ids)
    if len(clips) != batch or min(clips) < 0:
        raise UserError(f"clip_ids: {clips} is not one number from 0 up for each of the {batch} clips")
    check_guidance(config, guidance)

    device = model.patch_embedding.weight.device
    action_rows = _condition_rows("actions", actions, config.actions, (batch, given + frames), guidance, device)
    label_rows = _condition_rows("labels", labels, config.labels, (batch,), guidance, device)
    copies = 2 if guidance > 1 else 1
    sigmas = euler_sigmas(steps)
    timesteps = (sigmas[:-1] * TRAIN_TIMESTEPS).to(device)
    sigma_steps = (sigmas[1:] - sigmas[:-1]).tolist()

    def noise(frame: int, purpose: str = "sample") -> Tensor:
        return torch.stack([frame_noise(seed, clip, frame, frame_shape, purpose) for clip in clips]).to(device)

    if not config.causal:
        every = torch.stack([noise(frame) for frame in range(given + frames)], dim=1)
        yield from _denoise_together(model, context.to(every), every, sigmas, guidance, action_rows, label_rows)
        return

    seen_timestep = TRAIN_TIMESTEPS * context_noise if context_noise else CLEAN
    denoiser: Denoiser = UncachedDenoiser(model, timesteps, copies, seen_timestep)
    if cache:
        size = (frame_shape[1], frame_shape[2])
        denoiser = CachedDenoiser(model, timesteps, copies, batch, given + frames, size, seen_timestep)

    clean = torch.empty(batch, given + frames, *frame_shape, device=device)
    clean[:, :given] = context
    seen = torch.empty_like(clean) if context_noise else clean

    def put_noise(frame: int) -> None:
        if context_noise:
            seen[:, frame] = context_noise * noise(frame, "context noise") + (1 - context_noise) * clean[:, frame]

    for frame in range(given):
        put_noise(frame)
    for frame in tqdm(range(given, given + frames), desc="sampling", unit="frame", disable=not progress):
        actions_so_far = None if action_rows is None else action_rows[:, : frame + 1]
        denoiser.begin_frame(clean[:, :frame], seen[:, :frame], actions_so_far, label_rows)
        x = noise(frame)
        for step, sigma_step in enumerate(sigma_steps):
            x = x + sigma_step * _guided(denoiser.velocity(x, step), guidance)
        clean[:, frame] = x
        put_noise(frame)
        yield x


def _guided(velocity: Tensor, guidance: float) -> Tensor:
    """One velocity a clip out of the null class's and the conditioned ones; without guidance they are there already."""
    if guidance <= 1:
        return velocity
    null, conditioned = velocity.chunk(2)
    return null + guidance * (conditioned - null)


def _denoise_together(
    model: FAR,
    given: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    guidance: float,
    actions: Tensor | None,
    labels: Tensor | None,
) -> Iterator[Tensor]:
    """The frames after the given ones `[B, G, C, H, W]`, all denoised at once from noise `[B, G + F, C, H, W]`."""
    x, dtype = noise, model.patch_embedding.weight.dtype
    copies, frames = 2 if guidance > 1 else 1, given.shape[1]
    for sigma, next_sigma in itertools.pairwise(sigmas.tolist()):
        x = torch.cat([sigma * noise[:, :frames] + (1 - sigma) * given, x[:, frames:]], dim=1)
        timesteps = x.new_full((copies * len(x), x.shape[1]), sigma * TRAIN_TIMESTEPS)
        velocity = model(x.to(dtype).repeat(copies, 1, 1, 1, 1), timesteps, actions, labels).float()
        x = x + (next_sigma - sigma) * _guided(velocity, guidance)
    yield from x[:, frames:].unbind(1)


def cache_bytes(model: FAR, clips: int, frames: int, size: tuple[int, int], guidance: float = 1.0) -> int:
    """Memory that sampling's cache takes for `clips` clips of `frames` frames, given ones and new ones together.

    0 in a model that is not causal: its frames change together until all are done.
    """
    if not model.config.causal:
        return 0
    rows = clips * (2 if guidance > 1 else 1)
    return MultiLevelCache.bytes_needed(model.config, rows, frames, size, model.patch_embedding.weight.dtype)


def _condition_rows(
    what: str, classes: Tensor | None, count: int, shape: tuple[int, ...], guidance: float, device: torch.device
) -> Tensor | None:
    """The class indices of the model's batch, the null class' rows before the conditioned ones; None without classes.

    `count` is the model's number of classes, which is also the index of its null class.
    """
    if count == 0:
        if classes is not None:
            raise UserError(f"{what}: the model was trained without {what}; leave them away")
        return None
    null = torch.full(shape, count, dtype=torch.int64, device=device)
    if guidance == -1:
        return null
    if classes is None:
        raise UserError(f"{what}: the model needs {what} of shape {list(shape)}; give them, or sample with guidance -1")
    if tuple(classes.shape) != shape:
        raise UserError(f"{what}: the shape is {list(classes.shape)}, needed is {list(shape)}")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise UserError(f"{what}: the dtype is {classes.dtype}, needed are integers (torch.int64)")
    if classes.min() < 0 or classes.max() >= count:
        raise UserError(
            f"{what}: classes {int(classes.min())} to {int(classes.max())} were given; the model knows 0 to {count - 1}"
        )
    conditioned = classes.to(device, torch.int64)
    return torch.cat([null, conditioned]) if guidance > 1 else conditioned


def check_guidance(config: FARConfig, guidance: float) -> None:
    """Refuse a guidance that `predict_frames` cannot take.

    Raises:
        UserError: says which it can.
    """
    if guidance != 1 and guidance != -1 and not 1 < guidance < math.inf:
        raise UserError(f"guidance: {guidance:g} has no meaning; give 1 (none), more than 1, or -1 (null class only)")
    if guidance != 1 and not (config.actions or config.labels):
        raise UserError(f"guidance: {guidance:g} needs a model with actions or labels, and this one has none; give 1")


def check_context_noise(config: FARConfig, context_noise: float) -> None:
    """Refuse a context noise that `predict_frames` cannot take.

    Raises:
        UserError: says which it can.
    """
    if not 0 <= context_noise < 1:
        raise UserError(f"context_noise: {context_noise:g} is no share of noise; give one from 0 up to, not with, 1")
    if context_noise and not config.causal:
        raise UserError(
            f"context_noise: {context_noise:g}, but this model is not causal and sees no finished frames; give 0"
        )


def _check_sizes(config: FARConfig, context: Tensor, frames: int, steps: int) -> None:
    if frames < 1 or steps < 1:
        raise UserError(f"frames and steps must be 1 or more, given are {frames} and {steps}")
    if context.ndim != 5 or context.shape[0] < 1 or context.shape[2] != config.channels:
        wanted = f"[clips, given frames, {config.channels}, height, width]"
        raise UserError(f"context: the shape is {list(context.shape)}, needed is {wanted}")
    largest = max(config.patch, config.context_patch)
    if context.shape[3] % largest or context.shape[4] % largest:
        raise UserError(f"context: {list(context.shape[3:])} cannot be cut into patches of {largest}")
    if not config.causal and context.shape[1] + frames > config.window:
        raise UserError(
            f"frames: {context.shape[1]} given and {frames} new ones do not fit the window of {config.window} "
            "of a model that is not causal; ask for fewer"
        )
