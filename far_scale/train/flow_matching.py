"""The training objective: frame-wise flow matching with part of the frames given clean (arXiv 2503.19325, section 3).

Of every frame of a clip, as in the official trainer:

    u = sigmoid(mean + std * normal)          logit-normal (Esser et al., arXiv 2403.03206), or uniform in [0, 1)
    t = 1000 - floor(1000 u)                  in 1..1000;  s = t / 1000
    x_t = s * noise + (1 - s) * x             the model sees x_t and t
    target = noise - x

With probability `clean_frame_ratio` a frame is given clean instead (x itself, timestep -1) and has no loss. With
`context_noise` s > 0 such a frame is given as s * noise + (1 - s) * x, with timestep 1000 s, still without loss. All
this is of window frames: context frames are always clean, with timestep -2. A model that is not causal denoises a clip
as a whole: all frames take the timestep drawn for the clip's first one. All draws are functions of (seed, step, lane)
alone, so they depend neither on the rank that makes them nor on the kind of model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from far_scale.config.schema import ObjectiveSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FARConfig
from far_scale.model.layout import FrameLayout
from far_scale.utils.rng import generator

CLEAN = -1.0
CLEAN_CONTEXT = -2.0
TIMESTEPS = 1000


@dataclass(frozen=True)
class NoisyPack:
    """A pack as the model sees it, and what it should answer.

    Attributes:
        latents: `[F, C, H, W]` float32, noisy or clean frames of all clips.
        timesteps: `[F]` float32, 1..1000, or for a clean window frame -1 (1000 s with context noise s), for a context
            frame -2.
        target: `[Fw, C, H, W]` float32, noise - latent, of the window frames.
        has_loss: `[Fw]` bool, false for clean frames.
        actions: `[F]` int64 or None, with null classes where they were dropped.
        labels: `[B]` int64 or None, likewise.
        layout: which frame belongs to which clip.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    has_loss: Tensor
    actions: Tensor | None
    labels: Tensor | None
    layout: FrameLayout

    def to(self, device: torch.device) -> NoisyPack:
        """The same on `device`, with all of the layout that lies there; what is pinned is copied without waiting."""
        self.layout.tensors(device)
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> NoisyPack:
        """The same in memory that a GPU can read by itself, so that a copy there is not waited for."""
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All there are, the layout's with them."""
        own = (self.latents, self.timesteps, self.target, self.has_loss, self.actions, self.labels)
        return [tensor for tensor in own if tensor is not None] + self.layout.tensors(self.latents.device)

    def _each(self, change: Callable[[Tensor], Tensor]) -> NoisyPack:
        return NoisyPack(
            latents=change(self.latents),
            timesteps=change(self.timesteps),
            target=change(self.target),
            has_loss=change(self.has_loss),
            actions=None if self.actions is None else change(self.actions),
            labels=None if self.labels is None else change(self.labels),
            layout=self.layout,
        )


def add_noise(pack: Pack, objective: ObjectiveSection, config: FARConfig, seed: int) -> NoisyPack:
    """Draw timesteps, noise, clean frames and dropped conditions for `pack` by (seed, pack.step, pack.lane)."""
    height, width = pack.latents.shape[2:]
    layout = config.layout(pack.clip_frames, (height, width))
    rows = layout.window_rows(pack.latents.device)
    x = pack.latents[rows]
    frames = len(x)

    draw = generator(seed, "timesteps", pack.step, pack.lane)
    if objective.timesteps == "logit_normal":
        u = 1 / (1 + np.exp(-draw.normal(objective.logit_mean, objective.logit_std, frames)))
    else:
        u = draw.random(frames)
    # u rounds to 1 only where the normal draw exceeds 36; the official code would index past its table there.
    t = torch.from_numpy(TIMESTEPS - np.minimum(np.floor(u * TIMESTEPS), TIMESTEPS - 1)).float()
    if not config.causal:
        firsts = np.cumsum([0, *pack.clip_frames[:-1]])
        t = t[torch.from_numpy(firsts.repeat(pack.clip_frames))]

    clean_draw = generator(seed, "clean frames", pack.step, pack.lane).random(frames)
    clean = torch.from_numpy(clean_draw < objective.clean_frame_ratio)
    noise = torch.from_numpy(generator(seed, "noise", pack.step, pack.lane).standard_normal(x.shape, np.float32))

    s = (t / TIMESTEPS).view(-1, 1, 1, 1)
    given, given_timestep = x, CLEAN
    if objective.context_noise:
        given = objective.context_noise * noise + (1 - objective.context_noise) * x
        given_timestep = TIMESTEPS * objective.context_noise
    noisy = torch.where(clean.view(-1, 1, 1, 1), given, s * noise + (1 - s) * x)
    return NoisyPack(
        latents=pack.latents.index_copy(0, rows, noisy),
        timesteps=torch.full((layout.frames,), CLEAN_CONTEXT).index_copy_(
            0, rows, t.masked_fill(clean, given_timestep)
        ),
        target=noise - x,
        has_loss=~clean,
        actions=_drop(pack.actions, config.actions, config.condition_dropout, seed, pack),
        labels=_drop(pack.labels, config.labels, config.condition_dropout, seed, pack),
        layout=layout,
    )


def _drop(classes: Tensor | None, null: int, share: float, seed: int, pack: Pack) -> Tensor | None:
    """`classes` with a share replaced by the null class; None where the model takes none (null == 0)."""
    if classes is None or not null:
        return None
    dropped = generator(seed, "condition dropout", pack.step, pack.lane).random(len(classes)) < share
    return classes.masked_fill(torch.from_numpy(dropped), null)


def frame_errors(velocity: Tensor, noisy: NoisyPack) -> Tensor:
    """Mean squared error of each window frame, clean ones too: `[Fw]` float32; `velocity` is the model's answer."""
    return (velocity.float() - noisy.target).square().flatten(1).mean(1)


def pack_loss(velocity: Tensor, noisy: NoisyPack) -> Tensor:
    """Mean squared error of a frame, mean over the noisy frames of a clip, mean over the clips; float32 scalar.

    A clip whose frames all happen to be clean counts as a clip with loss 0, as officially.

    Args:
        velocity: `[Fw, C, H, W]`, the model's answer.
    """
    frame_error = frame_errors(velocity, noisy)
    weight = noisy.has_loss.float()
    clips = len(noisy.layout.clip_frames)
    # Sums by clip as a product with the membership matrix: index_add_ adds in no fixed order on a GPU (and one_hot
    # makes the host wait for it).
    clip_of_frame = noisy.layout.window.clip_of_frame(velocity.device)
    member = (clip_of_frame[:, None] == torch.arange(clips, device=velocity.device)).float()  # [Fw, B]
    return ((frame_error * weight) @ member / (weight @ member + 1e-9)).mean()
