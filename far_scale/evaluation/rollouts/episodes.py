"""Episodes to sample from: given frames, conditions and, as far as it is known, what really followed.

shape letters   B episodes   b some of them   G given frames   F predicted ones   K frames with a known truth
                C/H/W latent channels/height/width   h/w pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata
from far_scale.data.shards.manifest import MANIFEST_NAME
from far_scale.data.shards.records import classes_differ
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.find import find_videos
from far_scale.data.video.transforms import resize_and_crop
from far_scale.data.video.videos import read_video
from far_scale.model import FARConfig
from far_scale.utils.errors import UserError

_ENCODE_BATCH = 32  # frames


class GroundTruth(Protocol):
    """The first frames of B episodes, equally many of each, decoded to floats one index at a time.

    Attributes:
        kind: "recorded pixels" or "decoded latents".
    """

    kind: str

    def __len__(self) -> int:
        """K, the number of known frames of each episode."""
        ...

    def frame(self, episodes: slice, index: int) -> Tensor:
        """Frame `index` of some episodes, `[b, 3, h, w]` in 0..1, float32 on the CPU."""
        ...


@dataclass(frozen=True)
class RecordedPixels:
    """The frames of videos, uint8 `[B, K, h, w, 3]`."""

    pixels: NDArray[np.uint8]
    kind = "recorded pixels"

    def __len__(self) -> int:
        return int(self.pixels.shape[1])

    def frame(self, episodes: slice, index: int) -> Tensor:
        return torch.from_numpy(self.pixels[episodes, index]).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class DecodedLatents:
    """The latents of a shard set, unscaled `[B, K, C, H, W]`, decoded on demand."""

    latents: Tensor
    autoencoder: Autoencoder
    kind = "decoded latents"

    def __len__(self) -> int:
        return self.latents.shape[1]

    def frame(self, episodes: slice, index: int) -> Tensor:
        return decode_frame(self.autoencoder, self.latents[episodes, index].float())


@dataclass(frozen=True)
class EpisodeSelection:
    """Which episodes are taken, and what of each.

    Attributes:
        given: frames given, from the start; None for the model's window, or for what `frames` leaves of a shorter
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
    """B episodes: their given frames, conditions and truth.

    Attributes:
        keys: one name an episode.
        context: `[B, G, C, H, W]` scaled latents of the given frames.
        truth: the given frames and those that followed, at most as many as will be predicted.
        actions: `[B, G + F]` int64 for a model conditioned on actions, else None.
        labels: `[B]` int64 for a model conditioned on labels, else None.
        fps: frames a second, counting only the frames taken (every `frame_stride`-th).
    """

    keys: list[str]
    context: Tensor
    truth: GroundTruth
    actions: Tensor | None
    labels: Tensor | None
    fps: float


def load_episodes(
    source: ShardSet | str | Path,
    config: FARConfig,
    metadata: ModelMetadata,
    autoencoder: Autoencoder,
    selection: EpisodeSelection,
) -> Episodes:
    """Load episodes of an opened shard set, or of a path: a shard set's folder, a video, or a folder of videos.

    Raises:
        UserError: the source does not fit the model, or holds too few frames.
    """
    if isinstance(source, ShardSet):
        return load_shard_episodes(source, config, metadata, autoencoder, selection)
    if (Path(source) / MANIFEST_NAME).is_file():
        return load_shard_episodes(ShardSet.open(source), config, metadata, autoencoder, selection)
    return load_video_episodes(Path(source), config, metadata, autoencoder, selection)


def load_video_episodes(
    path: Path, config: FARConfig, metadata: ModelMetadata, autoencoder: Autoencoder, selection: EpisodeSelection
) -> Episodes:
    """Load the first frames of the first videos of a file or folder, and encode the given ones.

    Frames are resized to the model's size as tools/encode_latents.py does it, if that size is square.

    Raises:
        UserError: no videos, too few frames, no actions or label where the model needs them, or frames of another size
            for a model with frames that are not square.
    """
    files = find_videos(path)[: selection.episodes]
    videos = [read_video(file) for file in files]
    needs_actions = config.actions > 0 and selection.conditioned
    for file, video in zip(files, videos, strict=True):
        if needs_actions and video.actions is None:
            raise UserError(
                f"{file}: holds no actions and the model needs them; give an npz with `actions`, or guidance -1"
            )
    lengths = [(str(file), len(video.frames)) for file, video in zip(files, videos, strict=True)]
    given, known = _frame_counts(lengths, metadata.frame_stride, config.window, selection, needs_actions)
    frames = slice(0, known * metadata.frame_stride, metadata.frame_stride)
    size = tuple(side * autoencoder.downsample for side in metadata.latent_shape[1:])
    pixels = np.stack([_resize(file, video.frames[frames], size) for file, video in zip(files, videos, strict=True)])
    context = torch.stack([encode_frames(autoencoder, video[:given], metadata) for video in pixels])
    actions = [video.actions[frames] for video in videos if video.actions is not None]
    labels = [(str(file), video.label) for file, video in zip(files, videos, strict=True)]
    return Episodes(
        keys=[video.key for video in videos],
        context=metadata.scaling.normalise(context),
        truth=RecordedPixels(pixels),
        actions=torch.from_numpy(np.stack(actions)).long() if needs_actions else None,
        labels=_label_tensor(labels) if config.labels and selection.conditioned else None,
        fps=videos[0].fps / metadata.frame_stride,
    )


def load_shard_episodes(
    shards: ShardSet,
    config: FARConfig,
    metadata: ModelMetadata,
    autoencoder: Autoencoder,
    selection: EpisodeSelection,
) -> Episodes:
    """Load the first frames of the first samples of a shard set; its decoded latents are the truth.

    Raises:
        UserError: another autoencoder or latent shape than the model's, too few frames, or missing conditions.
    """
    needs_actions = config.actions > 0 and selection.conditioned
    check_shard_set(shards, config, metadata, selection.conditioned)
    counts = enumerate(shards.samples_per_shard)
    positions = [(shard, sample) for shard, count in counts for sample in range(count)][: selection.episodes]
    lengths = [
        (f"{shards.folder}: sample {sample} of shard {shard}", shards.frames_of(shard, sample))
        for shard, sample in positions
    ]
    if config.labels and selection.conditioned:
        check_classes(shards, metadata)
    given, known = _frame_counts(lengths, metadata.frame_stride, config.window, selection, needs_actions)
    samples = [shards.read(shard, sample, frames=known, stride=metadata.frame_stride) for shard, sample in positions]
    latents = torch.stack([sample.latents for sample in samples])
    labels = [(sample.source, sample.label) for sample in samples]
    return Episodes(
        keys=[sample.key for sample in samples],
        context=metadata.scaling.normalise(latents[:, :given]),
        truth=DecodedLatents(latents, autoencoder),
        actions=torch.stack([s.actions for s in samples if s.actions is not None]) if needs_actions else None,
        labels=_label_tensor(labels) if config.labels and selection.conditioned else None,
        fps=samples[0].fps / metadata.frame_stride,
    )


def encode_frames(autoencoder: Autoencoder, frames: np.ndarray, metadata: ModelMetadata) -> Tensor:
    """Frames uint8 `[F, h, w, 3]` to unscaled latents `[F, C, H, W]`, float32 on the CPU; F may be 0."""
    latents = [torch.empty(0, *metadata.latent_shape)]
    for start in range(0, len(frames), _ENCODE_BATCH):
        pixels = torch.from_numpy(frames[start : start + _ENCODE_BATCH]).permute(0, 3, 1, 2).float()
        latents.append(autoencoder.encode(pixels / 127.5 - 1).cpu())
    return torch.cat(latents)


def decode_frame(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Unscaled latents `[b, C, H, W]` to pixels `[b, 3, h, w]` in 0..1, float32 on the CPU."""
    return autoencoder.decode(latents).cpu() / 2 + 0.5


def check_shard_set(shards: ShardSet, config: FARConfig, metadata: ModelMetadata, conditioned: bool) -> None:
    """Raises UserError if the latents or conditions of a set do not fit the model."""
    actions = config.actions > 0 and conditioned
    manifest = shards.manifest
    if manifest.autoencoder.weight_hash != metadata.autoencoder.weight_hash:
        raise UserError(
            f"{shards.folder}: the latents are by {manifest.autoencoder.name} "
            f"({manifest.autoencoder.weight_hash[:12]}), the model's by {metadata.autoencoder.name} "
            f"({metadata.autoencoder.weight_hash[:12]}); encode the videos with the model's autoencoder"
        )
    if manifest.latent_shape != metadata.latent_shape:
        raise UserError(
            f"{shards.folder}: frame latents of {list(manifest.latent_shape)}, the model has "
            f"{list(metadata.latent_shape)}; encode the videos at the model's size"
        )
    if actions and not manifest.actions:
        raise UserError(f"{shards.folder}: the set has no actions and the model needs them; encode videos with actions")
    for name, needed, classes, known in (
        ("actions", actions, manifest.actions, config.actions),
        ("labels", conditioned, manifest.labels, config.labels),
    ):
        if needed and known and classes != known:
            raise UserError(
                f"{shards.folder}: {classes} {name}, the model was trained on {known}; give a shard set with "
                "the model's classes, or guidance -1"
            )


def check_classes(shards: ShardSet, metadata: ModelMetadata) -> None:
    """Raises UserError if the label classes of a set differ from the model's."""
    if (difference := classes_differ(shards.manifest.classes, metadata.classes)) is not None:
        raise UserError(
            f"{shards.folder}: its classes are not the model's: {difference}; encode the videos with --classes-of the "
            "set that the model was trained on"
        )


def _resize(file: Path, frames: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
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


def _frame_counts(
    lengths: list[tuple[str, int]], stride: int, window: int, selection: EpisodeSelection, needs_all: bool
) -> tuple[int, int]:
    """How many frames of every episode are given, and how many are known.

    Args:
        lengths: name and recorded frames of each episode.
        stride: of the frames that are taken.
        needs_all: whether predicted frames must be recorded, too, since actions are read from them.
    """
    shortest = min((length + stride - 1) // stride for _, length in lengths)
    given = selection.given
    if given is None:
        given = max(1, min(window, shortest - selection.frames))
    needed = given + selection.frames if needs_all else given
    for name, length in lengths:
        if length < (needed - 1) * stride + 1:
            purpose = f"{given} given ones"
            if needs_all:
                purpose = f"for the actions of {purpose} and of {selection.frames} new ones"
            every = f", one in {stride} frames taken" if stride > 1 else ""
            raise UserError(
                f"{name}: {length} frames, but {(needed - 1) * stride + 1} are needed ({purpose}{every}); "
                "ask for fewer, or give a longer recording"
            )
    return given, min(shortest, given + selection.frames)


def _label_tensor(labels: list[tuple[str, int | None]]) -> Tensor:
    for name, label in labels:
        if label is None:
            raise UserError(f"{name}: holds no label and the model needs one; give an npz with `label`, or guidance -1")
    return torch.tensor([label for _, label in labels], dtype=torch.int64)
