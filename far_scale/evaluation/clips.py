"""The clips of an evaluation: which of a set of videos or of a shard set, in which order, and what is in them.

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
from far_scale.evaluation.rollouts.episodes import check_classes, check_set
from far_scale.model import FARConfig
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import sha256
from far_scale.utils.rng import generator

T = TypeVar("T")

_FILE_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        number: in the evaluation, from 0; with the seed it names the noise.
        key: its name, which no other clip has, and which a file can have.
        frames: `[F, h, w, 3]` as the autoencoder gets them, uint8 or float32 from 0 to 1; None of a shard set.
        latents: `[F, C, H, W]` float32, unscaled, of a shard set; None of a video.
        actions: `[F]` int64, or None where the model takes none.
        label: or None likewise.
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
        shards: a shard set's folder, whose decoded latents are the truth then.
        split: one of UCF-101's lists, for a folder of videos.
    """

    videos: Path | None = None
    shards: Path | None = None
    split: Path | None = None


class ClipSet(Interface):
    """The clips of an evaluation, read one at a time.

    Attributes:
        keys: their names, in their order.
        fingerprint: SHA-256 of what they are made from, in this order.
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
    protocol: Protocol, config: FARConfig, card: ModelMetadata, downsample: int, source: ClipSource
) -> tuple[ClipSet, Protocol]:
    """The clips that a protocol takes of a set, and the protocol with their fingerprint.

    Args:
        config, card: the model's.
        downsample: pixels a side of a latent position.
        source: where the clips are.

    Raises:
        UserError: too few clips, others than those of the protocol's fingerprint, or a set that does not fit the model.
    """
    size = tuple(side * downsample for side in card.latent_shape[1:])
    if size != (protocol.clips.size, protocol.clips.size):
        raise UserError(
            f"protocol {protocol.name}: clips.size is {protocol.clips.size}, and the model's frames are "
            f"{size[1]}x{size[0]} pixels; take the protocol of that size, or a model of this one"
        )
    if card.frame_stride != protocol.clips.stride:
        print_warning(
            f"the model was trained with a frame stride of {card.frame_stride}, and protocol {protocol.name} has "
            f"{protocol.clips.stride}"
        )
    found: ClipSet
    if source.shards is not None:
        if not (source.shards / MANIFEST_NAME).is_file():
            raise UserError(f"--shards {source.shards}: there is no shard set here; give --videos for videos")
        protocol = protocol.with_clips(pixels="decoded")
        found = _ShardClips(protocol, config, card, ShardSet.open(source.shards))
    elif source.videos is not None:
        found = _VideoClips(protocol, config, card, source.videos, source.split)
    else:
        raise UserError("the clips are missing; name them by --videos or --shards")
    if len(set(found.keys)) < len(found.keys):
        twice = next(key for key in found.keys if found.keys.count(key) > 1)
        raise UserError(f"two clips would have the files of {twice}; give them keys that differ in letters or digits")
    wanted = protocol.clips.fingerprint
    if wanted is not None and wanted != found.fingerprint:
        raise UserError(
            f"protocol {protocol.name}: clips.fingerprint is {wanted[:12]}, and these clips are "
            f"{found.fingerprint[:12]}; give the protocol's own videos, or make a protocol of these"
        )
    return found, protocol.with_clips(fingerprint=found.fingerprint)


class _VideoClips:
    """Clips of video files."""

    def __init__(
        self, protocol: Protocol, config: FARConfig, card: ModelMetadata, videos: Path, split: Path | None
    ) -> None:
        self._protocol = protocol
        self._conditioned = protocol.sampling.guidance != -1
        self._labels = config.labels if self._conditioned else 0
        self._actions = config.actions if self._conditioned else 0
        self._transform = FrameTransform(protocol.clips.size, protocol.clips.resize)
        found = find_source_set(videos, split, self._labels, card.classes if self._labels else None, as_listed=True)
        self._sources = select(found.sources, _label_in_list, protocol, str(videos))
        self.keys = [_FILE_NAME.sub("_", source.key) for source in self._sources]
        self.fingerprint = _joined([self._print(source) for source in self._sources])

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
        taken = slice(clips.start, needed, stride)
        actions = None
        if self._actions:
            actions = self._checked_actions(source, video)[taken]
        label = self._label(source, video) if self._labels else None
        frames = np.ascontiguousarray(self._transform.crop_frames(video.frames[taken], source.key))
        return Clip(number, self.keys[number], frames, None, actions, label)

    def _checked_actions(self, source: Source, video: Video) -> Tensor:
        if video.actions is None:
            raise UserError(f"{source.path}: holds no actions and the model needs them; give an npz with `actions`")
        if video.actions.max() >= self._actions:
            raise UserError(
                f"{source.path}: action {video.actions.max()}, and the model knows 0 to {self._actions - 1}; give the "
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
                f"{source.path}: its class is {label}, and the model knows 0 to {self._labels - 1}; give videos with "
                "the model's classes"
            )
        return label

    def _print(self, source: Source) -> str:
        """Of a source's content: its file, those of its actions and label, and the class that its list gives it."""
        parts = [_content(source.path)]
        if self._actions and source.actions is not None:
            parts.append(_content(source.actions))
        if self._labels:
            parts.append(str(source.label if source.label is not None else source.folder_label))
        return _joined(parts)


class _ShardClips:
    """Clips of a shard set."""

    def __init__(self, protocol: Protocol, config: FARConfig, card: ModelMetadata, shards: ShardSet) -> None:
        self._protocol, self._shards = protocol, shards
        self._conditioned = protocol.sampling.guidance != -1
        self._labels = config.labels if self._conditioned else 0
        self._actions = config.actions if self._conditioned else 0
        check_set(shards, config, card, self._conditioned)
        if self._labels:
            check_classes(shards, card)
        places = [(shard, sample) for shard, n in enumerate(shards.samples_per_shard) for sample in range(n)]
        self._places = select(places, lambda place: shards.read(*place, frames=1).label, protocol, str(shards.folder))
        self.keys = [_FILE_NAME.sub("_", shards.index(shard).samples[row].key) for shard, row in self._places]
        if len(set(self.keys)) < len(self.keys):  # shards of others may each begin to count anew
            self.keys = [f"{shard}-{key}" for (shard, _), key in zip(self._places, self.keys, strict=True)]
        self.fingerprint = _joined([shards.manifest.fingerprint(), *(f"{shard}/{row}" for shard, row in self._places)])

    def read(self, number: int) -> Clip:
        place, clips, total = self._places[number], self._protocol.clips, self._protocol.total_frames
        there, stride = self._shards.frames_of(*place), clips.stride
        if there < clips.start + (total - 1) * stride + 1 and clips.short == "stride-1":
            stride = 1
        needed = clips.start + (total - 1) * stride + 1
        if there < needed:
            raise UserError(
                f"{self._shards.folder}: sample {self.keys[number]} has {there} frames, and protocol "
                f"{self._protocol.name} needs {needed}; take it out of the set"
            )
        sample = self._shards.read(*place, start=clips.start, frames=total, stride=stride)
        actions = sample.actions if self._actions else None
        return Clip(
            number, self.keys[number], None, sample.latents.float(), actions, sample.label if self._labels else None
        )


def select(items: Sequence[T], label_of: Callable[[T], int | None], protocol: Protocol, where: str) -> list[T]:
    """The items that a protocol's `clips` takes, in its order.

    Args:
        items: all there are, in the order of the set.
        label_of: an item's class, asked only where clips.per_class is set.
        where: the set, for errors.

    Raises:
        UserError: there are too few, of a class or in all.
    """
    clips = protocol.clips
    chosen = list(items[:: clips.every])
    if clips.per_class is not None:
        chosen = _balanced(chosen, label_of, clips.per_class, clips.seed, where)
    if len(chosen) < clips.count:
        raise UserError(
            f"{where}: has {len(chosen)} clips for protocol {protocol.name}, which takes {clips.count}; give the whole "
            f"set, or take --clips {len(chosen)}, whose scores are those of another protocol"
        )
    return chosen[: clips.count]


def _balanced(
    items: Sequence[T], label_of: Callable[[T], int | None], per_class: int, seed: int, where: str
) -> list[T]:
    """`per_class` items of each class, all in one drawn order."""
    by_class: dict[int, list[T]] = {}
    for item in items:
        label = label_of(item)
        if label is None:
            raise UserError(f"{where}: clips.per_class needs each video's class; give them in folders, or in a list")
        by_class.setdefault(label, []).append(item)
    drawn: list[T] = []
    for label in sorted(by_class):
        own = by_class[label]
        if len(own) < per_class:
            raise UserError(f"{where}: class {label} has {len(own)} videos, and clips.per_class is {per_class}")
        order = generator(seed, "clips of a class", step=label).permutation(len(own))
        drawn += [own[index] for index in order[:per_class]]
    return [drawn[index] for index in generator(seed, "order of clips").permutation(len(drawn))]


def _label_in_list(source: Source) -> int | None:
    return source.label if source.label is not None else source.folder_label


def _content(path: Path) -> str:
    """SHA-256 of a file; of an .npz file that of its arrays, which does not depend on the compressor."""
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


def _joined(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
