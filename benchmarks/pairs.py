"""One model in both codes, with the same random weights, and clips to run through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from official import OfficialCode
from torch import Tensor, nn

from far_scale.convert import official
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FAR, FARConfig

SIDE = 8  # of a frame latent, in latent pixels: 64 px through an autoencoder that shrinks eightfold, as on DMLab


@dataclass(frozen=True)
class Pair:
    """The official model and ours."""

    theirs: nn.Module
    ours: FAR


@dataclass(frozen=True)
class Clips:
    """Clips of equal length, with their conditions.

    Attributes:
        latents: `[B, F, C, H, W]` float32.
        actions: `[B, F]` int64, by an action-conditioned model only.
        labels: `[B]` int64, by a label-conditioned model only.
    """

    latents: Tensor
    actions: Tensor | None
    labels: Tensor | None

    @staticmethod
    def random(config: FARConfig, batch: int, frames: int, device: torch.device, seed: int = 0) -> Clips:
        draw = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch, frames, config.channels, SIDE, SIDE, generator=draw)
        actions = torch.randint(config.actions, (batch, frames), generator=draw) if config.actions else None
        labels = torch.randint(config.labels, (batch,), generator=draw) if config.labels else None
        return Clips(latents.to(device), *(None if x is None else x.to(device) for x in (actions, labels)))

    def null(self, config: FARConfig) -> Clips:
        """The same with the null class everywhere."""
        actions = None if self.actions is None else torch.full_like(self.actions, config.actions)
        labels = None if self.labels is None else torch.full_like(self.labels, config.labels)
        return replace(self, actions=actions, labels=labels)

    def pack(self, clip_frames: Sequence[int] | None = None) -> Pack:
        """The clips, or the first `clip_frames` frames of each, as a pack of the loader on the CPU."""
        batch, frames = self.latents.shape[:2]
        lengths = (frames,) * batch if clip_frames is None else tuple(clip_frames)

        def in_order(x: Tensor) -> Tensor:
            return torch.cat([clip[:n] for clip, n in zip(x.cpu(), lengths, strict=True)])

        return Pack(
            latents=in_order(self.latents),
            actions=None if self.actions is None else in_order(self.actions),
            labels=None if self.labels is None else self.labels.cpu(),
            clip_frames=lengths,
            keys=("",) * batch,
            lane=0,
            step=0,
            lane_state={},
        )

    def official_conditions(self, config: FARConfig) -> dict[str, Tensor] | None:
        """The conditions as the official code takes them.

        The official FAR-Long cuts actions even where it has none to embed, so it gets unused ones.
        """
        if self.actions is not None:
            return {"action": self.actions}
        if self.labels is not None:
            return {"label": self.labels}
        if config.context_patch:
            return {"action": torch.zeros(self.latents.shape[:2], dtype=torch.int64, device=self.latents.device)}
        return None


def random_pair(
    code: OfficialCode, config: FARConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Pair:
    """Both models with the same weights, all random, because both are initialised to output zero."""
    theirs = code.model(config)
    randomize(theirs)
    found, state = official.to_far_scale(theirs.state_dict(), window=config.window, patch=config.patch)
    assert replace(found, condition_dropout=config.condition_dropout) == config, "the converter found another shape"
    ours = FAR(config)
    ours.load_state_dict(state, strict=True)
    return Pair(theirs.to(device, dtype), ours.to(device, dtype))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near 1: std 1 / sqrt(inputs), norms around 1, biases small."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        tensor.normal_(generator=draw)
        if tensor.ndim == 2:
            tensor.mul_(tensor.shape[1] ** -0.5)
        else:
            tensor.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.5, generator=draw)
