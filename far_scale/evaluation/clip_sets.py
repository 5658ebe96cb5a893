"""The clips of an evaluation: their selection from videos or a shard set, their order and their content.

shape letters   F frames of a clip, given and predicted ones   C/H/W latent channels/height/width   h/w pixels
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar
from typing import Protocol as Interface

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_scale.convert.model_dir import ModelMetadata
from far_scale.data.shards.manifest import MANIFEST_NAME
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.video.sources import Source, find_source_set
from far_scale.data.video.transforms import Frames, FrameTransform
from far_scale.data.video.videos import Video, read_label, read_video
from far_scale.evaluation.protocol import Protocol
from far_scale.evaluation.rollouts.episodes import check_classes, check_shard_set
from far_scale.model import FARConfig
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import sha256
from far_scale.utils.rng import generator

T = TypeVar("T")

_FILE_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Clip:
    """One clip of an evaluation.

    Attributes:
        number: in the evaluation, from 0; with the seed it determines the noise.
        key: its unique name, usable as a file name.
        frames: `[F, h, w, 3]` as inputs of the autoencoder, uint8 or float32 from 0 to 1; None for a shard set.
        latents: `[F, C, H, W]` float32, unscaled, of a shard set; None for a video.
        actions: `[F]` int64, or None for a model without actions.
        label: class, or None for a model without labels.
    """

    number: int
    key: str
    frames: Frames | None
    latents: Tensor | None
    actions: Tensor | None
    label: int | None


class ClipSource(NamedTuple):
    """Where the clips of an evaluation are.

    Attributes:
        videos: a folder, a list or a file (`far_scale.data.video.sources`), or
        shards: a shard set's folder; its decoded latents are the truth.
        split: one of UCF-101's lists, for a folder of videos.
    """

    videos: Path | None = None
    shards: Path | None = None
    split: Path | None = None


class ClipSet(Interface):
    """The clips of an evaluation, read one at a time.

    Attributes:
        keys: of the clips, in order.
        fingerprint: SHA-256 of the files that they are made from, in this order.
    """

    keys: list[str]
    fingerprint: str

    def read(self, number: int) -> Clip:
        """Read clip `number`.

        Raises:
            UserError: it is too short, broken, or lacks the action or label that the model needs.
        """
        ...


def open_clips(
    protocol: Protocol, config: FARConfig, metadata: ModelMetadata, downsample: int, source: ClipSource
) -> tuple[ClipSet, Protocol]:
    """Open the clips that a protocol takes from a set; also returns the protocol with their fingerprint.

    Args:
        config, metadata: the model's.
        downsample: the autoencoder's, pixels per side of a latent.
        source: where the clips are.

    Raises:
        UserError: too few clips, another fingerprint than the protocol's, or a set that does not fit the model.
    """
    size = tuple(side * downsample for side in metadata.latent_shape[1:])
    if size != (protocol.clips.size, protocol.clips.size):
        raise UserError(
            f"protocol {protocol.name}: clips.size is {protocol.clips.size}, and the model's frames are "
            f"{size[1]}x{size[0]} pixels; take the protocol of that size, or a model of this one"
        )
    if metadata.frame_stride != protocol.clips.stride:
        print_warning(
            f"the model was trained with a frame stride of {metadata.frame_stride}, and protocol {protocol.name} has "
            f"{protocol.clips.stride}"
        )
    clips: ClipSet
    if source.shards is not None:
        if not (source.shards / MANIFEST_NAME).is_file():
            raise UserError(f"--shards {source.shards}: there is no shard set here; give --videos for videos")
        protocol = protocol.with_clips(pixels="decoded")
        clips = _ShardClipSet(protocol, config, metadata, ShardSet.open(source.shards))
    elif source.videos is not None:
        clips = _VideoClipSet(protocol, config, metadata, source.videos, source.split)
    else:
        raise UserError("the clips are missing; name them by --videos or --shards")
    if len(set(clips.keys)) < len(clips.keys):
        duplicate = next(key for key in clips.keys if clips.keys.count(key) > 1)
        raise UserError(f"two clips have the file name {duplicate}; give them keys that differ in letters or digits")
    expected = protocol.clips.fingerprint
    if expected is not None and expected != clips.fingerprint:
        raise UserError(
            f"protocol {protocol.name}: clips.fingerprint is {expected[:12]}, and these clips are "
            f"{clips.fingerprint[:12]}; give the protocol's own videos, or make a protocol of these"
        )
    return clips, protocol.with_clips(fingerprint=clips.fingerprint)


class _VideoClipSet:
    """Clips of video files."""

    def __init__(
        self, protocol: Protocol, config: FARConfig, metadata: ModelMetadata, videos: Path, split: Path | None
    ) -> None:
        self._protocol = protocol
        self._conditioned = protocol.sampling.guidance != -1
        self._labels = config.labels if self._conditioned else 0
        self._actions = config.actions if self._conditioned else 0
        self._transform = FrameTransform(protocol.clips.size, protocol.clips.resize)
        labelled = find_source_set(
            videos, split, self._labels, metadata.classes if self._labels else None, as_listed=True
        )
        self._sources = select_clips(labelled.sources, _listed_label, protocol, str(videos))
        self.keys = [_FILE_NAME.sub("_", source.key) for source in self._sources]
        self.fingerprint = _combined_hash([self._source_fingerprint(source) for source in self._sources])

    def read(self, number: int) -> Clip:
        source, clips, total = self._sources[number], self._protocol.clips, self._protocol.total_frames
        video = read_video(source.path, self._actions > 0, source.actions, transform=self._transform.resize_frames)
        stride = clips.stride
        if len(video.frames) < clips.start + (total - 1) * stride + 1 and clips.short == "stride-1":
            stride = 1
        needed = clips.start + (total - 1) * stride + 1
        if len(video.frames) < needed:
            raise UserError(
                f"{source.path}: {len(video.frames)} frames, and protocol {self._protocol.name} needs {needed}; take "
                "the video out of the set"
            )
        frame_slice = slice(clips.start, needed, stride)
        actions = None
        if self._actions:
            actions = self._checked_actions(source, video)[frame_slice]
        label = self._label(source, video) if self._labels else None
        frames = np.ascontiguousarray(self._transform.crop_frames(video.frames[frame_slice], source.key))
        return Clip(number, self.keys[number], frames, None, actions, label)

    def _checked_actions(self, source: Source, video: Video) -> Tensor:
        if video.actions is None:
            raise UserError(f"{source.path}: holds no actions and the model needs them; give an npz with `actions`")
        if video.actions.max() >= self._actions:
            raise UserError(
                f"{source.path}: action {video.actions.max()}, and the model has 0 to {self._actions - 1}; give the "
                "videos of its world"
            )
        return torch.from_numpy(video.actions)

    def _label(self, source: Source, video: Video) -> int:
        label = source.label if source.label is not None else video.label
        if label is None and source.label_sidecar is not None:
            label = read_label(source.label_sidecar)
        label = source.folder_label if label is None else label
        if label is None or label >= self._labels:
            raise UserError(
                f"{source.path}: its class is {label}, and the model has 0 to {self._labels - 1}; give videos with "
                "the model's classes"
            )
        return label

    def _source_fingerprint(self, source: Source) -> str:
        """Hash of a video's file, of the file of its actions, and of its listed class."""
        parts = [_content_hash(source.path)]
        if self._actions and source.actions is not None:
            parts.append(_content_hash(source.actions))
        if self._labels:
            parts.append(str(source.label if source.label is not None else source.folder_label))
        return _combined_hash(parts)


class _ShardClipSet:
    """Clips of a shard set."""

    def __init__(self, protocol: Protocol, config: FARConfig, metadata: ModelMetadata, shards: ShardSet) -> None:
        self._protocol, self._shards = protocol, shards
        self._conditioned = protocol.sampling.guidance != -1
        self._labels = config.labels if self._conditioned else 0
        self._actions = config.actions if self._conditioned else 0
        check_shard_set(shards, config, metadata, self._conditioned)
        if self._labels:
            check_classes(shards, metadata)
        positions = [(shard, sample) for shard, n in enumerate(shards.samples_per_shard) for sample in range(n)]
        self._positions = select_clips(
            positions, lambda position: shards.read(*position, frames=1).label, protocol, str(shards.folder)
        )
        self.keys = [_FILE_NAME.sub("_", shards.index(shard).samples[row].key) for shard, row in self._positions]
        if len(set(self.keys)) < len(self.keys):  # foreign shards may number their samples from 0 each
            self.keys = [f"{shard}-{key}" for (shard, _), key in zip(self._positions, self.keys, strict=True)]
        self.fingerprint = _combined_hash(
            [shards.manifest.fingerprint(), *(f"{shard}/{row}" for shard, row in self._positions)]
        )

    def read(self, number: int) -> Clip:
        position, clips, total = self._positions[number], self._protocol.clips, self._protocol.total_frames
        available, stride = self._shards.frames_of(*position), clips.stride
        if available < clips.start + (total - 1) * stride + 1 and clips.short == "stride-1":
            stride = 1
        needed = clips.start + (total - 1) * stride + 1
        if available < needed:
            raise UserError(
                f"{self._shards.folder}: sample {self.keys[number]} has {available} frames, and protocol "
                f"{self._protocol.name} needs {needed}; take it out of the set"
            )
        sample = self._shards.read(*position, start=clips.start, frames=total, stride=stride)
        actions = sample.actions if self._actions else None
        return Clip(
            number, self.keys[number], None, sample.latents.float(), actions, sample.label if self._labels else None
        )


def select_clips(items: Sequence[T], label_of: Callable[[T], int | None], protocol: Protocol, set_name: str) -> list[T]:
    """Select the items that a protocol's `clips` section takes, in its order.

    Args:
        items: all items, in the order of the set.
        label_of: gives an item's class; called only if clips.per_class is set.
        set_name: for errors.

    Raises:
        UserError: there are too few, in a class or in total.
    """
    clips = protocol.clips
    chosen = list(items[:: clips.every])
    if clips.per_class is not None:
        chosen = _draw_balanced(chosen, label_of, clips.per_class, clips.seed, set_name)
    if len(chosen) < clips.count:
        raise UserError(
            f"{set_name}: has {len(chosen)} clips for protocol {protocol.name}, which takes {clips.count}; give the "
            f"whole set, or take --clips {len(chosen)}, which makes it another protocol"
        )
    return chosen[: clips.count]


def _draw_balanced(
    items: Sequence[T], label_of: Callable[[T], int | None], per_class: int, seed: int, set_name: str
) -> list[T]:
    """`per_class` items of each class, all in one random order."""
    by_class: dict[int, list[T]] = {}
    for item in items:
        label = label_of(item)
        if label is None:
            raise UserError(f"{set_name}: clips.per_class needs each video's class; give them in folders, or in a list")
        by_class.setdefault(label, []).append(item)
    drawn: list[T] = []
    for label in sorted(by_class):
        members = by_class[label]
        if len(members) < per_class:
            raise UserError(f"{set_name}: class {label} has {len(members)} videos, and clips.per_class is {per_class}")
        order = generator(seed, "clips of a class", step=label).permutation(len(members))
        drawn += [members[index] for index in order[:per_class]]
    return [drawn[index] for index in generator(seed, "order of clips").permutation(len(drawn))]


def _listed_label(source: Source) -> int | None:
    return source.label if source.label is not None else source.folder_label


def _content_hash(path: Path) -> str:
    """SHA-256 of a file; of an .npz file that of its arrays, which does not depend on compression."""
    if path.suffix.lower() != ".npz":
        return sha256(path)
    digest = hashlib.sha256()
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in sorted(archive.files):
                array: NDArray[np.generic] = archive[name]
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: broken ({error}); write it again with numpy.savez") from None
    return digest.hexdigest()


def _combined_hash(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
