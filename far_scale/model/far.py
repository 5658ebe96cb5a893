"""FAR: a transformer that denoises every frame of a video given all earlier ones (arXiv 2503.19325).

shape letters   B clips   F frames (of a clip, or of all clips of a pack)   C/H/W latent channels/height/width
                P tokens a frame   E width
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from far_scale.layout import FrameLayout
from far_scale.model.layers import HEAD_DIM, Block, Output, TimestepEmbedding, linear, rotations


@dataclass(frozen=True)
class FARConfig:
    """The shape of a FAR model.

    Attributes:
        layers: blocks.
        heads: attention heads of 64 dimensions; the width is heads * 64.
        patch: side of a window frame's patch, in latent pixels.
        channels: latent channels C.
        window: frames of a clip that are patchified finely; the longest clip a window-only model trains on.
        actions: classes of a frame's action, 0 for none; the null class is the index `actions`.
        labels: classes of a clip's label, 0 for none; the null class is the index `labels`.
        condition_dropout: share of conditions replaced by the null class in training.
    """

    layers: int
    heads: int
    patch: int = 1
    channels: int = 32
    window: int = 16
    actions: int = 0
    labels: int = 0
    condition_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "patch", "channels", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"FARConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.actions and self.labels:
            raise ValueError("FARConfig: a model is conditioned on actions or on labels, not on both")

    @property
    def width(self) -> int:
        """E = heads * 64."""
        return self.heads * HEAD_DIM

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FARConfig:
        """Raises ValueError for keys that are no fields."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model keys {sorted(unknown)}; known: {[field.name for field in fields(cls)]}")
        return cls(**values)


class FAR(nn.Module):
    """The model. Its weights start as officially: the output is exactly zero before the first step."""

    def __init__(self, config: FARConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        patch_channels = config.channels * config.patch**2
        self.patch_embedding = linear(patch_channels, config.width)
        self.timestep_embedding = TimestepEmbedding(config.width)
        self.condition_embedding = None
        if classes := config.actions or config.labels:
            self.condition_embedding = nn.Embedding(classes + 1, config.width)
            nn.init.normal_(self.condition_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config.heads) for _ in range(config.layers))
        self.output = Output(config.width, patch_channels)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        layout: FrameLayout | None = None,
    ) -> Tensor:
        """The velocity of every frame, d x_t / d (t/1000) = noise - latent at the optimum.

        Args:
            latents: `[B, F, C, H, W]` (noisy or clean frames), or with `layout` `[F, C, H, W]`, the frames of all
                clips of a pack, one clip after another.
            timesteps: `[B, F]` (or `[F]`): 0..1000 for the noise level, -1 for a clean frame.
            actions: `[B, F]` (or `[F]`) int64, by an action-conditioned model only.
            labels: `[B]` int64, by a label-conditioned model only.
            layout: the pack's order, for clips of different lengths.

        Returns:
            The velocity, shaped as `latents`, in the weights' precision.

        Raises:
            ValueError: shapes that do not fit together, or a condition that the model lacks or needs.
        """
        *batch, channels, height, width = latents.shape
        patch = self.config.patch
        if channels != self.config.channels or height % patch or width % patch:
            raise ValueError(
                f"latents {list(latents.shape)} do not fit {self.config.channels} channels in patches of {patch}"
            )
        if list(timesteps.shape) != batch:
            raise ValueError(f"timesteps must be {batch}, one a frame, got {list(timesteps.shape)}")
        grid = (height // patch, width // patch)
        if layout is None:
            clips, frames = batch
            layout = FrameLayout.window((frames,) * clips, grid)
        elif batch != [layout.frames]:
            raise ValueError(f"latents hold {batch} frames, the layout {layout.frames}")

        condition = F.silu(self._condition(timesteps.flatten(), actions, labels, layout))
        x = self.patch_embedding(_to_patches(latents.reshape(-1, channels, height, width), patch).to(condition.dtype))
        rotation = rotations(layout.positions.to(x.device))
        if x.dtype != torch.float64:
            rotation = rotation.to(torch.complex64)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, condition, rotation, layout, use_reentrant=False)
            else:
                x = block(x, condition, rotation, layout)
        return _from_patches(self.output(x, condition), grid, patch).view(latents.shape)

    def _condition(
        self, timesteps: Tensor, actions: Tensor | None, labels: Tensor | None, layout: FrameLayout
    ) -> Tensor:
        """`[F, E]`: what each frame is told, its timestep and its action or its clip's label."""
        if (actions is not None) != bool(self.config.actions) or (labels is not None) != bool(self.config.labels):
            needs = "actions" if self.config.actions else "labels" if self.config.labels else "no condition"
            raise ValueError(f"this model takes {needs}")
        condition = self.timestep_embedding(timesteps)
        if self.condition_embedding is not None:
            classes = actions.flatten() if actions is not None else labels  # [F] or [B]
            embedded = self.condition_embedding(classes)
            condition = condition + (embedded if labels is None else embedded[layout.clip_of_frame(embedded.device)])
        return condition


def _to_patches(frames: Tensor, patch: int) -> Tensor:
    """`[F, C, H, W]` -> `[F, P, C * patch * patch]`, channels slowest within a token, as officially."""
    count, channels, height, width = frames.shape
    x = frames.view(count, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * patch * patch)


def _from_patches(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `_to_patches`, for a grid of `(rows, columns)` tokens."""
    rows, columns = grid
    x = tokens.view(len(tokens), rows, columns, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows * patch, columns * patch)
