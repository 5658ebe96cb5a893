"""FAR: a transformer that denoises every frame of a video given all earlier ones (arXiv 2503.19325).

Long clips (FAR-Long, the paper's long short-term context): the window, a clip's last frames, is denoised; all earlier
frames are the context, cut into coarse patches with a separate embedding.

shape letters   B clips   F frames (of a clip, or of all clips of a pack), Fw/Fc of the window/context
                C/H/W latent channels/height/width   P/Q tokens of a window/context frame   E width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from far_scale.model.attention import choose_kernel
from far_scale.model.hub import find_model
from far_scale.model.layers import (
    HEAD_DIM,
    Block,
    Checkpointing,
    OutputHead,
    TimestepEmbedding,
    UnusedWeights,
    linear,
    rotary_embedding,
)
from far_scale.model.layout import FrameGroup, FrameLayout
from far_scale.model.model_files import CONFIG_FILE, read_config_values, read_weights
from far_scale.model.sharded_layout import ShardedLayout
from far_scale.utils.errors import UserError


@dataclass(frozen=True)
class FARConfig:
    """The shape of a FAR model.

    Attributes:
        layers: blocks.
        heads: attention heads of 64 dimensions; the width is heads * 64.
        patch: side of a window frame's patch, in latent pixels.
        channels: latent channels C.
        window: number of window frames, the last frames of a clip; the maximum clip length of a window-only model.
        context_patch: side of a context frame's patch, a multiple of `patch`; 0 for a window-only model.
        actions: classes of a frame's action, 0 for none; the null class is the index `actions`.
        labels: classes of a clip's label, 0 for none; the null class is the index `labels`.
        condition_dropout: fraction of conditions replaced by the null class in training.
        causal: whether a frame sees itself and earlier frames (FAR), or all frames of its clip (a video diffusion
            transformer, which denoises the whole clip).
    """

    layers: int
    heads: int
    patch: int = 1
    channels: int = 32
    window: int = 16
    context_patch: int = 0
    actions: int = 0
    labels: int = 0
    condition_dropout: float = 0.1
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "patch", "channels", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"FARConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.context_patch < 0 or self.context_patch % self.patch:
            raise ValueError(f"FARConfig.context_patch {self.context_patch} is not a multiple of patch {self.patch}")
        if self.actions and self.labels:
            raise ValueError("FARConfig: a model is conditioned on actions or labels, not on both")
        if type(self.causal) is not bool:
            raise ValueError(f"FARConfig.causal must be true or false, got {self.causal!r}")
        if self.context_patch and not self.causal:
            raise ValueError("FARConfig.context_patch must be 0 if causal is false: such a model has no context")

    @property
    def width(self) -> int:
        """E = heads * 64."""
        return self.heads * HEAD_DIM

    def layout(self, clip_frames: Sequence[int], size: tuple[int, int]) -> FrameLayout:
        """The cached layout of a pack of clips of `clip_frames` frame latents, each `size` (height, width).

        Raises:
            ValueError: a clip is longer than the window of a window-only model, or the patches do not divide the size.
        """
        height, width = size
        if height % (self.context_patch or self.patch) or width % (self.context_patch or self.patch):
            raise ValueError(
                f"latents of {height} x {width} cannot be cut into patches of {self.patch}"
                + (f" and {self.context_patch}" if self.context_patch else "")
            )
        grid = (height // self.patch, width // self.patch)
        return FrameLayout.of(clip_frames, grid, self.window, self.context_patch // self.patch, self.causal)

    def to_dict(self) -> dict[str, Any]:
        """The values stored in files, without `causal` if it is true: older files do not have it."""
        values = asdict(self)
        if self.causal:
            del values["causal"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FARConfig:
        """The configuration from stored values; raises ValueError for unknown keys."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model keys {sorted(unknown)}; known: {[field.name for field in fields(cls)]}")
        return cls(**values)

    @classmethod
    def read(cls, folder: str | Path) -> FARConfig:
        """The configuration in a model directory's config.json; raises UserError if there is none or it is invalid."""
        values = read_config_values(folder).get("model", {})
        try:
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise UserError(f"{Path(folder) / CONFIG_FILE}: model: {error}; export the model again") from None


class FAR(nn.Module):
    """The model. Weights are initialised as in the official code; before the first step the output is exactly zero."""

    def __init__(self, config: FARConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_kernel = "auto"
        self.patch_embedding = linear(config.channels * config.patch**2, config.width)
        self.timestep_embedding = TimestepEmbedding(config.width)
        self.condition_embedding = None
        if classes := config.actions or config.labels:
            self.condition_embedding = nn.Embedding(classes + 1, config.width)
            nn.init.normal_(self.condition_embedding.weight, std=0.02)
        context = config.context_patch > 0
        self.blocks = nn.ModuleList(
            Block(config.heads, context, last=layer == config.layers - 1) for layer in range(config.layers)
        )
        self.output = OutputHead(config.width, config.channels * config.patch**2)
        if context:
            context_channels = config.channels * config.context_patch**2
            self.context_patch_embedding = linear(context_channels, config.width)
            self.context_output = UnusedWeights(
                weight=torch.zeros(context_channels, config.width), bias=torch.zeros(context_channels)
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> FAR:
        """Load a trained model in evaluation mode, from a model directory or a repository of the Hugging Face hub.

        Args:
            source: path of a model directory, or `org/name` where no file or folder `org` is in the working folder.
            revision: branch, tag or commit of the repository; default: main.
            device: where the weights are put.
            dtype: of the weights, in which the model also computes; default: as stored.

        Raises:
            UserError: there is no model or it is damaged (`load`), or it cannot be downloaded (`hub.find_model`).
        """
        folder = find_model(source, revision)
        return cls.load(folder, FARConfig.read(folder), device, dtype)

    @classmethod
    def load(
        cls, folder: Path, config: FARConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> FAR:
        """The model of `config` in evaluation mode, with the weights in a model directory.

        Args:
            dtype: of the weights; default: as stored.

        Raises:
            UserError: weights that are unreadable, missing, unexpected, of another shape (named) or not those that
                config.json was written with.
        """
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(read_weights(folder, shapes, device, dtype), assign=True)
        return model.eval()

    def configure_execution(
        self, compiled: bool = False, checkpointing: Checkpointing = "none", attention_kernel: str = "auto"
    ) -> None:
        """Set how the blocks are computed, which only changes time and memory.

        Args:
            compiled: whether to use torch.compile, with one graph for all blocks.
            checkpointing: what training recomputes in the backward (see `Block`).
            attention_kernel: name of the kernel, or "auto" (see `attention.choose_kernel`).
        """
        self.attention_kernel = attention_kernel
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compiled, block.checkpointing = compiled, checkpointing

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        actions: Tensor | None = None,
        labels: Tensor | None = None,
        layout: FrameLayout | ShardedLayout | None = None,
    ) -> Tensor:
        """The velocity of every window frame, d x_t / d (t/1000) = noise - latent at the optimum.

        Args:
            latents: `[B, F, C, H, W]` (noisy or clean frames), or with `layout` `[F, C, H, W]`, the frames of all
                clips of a pack, one clip after another, each in temporal order: context, then window.
            timesteps: `[B, F]` (or `[F]`): 0..1000 for the noise level, -1 for a clean window frame, -2 for a context
                frame, which is always clean.
            actions: `[B, F]` (or `[F]`) int64, only for an action-conditioned model.
            labels: `[B]` int64, only for a label-conditioned model.
            layout: layout of the pack (`config.layout`), for clips of different lengths. With a `ShardedLayout`, the
                frames, timesteps and actions are those of this rank, and the labels those of all clips.

        Returns:
            The velocity of the window frames, `[B, Fw, C, H, W]` or `[Fw, C, H, W]`, in the weights' precision.

        Raises:
            ValueError: shapes do not match, or a condition is missing or not supported by the model.
        """
        *batch, channels, height, width = latents.shape
        if channels != self.config.channels:
            raise ValueError(f"latents {list(latents.shape)} do not have {self.config.channels} channels")
        if list(timesteps.shape) != batch:
            raise ValueError(f"timesteps must be {batch}, one per frame, got {list(timesteps.shape)}")
        clips = batch[:1] if layout is None else []
        layout = layout or self.config.layout((batch[1],) * batch[0], (height, width))
        device, sharded = latents.device, isinstance(layout, ShardedLayout)
        plan, last_plan = layout.plan, layout.window_plan
        if isinstance(layout, ShardedLayout):
            layout = layout.own
        if clips == [] and batch != [layout.frames]:
            raise ValueError(f"latents hold {batch} frames, the layout {layout.frames}")

        frames = latents.reshape(-1, channels, height, width)
        condition = self.condition(timesteps.flatten(), self._classes(actions, labels, layout))
        context: tuple[Tensor, ...] = ()
        if self.config.context_patch:
            context_rows, window_rows = layout.context_rows(device), layout.window_rows(device)
            patches = patchify(frames[context_rows], self.config.context_patch)
            context = (self.context_patch_embedding(patches.to(condition.dtype)),)
            frames, condition = frames[window_rows], condition[torch.cat([context_rows, window_rows])]
        x = self.patch_embedding(patchify(frames, self.config.patch).to(condition.dtype))
        rotation, kernel = self.rotary_embedding(layout.groups), self.kernel()
        for layer, block in enumerate(self.blocks, 1):
            handle = (last_plan if layer == len(self.blocks) else plan).handle
            x, new_context = block(kernel, x, condition, rotation, handle, *context, sharded=sharded)
            context = () if new_context is None else (new_context,)
        velocity = unpatchify(self.output(x, condition[len(condition) - len(x) :]), (height, width), self.config.patch)
        return velocity.view(*clips, -1, channels, height, width)

    def condition(self, timesteps: Tensor, classes: Tensor | None) -> Tensor:
        """The condition of each frame after its SiLU, `[F, E]`.

        Args:
            timesteps: `[F]`.
            classes: `[F]` each frame's action or its clip's label; None in a model without conditions.
        """
        condition = self.timestep_embedding(timesteps)
        if self.condition_embedding is not None:
            condition = condition + self.condition_embedding(classes)
        return F.silu(condition)

    def _classes(self, actions: Tensor | None, labels: Tensor | None, layout: FrameLayout) -> Tensor | None:
        """`[F]`: each frame's action or its clip's label."""
        if (actions is not None) != bool(self.config.actions) or (labels is not None) != bool(self.config.labels):
            needs = "actions" if self.config.actions else "labels" if self.config.labels else "no condition"
            raise ValueError(f"this model takes {needs}")
        if labels is not None:
            return labels[layout.clip_of_frame(labels.device)]
        return None if actions is None else actions.flatten()

    def rotary_embedding(self, group: FrameGroup) -> Tensor:
        """Rotary cosine and sine `[T, D/2, 2]` of the group's tokens, float32 (float64 for a float64 model)."""
        weight = self.patch_embedding.weight
        rotation = rotary_embedding(group.positions_on(weight.device))
        return rotation.to(torch.promote_types(weight.dtype, torch.float32))

    def kernel(self, compiled: bool = True) -> str:
        """The name of the attention kernel for the weights' device and precision.

        Args:
            compiled: see `choose_kernel`.

        Raises:
            UserError: the kernel is unknown or unusable.
        """
        weight = self.patch_embedding.weight
        return choose_kernel(self.attention_kernel, weight.device, weight.dtype, HEAD_DIM, compiled).name


def patchify(frames: Tensor, patch: int) -> Tensor:
    """`[F, C, H, W]` -> `[F, P, C * patch * patch]`, channels slowest within a token, as in the official code."""
    count, channels, height, width = frames.shape
    x = frames.view(count, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify`, for frames of `size` (height, width)."""
    rows, columns = size[0] // patch, size[1] // patch
    channels = tokens.shape[2] // patch**2  # not -1: there may be no frames
    x = tokens.view(len(tokens), rows, columns, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), channels, rows * patch, columns * patch)
