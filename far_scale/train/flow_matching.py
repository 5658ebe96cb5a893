"""The training objective: frame-wise flow matching with randomly clean frames (arXiv 2503.19325, section 3).

For every frame of a clip, as in the official trainer:

    u = sigmoid(mean + std * normal)          logit-normal (Esser et al., arXiv 2403.03206), or uniform in [0, 1)
    t = 1000 - floor(1000 u)                  in 1..1000;  s = t / 1000
    x_t = s * noise + (1 - s) * x             the model sees x_t and t
    target = noise - x

With probability `clean_frame_ratio` a frame is clean instead (x itself, timestep -1) and has no loss. With
`context_noise` s > 0 the model sees s * noise + (1 - s) * x of such a frame, with timestep 1000 s, still without loss.
This holds for window frames; context frames are always clean, with timestep -2. A model that is not causal denoises a
clip as a whole: all frames take the timestep of the clip's first one. All draws are functions of (seed, step, lane)
only, so they depend neither on the rank nor on the kind of model.
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
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout
from far_scale.utils.rng import generator

CLEAN = -1.0
CLEAN_CONTEXT = -2.0
TIMESTEPS = 1000


@dataclass(frozen=True)
class NoisyPack:
    """A pack with noise, and the target of the model; with sequence parallelism, those frames that this rank holds.

    Attributes:
        latents: `[F, C, H, W]` float32, noisy or clean frames of all clips.
        timesteps: `[F]` float32: 1..1000; -1 for a clean window frame (1000 s with context noise s); -2 for a context
            frame.
        target: `[Fw, C, H, W]` float32, noise - latent, of the window frames.
        has_loss: `[Fw]` bool, false for clean frames.
        actions: `[F]` int64 or None, with the null class where dropped.
        labels: `[B]` int64 or None, likewise; of all clips of the pack.
        layout: layout of the pack.
        loss_frames: `[B]` float32, frames of each clip that have a loss, on all ranks; None if all are in this object.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    has_loss: Tensor
    actions: Tensor | None
    labels: Tensor | None
    layout: FrameLayout | ShardedLayout
    loss_frames: Tensor | None = None

    @property
    def whole_layout(self) -> FrameLayout:
        """The layout of the pack on all ranks that share it."""
        return self.layout.whole if isinstance(self.layout, ShardedLayout) else self.layout

    def shard(self, rank: SequenceRank) -> NoisyPack:
        """The frames of the pack that `rank` holds."""
        assert isinstance(self.layout, FrameLayout)
        layout = ShardedLayout(self.layout, rank)
        rows, window = layout.rows, layout.window_part
        return NoisyPack(
            latents=self.latents[rows],
            timesteps=self.timesteps[rows],
            target=self.target[window],
            has_loss=self.has_loss[window],
            actions=None if self.actions is None else self.actions[rows],
            labels=self.labels,
            layout=layout,
            loss_frames=self.has_loss.float() @ _membership(self.layout, self.has_loss.device),
        )

    def to(self, device: torch.device) -> NoisyPack:
        """A copy on `device`, without the layout's tensors; pinned memory is copied without a host sync."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> NoisyPack:
        """A copy in pinned memory, from which copies to the GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All tensors but those of the layout."""
        fields = (
            self.latents, self.timesteps, self.target, self.has_loss, self.actions, self.labels, self.loss_frames,
        )  # fmt: skip
        return [tensor for tensor in fields if tensor is not None]

    def _map(self, function: Callable[[Tensor], Tensor]) -> NoisyPack:
        return NoisyPack(
            latents=function(self.latents),
            timesteps=function(self.timesteps),
            target=function(self.target),
            has_loss=function(self.has_loss),
            actions=None if self.actions is None else function(self.actions),
            labels=None if self.labels is None else function(self.labels),
            layout=self.layout,
            loss_frames=None if self.loss_frames is None else function(self.loss_frames),
        )


def add_noise(pack: Pack, objective: ObjectiveSection, config: FARConfig, seed: int) -> NoisyPack:
    """Draw timesteps, noise, clean frames and dropped conditions of `pack` by (seed, pack.step, pack.lane)."""
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
    # u rounds to 1 only if the normal draw exceeds 36; the official code would index past its table then.
    t = torch.from_numpy(TIMESTEPS - np.minimum(np.floor(u * TIMESTEPS), TIMESTEPS - 1)).float()
    if not config.causal:
        firsts = np.cumsum([0, *pack.clip_frames[:-1]])
        t = t[torch.from_numpy(firsts.repeat(pack.clip_frames))]

    clean_draw = generator(seed, "clean frames", pack.step, pack.lane).random(frames)
    clean = torch.from_numpy(clean_draw < objective.clean_frame_ratio)
    noise = torch.from_numpy(generator(seed, "noise", pack.step, pack.lane).standard_normal(x.shape, np.float32))

    s = (t / TIMESTEPS).view(-1, 1, 1, 1)
    clean_latents, clean_timestep = x, CLEAN
    if objective.context_noise:
        clean_latents = objective.context_noise * noise + (1 - objective.context_noise) * x
        clean_timestep = TIMESTEPS * objective.context_noise
    noisy = torch.where(clean.view(-1, 1, 1, 1), clean_latents, s * noise + (1 - s) * x)
    return NoisyPack(
        latents=pack.latents.index_copy(0, rows, noisy),
        timesteps=torch.full((layout.frames,), CLEAN_CONTEXT).index_copy_(
            0, rows, t.masked_fill(clean, clean_timestep)
        ),
        target=noise - x,
        has_loss=~clean,
        actions=_drop_conditions(pack.actions, config.actions, config.condition_dropout, seed, pack),
        labels=_drop_conditions(pack.labels, config.labels, config.condition_dropout, seed, pack),
        layout=layout,
    )


def _drop_conditions(classes: Tensor | None, null: int, fraction: float, seed: int, pack: Pack) -> Tensor | None:
    """`classes` with a fraction replaced by the null class; None for a model without classes (null == 0)."""
    if classes is None or not null:
        return None
    dropped = generator(seed, "condition dropout", pack.step, pack.lane).random(len(classes)) < fraction
    return classes.masked_fill(torch.from_numpy(dropped), null)


def frame_errors(velocity: Tensor, noisy: NoisyPack) -> Tensor:
    """Mean squared error of each window frame, clean ones too: `[Fw]` float32; `velocity` is the model's output."""
    return (velocity.float() - noisy.target).square().flatten(1).mean(1)


def pack_loss(velocity: Tensor, noisy: NoisyPack) -> Tensor:
    """The mean squared error of a frame, averaged over a clip's noisy frames, then over the clips: float32 scalar.

    A clip whose frames are all clean counts with loss 0, as in the official code. With sequence parallelism it is this
    rank's part of the sum, times the number of ranks that share the pack: the mean over these ranks is the pack's loss,
    and since gradients are averaged over all ranks, so is their gradient.

    Args:
        velocity: `[Fw, C, H, W]`, the model's output.
    """
    layout, ranks = noisy.layout, 1
    if isinstance(layout, ShardedLayout):
        ranks, layout = layout.shard.size, layout.own
    weight, member = noisy.has_loss.float(), _membership(layout, velocity.device)
    loss_frames = weight @ member if noisy.loss_frames is None else noisy.loss_frames
    loss = ((frame_errors(velocity, noisy) * weight) @ member / (loss_frames + 1e-9)).mean()
    return loss if ranks == 1 else ranks * loss


def _membership(layout: FrameLayout, device: torch.device) -> Tensor:
    """`[Fw, B]` float32, 1 where a window frame belongs to a clip: sums per clip are products with it, since
    index_add_ is not deterministic on a GPU and one_hot makes the host wait."""
    clips = torch.arange(len(layout.clip_frames), device=device)
    return (layout.window.clip_of_frame(device)[:, None] == clips).float()
