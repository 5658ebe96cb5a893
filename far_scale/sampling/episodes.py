"""Episodes to sample from: given frames, conditions and, where it is known, what really followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelCard
from far_scale.data.encode_worker import fit
from far_scale.data.shards import ShardSet
from far_scale.data.videos import Video, find_videos, read_video
from far_scale.errors import UserError
from far_scale.model import FARConfig


@dataclass(frozen=True)
class Episodes:
    """B clips of given frames, and what belongs to them.

    Attributes:
        keys: one name an episode.
        context: `[B, G, C, H, W]` scaled latents of the given frames.
        pixels: `[B, G or G + F, 3, h, w]` in 0..1, the frames of the episodes; all G + F where the truth is known.
        pixels_are: "recorded pixels" or "decoded latents".
        actions: `[B, frames known]` int64 for a model with actions, else None.
        labels: `[B]` int64 for a model with labels, else None.
        fps: frames a second, counting only the frames taken (every `frame_stride`-th).
    """

    keys: list[str]
    context: Tensor
    pixels: Tensor
    pixels_are: str
    actions: Tensor | None
    labels: Tensor | None
    fps: float

    def truth(self, frames: int) -> Tensor | None:
        """The `frames` frames that followed the given ones, `[B, F, 3, h, w]`; None where they are not known."""
        given = self.context.shape[1]
        return self.pixels[:, given:] if self.pixels.shape[1] == given + frames else None


def video_episodes(
    path: Path,
    config: FARConfig,
    card: ModelCard,
    autoencoder: Autoencoder,
    given: int,
    frames: int,
    count: int,
) -> Episodes:
    """The first `given + frames` frames of the first `count` videos of a file or folder; the given ones are encoded.

    Frames of another size are brought to the model's as tools/encode_latents.py does it.

    Raises:
        UserError: no videos, too few frames, or no actions or label where the model needs them.
    """
    files = find_videos(path)[:count]
    videos = [read_video(file) for file in files]
    lengths = [(str(file), len(video.frames)) for file, video in zip(files, videos, strict=True)]
    known = _known_frames(lengths, card.frame_stride, given, frames)
    taken = slice(0, (max(known, 1) - 1) * card.frame_stride + 1, card.frame_stride)
    size = card.latent_shape[1] * autoencoder.downsample
    recorded = np.stack([fit(video.frames[taken], size) for video in videos])
    pixels = torch.from_numpy(recorded)[:, :known].permute(0, 1, 4, 2, 3).float() / 255
    latents = encode(autoencoder, pixels[:, :given], card.latent_shape)
    return Episodes(
        keys=[video.key for video in videos],
        context=card.scaling.normalise(latents),
        pixels=pixels,
        pixels_are="recorded pixels",
        actions=_actions(files, videos, taken)[:, :known] if config.actions else None,
        labels=_labels([(str(file), video.label) for file, video in zip(files, videos, strict=True)])
        if config.labels
        else None,
        fps=videos[0].fps / card.frame_stride,
    )


def shard_episodes(
    shards: ShardSet,
    config: FARConfig,
    card: ModelCard,
    autoencoder: Autoencoder,
    given: int,
    frames: int,
    count: int,
) -> Episodes:
    """The first `given + frames` frames of the first `count` samples of a shard set; its latents decoded are the truth.

    Raises:
        UserError: a set of another autoencoder or latent shape, too few frames, or without the conditions needed.
    """
    manifest = shards.manifest
    if manifest.autoencoder.weight_hash != card.autoencoder.weight_hash:
        raise UserError(
            f"{shards.folder}: the latents are by {manifest.autoencoder.name} "
            f"({manifest.autoencoder.weight_hash[:12]}), the model's by {card.autoencoder.name} "
            f"({card.autoencoder.weight_hash[:12]}); encode the videos with the model's autoencoder"
        )
    if manifest.latent_shape != card.latent_shape:
        raise UserError(
            f"{shards.folder}: frame latents of {list(manifest.latent_shape)}, the model knows "
            f"{list(card.latent_shape)}; encode the videos at the model's size"
        )
    if config.actions and not manifest.actions:
        raise UserError(f"{shards.folder}: the set has no actions and the model needs them; encode videos with actions")
    places = [(shard, sample) for shard, n in enumerate(shards.samples_per_shard) for sample in range(n)][:count]
    lengths = [
        (f"{shards.folder}: sample {place[1]} of shard {place[0]}", shards.frames_of(*place)) for place in places
    ]
    known = _known_frames(lengths, card.frame_stride, given, frames)
    samples = [shards.read(shard, sample, frames=max(known, 1), stride=card.frame_stride) for shard, sample in places]
    latents = torch.stack([sample.latents for sample in samples])[:, :known].float()
    actions = [sample.actions[:known] for sample in samples if sample.actions is not None]
    return Episodes(
        keys=[sample.key for sample in samples],
        context=card.scaling.normalise(latents[:, :given]),
        pixels=decode(autoencoder, latents),
        pixels_are="decoded latents",
        actions=torch.stack(actions) if config.actions else None,
        labels=_labels([(sample.source, sample.label) for sample in samples]) if config.labels else None,
        fps=samples[0].fps / card.frame_stride,
    )


def encode(autoencoder: Autoencoder, pixels: Tensor, latent_shape: Sequence[int]) -> Tensor:
    """Pixels `[B, F, 3, h, w]` in 0..1 to unscaled latents `[B, F, C, H, W]`, float32 on the CPU; F may be 0."""
    if not pixels.numel():
        return torch.empty(*pixels.shape[:2], *latent_shape)
    return autoencoder.encode(pixels.flatten(0, 1) * 2 - 1).cpu().unflatten(0, pixels.shape[:2])


def decode(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Unscaled latents `[B, F, C, H, W]` to pixels `[B, F, 3, h, w]` in 0..1, float32 on the CPU; F may be 0."""
    if not latents.numel():
        height, width = (size * autoencoder.downsample for size in latents.shape[-2:])
        return torch.empty(*latents.shape[:2], 3, height, width)
    return (autoencoder.decode(latents.flatten(0, 1)).cpu() / 2 + 0.5).unflatten(0, latents.shape[:2])


def _known_frames(lengths: list[tuple[str, int]], stride: int, given: int, frames: int) -> int:
    """How many frames to take of each episode: `given + frames` if every episode has them, otherwise `given`."""
    for where, length in lengths:
        if length < (given - 1) * stride + 1:
            raise UserError(f"{where}: {length} frames, but {(given - 1) * stride + 1} are needed to give {given}")
    span = (given + frames - 1) * stride + 1
    return given + frames if all(length >= span for _, length in lengths) else given


def _actions(files: list[Path], videos: list[Video], taken: slice) -> Tensor:
    rows = []
    for file, video in zip(files, videos, strict=True):
        if video.actions is None:
            raise UserError(f"{file}: holds no actions and the model needs them; give an npz with `actions`")
        rows.append(video.actions[taken])
    return torch.from_numpy(np.stack(rows)).long()


def _labels(labels: list[tuple[str, int | None]]) -> Tensor:
    for where, label in labels:
        if label is None:
            raise UserError(f"{where}: holds no label and the model needs one; give an npz with `label`")
    return torch.tensor([label for _, label in labels], dtype=torch.int64)
