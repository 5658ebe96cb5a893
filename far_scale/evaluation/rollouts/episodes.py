"""Episodes to sample from: given frames, conditions and, as far as they are known, the frames that really followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata
from far_scale.data.shards.manifest import MANIFEST_NAME
from far_scale.data.shards.records import classes_differ
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.find import find_videos
from far_scale.data.video.transforms import resize_and_crop
from far_scale.data.video.videos import read_video
from far_scale.evaluation.rollouts.truth import DecodedLatents, RecordedPixels, Truth
from far_scale.model import FARConfig
from far_scale.utils.errors import UserError

_ENCODED_AT_ONCE = 32  # frames


@dataclass(frozen=True)
class Wanted:
    """What is asked of each episode.

    Attributes:
        given: frames given, from its start; None for the model's window, or for what `frames` leaves of a shorter
            episode, but at least 1.
        frames: frames to predict.
        episodes: how many to take from the start of the set, at most.
        conditioned: whether actions or labels are read, if the model has them.
    """

    given: int | None
    frames: int
    episodes: int
    conditioned: bool


@dataclass(frozen=True)
class Episodes:
    """B clips of given frames, and what belongs to them.

    Attributes:
        keys: one name an episode.
        context: `[B, G, C, H, W]` scaled latents of the given frames.
        truth: the given frames and those that followed, at most as many as will be predicted.
        actions: `[B, G + F]` int64 where the model is told actions, else None.
        labels: `[B]` int64 where the model is told labels, else None.
        fps: frames a second, counting only the frames taken (every `frame_stride`-th).
    """

    keys: list[str]
    context: Tensor
    truth: Truth
    actions: Tensor | None
    labels: Tensor | None
    fps: float


def find_episodes(
    source: ShardSet | str | Path, config: FARConfig, card: ModelMetadata, autoencoder: Autoencoder, wanted: Wanted
) -> Episodes:
    """Of an opened shard set, or of a path: a shard set's folder, a video file, or a folder of videos.

    Raises:
        UserError: what the path holds does not fit the model, or is not enough of it.
    """
    if isinstance(source, ShardSet):
        return shard_episodes(source, config, card, autoencoder, wanted)
    if (Path(source) / MANIFEST_NAME).is_file():
        return shard_episodes(ShardSet.open(source), config, card, autoencoder, wanted)
    return video_episodes(Path(source), config, card, autoencoder, wanted)


def video_episodes(
    path: Path, config: FARConfig, card: ModelMetadata, autoencoder: Autoencoder, wanted: Wanted
) -> Episodes:
    """The first frames of the first videos of a file or folder; the given ones are encoded.

    Frames of another size are brought to the model's as tools/encode_latents.py does it, where that is a square.

    Raises:
        UserError: no videos, too few frames, no actions or label where the model needs them, or frames of another size
            for a model of others than squares.
    """
    files = find_videos(path)[: wanted.episodes]
    videos = [read_video(file) for file in files]
    actions = config.actions > 0 and wanted.conditioned
    for file, video in zip(files, videos, strict=True):
        if actions and video.actions is None:
            raise UserError(
                f"{file}: holds no actions and the model needs them; give an npz with `actions`, or guidance -1"
            )
    lengths = [(str(file), len(video.frames)) for file, video in zip(files, videos, strict=True)]
    given, known = _given_and_known(lengths, card.frame_stride, config.window, wanted, actions)
    taken = slice(0, known * card.frame_stride, card.frame_stride)
    size = tuple(side * autoencoder.downsample for side in card.latent_shape[1:])
    pixels = np.stack([_fit(file, video.frames[taken], size) for file, video in zip(files, videos, strict=True)])
    labels = [(str(file), video.label) for file, video in zip(files, videos, strict=True)]
    return Episodes(
        keys=[video.key for video in videos],
        context=card.scaling.normalise(torch.stack([encode(autoencoder, video[:given], card) for video in pixels])),
        truth=RecordedPixels(pixels),
        actions=_stack([video.actions[taken] for video in videos if video.actions is not None]) if actions else None,
        labels=_labels(labels) if config.labels and wanted.conditioned else None,
        fps=videos[0].fps / card.frame_stride,
    )


def shard_episodes(
    shards: ShardSet, config: FARConfig, card: ModelMetadata, autoencoder: Autoencoder, wanted: Wanted
) -> Episodes:
    """The first frames of the first samples of a shard set; its latents decoded are the truth.

    Raises:
        UserError: a set of another autoencoder or latent shape, too few frames, or without the conditions needed.
    """
    actions = config.actions > 0 and wanted.conditioned
    check_set(shards, config, card, wanted.conditioned)
    counts = enumerate(shards.samples_per_shard)
    places = [(shard, sample) for shard, n in counts for sample in range(n)][: wanted.episodes]
    lengths = [
        (f"{shards.folder}: sample {place[1]} of shard {place[0]}", shards.frames_of(*place)) for place in places
    ]
    if config.labels and wanted.conditioned:
        check_classes(shards, card)
    given, known = _given_and_known(lengths, card.frame_stride, config.window, wanted, actions)
    samples = [shards.read(shard, sample, frames=known, stride=card.frame_stride) for shard, sample in places]
    latents = torch.stack([sample.latents for sample in samples])
    labels = [(sample.source, sample.label) for sample in samples]
    return Episodes(
        keys=[sample.key for sample in samples],
        context=card.scaling.normalise(latents[:, :given]),
        truth=DecodedLatents(latents, autoencoder),
        actions=torch.stack([s.actions for s in samples if s.actions is not None]) if actions else None,
        labels=_labels(labels) if config.labels and wanted.conditioned else None,
        fps=samples[0].fps / card.frame_stride,
    )


def _fit(file: Path, frames: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Frames `[F, H, W, 3]` in the model's size (height, width)."""
    height, width = size
    if frames.shape[1:3] == size:
        return frames
    if height != width:
        raise UserError(
            f"{file}: frames of {frames.shape[2]}x{frames.shape[1]} pixels (width x height), the model's have "
            f"{width}x{height}, and only squares are scaled here; give a video of that size, or a shard set"
        )
    return resize_and_crop(frames, height)


def encode(autoencoder: Autoencoder, frames: np.ndarray, card: ModelMetadata) -> Tensor:
    """Frames uint8 `[F, h, w, 3]` to unscaled latents `[F, C, H, W]`, float32 on the CPU; F may be 0."""
    latents = [torch.empty(0, *card.latent_shape)]
    for start in range(0, len(frames), _ENCODED_AT_ONCE):
        pixels = torch.from_numpy(frames[start : start + _ENCODED_AT_ONCE]).permute(0, 3, 1, 2).float()
        latents.append(autoencoder.encode(pixels / 127.5 - 1).cpu())
    return torch.cat(latents)


def _given_and_known(
    lengths: list[tuple[str, int]], stride: int, window: int, wanted: Wanted, all_needed: bool
) -> tuple[int, int]:
    """How many frames are given, and how many are known of every episode; all are needed where they carry actions.

    `lengths` are names and recorded frames; of these, every `stride`-th is one of ours.
    """
    shortest = min((length + stride - 1) // stride for _, length in lengths)
    given = max(1, min(window, shortest - wanted.frames)) if wanted.given is None else wanted.given
    needed = given + wanted.frames if all_needed else given
    for where, length in lengths:
        if length < (needed - 1) * stride + 1:
            what = f"{given} given ones"
            if all_needed:
                what = f"to tell the actions of {what} and of {wanted.frames} new ones"
            every = f", one in {stride} frames taken" if stride > 1 else ""
            raise UserError(
                f"{where}: {length} frames, but {(needed - 1) * stride + 1} are needed ({what}{every}); "
                "ask for fewer, or give a longer recording"
            )
    return given, min(shortest, given + wanted.frames)


def check_set(shards: ShardSet, config: FARConfig, card: ModelMetadata, conditioned: bool) -> None:
    """Raises UserError where the model cannot take a set's latents, or lacks its actions or labels."""
    actions = config.actions > 0 and conditioned
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
    if actions and not manifest.actions:
        raise UserError(f"{shards.folder}: the set has no actions and the model needs them; encode videos with actions")
    for what, needed, own, known in (
        ("actions", actions, manifest.actions, config.actions),
        ("labels", conditioned, manifest.labels, config.labels),
    ):
        if needed and known and own != known:
            raise UserError(
                f"{shards.folder}: {own} {what}, the model was trained on {known}; give a shard set of the model's "
                "own, or guidance -1"
            )


def check_classes(shards: ShardSet, card: ModelMetadata) -> None:
    """Raises UserError where a set's labels are other classes than the model's."""
    if (difference := classes_differ(shards.manifest.classes, card.classes)) is not None:
        raise UserError(
            f"{shards.folder}: its classes are not the model's: {difference}; encode the videos with --classes-of the "
            "set that the model was trained on"
        )


def _stack(actions: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(actions)).long()


def _labels(labels: list[tuple[str, int | None]]) -> Tensor:
    for where, label in labels:
        if label is None:
            raise UserError(
                f"{where}: holds no label and the model needs one; give an npz with `label`, or guidance -1"
            )
    return torch.tensor([label for _, label in labels], dtype=torch.int64)
