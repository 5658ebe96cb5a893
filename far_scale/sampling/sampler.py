"""Euler sampling: from noise to new frames, frame by frame, or all frames at once in a model that is not causal.

The flow runs from noise at sigma 1 to data at sigma 0, and the model predicts the velocity noise - data, so one
Euler step from sigma to sigma' < sigma is x += (sigma' - sigma) * velocity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from far_scale.model import FAR
from far_scale.sampling.cache import bytes_needed
from far_scale.sampling.config import TRAIN_TIMESTEPS, SamplingConfig
from far_scale.sampling.denoisers import guided
from far_scale.sampling.noise import euler_sigmas, frame_noise
from far_scale.sampling.session import Session, check_finite, check_frames, class_rows
from far_scale.utils.errors import UserError


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
    config, frames, guidance = model.config, sampling.frames, sampling.guidance
    sampling.check(config)
    check_frames(config, context)
    if not config.causal and context.shape[1] + frames > config.window:
        raise UserError(
            f"frames: {context.shape[1]} given and {frames} new ones do not fit the window of {config.window} "
            "of a model that is not causal; ask for fewer"
        )
    batch, given, *frame_shape = context.shape
    clips = list(range(batch)) if clip_ids is None else list(clip_ids)
    if len(clips) != batch or min(clips) < 0:
        raise UserError(f"clip_ids: {clips} is not one number from 0 up for each of the {batch} clips")

    device = model.patch_embedding.weight.device
    # Checked for the whole clip, before the first frame.
    action_rows = class_rows("actions", actions, config.actions, (batch, given + frames), guidance, device)
    label_rows = class_rows("labels", labels, config.labels, (batch,), guidance, device)

    if not config.causal:
        noise = [
            torch.stack([frame_noise(sampling.seed, clip, frame, frame_shape) for clip in clips])
            for frame in range(given + frames)
        ]
        together = torch.stack(noise, dim=1).to(device)
        sigmas = euler_sigmas(sampling.steps, sampling.grid)
        joint = _denoise_jointly(model, context.to(together), together, sigmas, sampling, action_rows, label_rows)
        for index, latents in enumerate(joint, start=given):
            check_finite(latents, index, guidance)
            yield latents
        return

    classes = None if guidance == -1 else actions
    if labels is not None and guidance != -1:
        classes = labels[:, None].expand(-1, given + frames)
    session = Session(model, sampling, (frame_shape[1], frame_shape[2]), clips, max_frames=given + frames)
    session.start(context, None if classes is None else classes[:, :given])
    for frame in tqdm(range(given, given + frames), desc="sampling", unit="frame", disable=not progress):
        yield session.step(None if classes is None else classes[:, frame])


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
        x = x + (next_sigma - sigma) * guided(velocity, sampling.guidance)
    yield from x[:, frames:].unbind(1)


def cache_bytes(model: FAR, sampling: SamplingConfig, clips: int, frames: int, size: tuple[int, int]) -> int:
    """Memory of the KV cache for `clips` clips of `frames` frames, given and new ones.

    0 for a model that is not causal: it denoises all frames together.
    """
    if not model.config.causal:
        return 0
    rows, dtype = clips * sampling.batch_copies, model.patch_embedding.weight.dtype
    return bytes_needed(model.config, rows, frames, size, sampling.window_stride, sampling.context_frames, dtype)
