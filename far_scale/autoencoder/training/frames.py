"""The frames that an autoencoder is trained on: which ones a step takes follows from the seed and the step alone."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from far_scale.autoencoder.training.recipe import AutoencoderRecipe, EpisodeData, VideoData
from far_scale.data.demo.episodes import SIZE, record_episodes
from far_scale.data.video.containers import BadVideo
from far_scale.data.video.sources import Source, find_sources
from far_scale.data.video.videos import read_video
from far_scale.distributed.process_group import Processes
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

_STEPS_AHEAD = 2  # that are read while a step computes
_BAD_SHARE = 0.05  # of the videos may be unusable before training stops
_CLIPS_OF_A_VIDEO = 8  # at most, in a sample of all
_HELDOUT_VIDEOS = 64  # at most, evenly chosen


class Frames(ABC):
    """Frames to train on and held-out ones. A context manager: its end stops what reads ahead.

    Attributes:
        fingerprint: tells whether a run goes on with the frames it began with.
        size: height and width.
    """

    fingerprint: str
    size: int

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """This rank's share of the frames of `step`, uint8 [N, 3, size, size]. Ask for the steps in their order."""

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """About `count` frames that stand for all, uint8 [N, 3, size, size], the same at every call."""

    @abstractmethod
    def heldout(self) -> Tensor | None:
        """The frames that the PSNR is measured on, uint8 [N, 3, size, size], or None."""

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        return


class EpisodeFrames(Frames):
    """All frames of recorded episodes of the demo world, in memory; a step draws among all of them."""

    def __init__(
        self, recipe: AutoencoderRecipe[Any, EpisodeData], folder: Path, workers: int, processes: Processes
    ) -> None:
        """Record what is not in `folder` yet, on the main process, and read it.

        Raises:
            UserError: vizdoom is missing, or the disk is full.
        """
        self.size, self.fingerprint = SIZE, "the demo world"
        self._recipe, self._processes = recipe, processes

        def read(seeds: tuple[int, int]) -> Tensor:
            return read_frames(record_episodes(folder, range(*seeds), recipe.data.frames, workers))

        if not processes.is_main_process:  # the others read what the main process has recorded
            dist.barrier(processes.host_group)
        self._train, self._heldout = read(recipe.data.train_seeds), read(recipe.data.heldout_seeds)
        if processes.is_main_process:
            dist.barrier(processes.host_group)

    def batch(self, step: int) -> Tensor:
        random = generator(self._recipe.seed, "batch", step)
        chosen = torch.from_numpy(random.integers(0, len(self._train), self._recipe.train.batch))
        return self._train[chosen.chunk(self._processes.world_size)[self._processes.rank]]

    def sample(self, count: int) -> Tensor:
        chosen = generator(self._recipe.seed, "patches").permutation(len(self._train))[:count]
        return self._train[torch.from_numpy(chosen)]

    def heldout(self) -> Tensor:
        return self._heldout


class VideoFrames(Frames):
    """Clips of videos, read by threads while the steps before compute.

    Every epoch goes through the videos in an order of its own and takes a few frames of each, which is how the
    official code trains its autoencoders, too. A video that cannot be used is told once, and the one after it in the
    order takes its place.
    """

    def __init__(
        self,
        recipe: AutoencoderRecipe[Any, VideoData],
        workers: int,
        processes: Processes,
        say: Callable[[str], None],
    ) -> None:
        """Find the videos.

        Args:
            recipe: what to train.
            workers: threads that read.
            processes: of whose clips this rank takes its share.
            say: takes a line on a video that cannot be used.

        Raises:
            UserError: there are no videos, or a list that cannot be read.
        """
        data = recipe.data
        self.size = data.size
        self._recipe, self._data, self._processes, self._say = recipe, data, processes, say
        self._sources = _sources(f"{recipe.name}: data.videos", data.videos, data.split)
        self._heldout_sources: Sequence[Source] = ()
        if data.heldout_videos is not None:
            found = _sources(f"{recipe.name}: data.heldout_videos", data.heldout_videos, data.heldout_split)
            self._heldout_sources = found[:: -(-len(found) // _HELDOUT_VIDEOS)]
        self.fingerprint = hashlib.sha256("\n".join(source.name for source in self._sources).encode()).hexdigest()
        self._order = lru_cache(maxsize=4)(
            lambda epoch: generator(recipe.seed, "videos", epoch).permutation(len(self._sources))
        )
        self._bad: set[Path] = set()
        self._lock = Lock()  # of what is bad
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="videos")
        self._coming: dict[int, list[Future[NDArray[np.uint8]]]] = {}

    def batch(self, step: int) -> Tensor:
        clips = self._recipe.train.batch // self._data.clip_frames
        own = clips // self._processes.world_size
        for ahead in range(step, min(step + 1 + _STEPS_AHEAD, self._recipe.train.steps)):
            if ahead not in self._coming:
                first = ahead * clips + self._processes.rank * own
                self._coming[ahead] = [self._readers.submit(self._clip, first + index) for index in range(own)]
        return _channels_first([future.result() for future in self._coming.pop(step)])

    def sample(self, count: int) -> Tensor:
        clips = min(-(-count // self._data.clip_frames), _CLIPS_OF_A_VIDEO * len(self._sources))
        return _channels_first(list(self._readers.map(self._clip, range(clips))))

    def heldout(self) -> Tensor | None:
        if not self._heldout_sources:
            return None

        def read(source: Source) -> NDArray[np.uint8]:
            return cut(read_video(source.path).frames, self._data, None)

        return _channels_first(list(self._readers.map(read, self._heldout_sources)))

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _clip(self, number: int) -> NDArray[np.uint8]:
        """The clip of that number, counted from the first step on, uint8 [F, H, W, 3]."""
        for place in range(number, number + len(self._sources)):
            epoch, index = divmod(place, len(self._sources))
            path = self._sources[int(self._order(epoch)[index])].path
            if path in self._bad:
                continue
            try:
                video = read_video(path)
            except BadVideo as error:
                self._reject(path, error)
            else:
                return cut(video.frames, self._data, generator(self._recipe.seed, "clip", number))
        raise UserError(f"{self._data.videos}: data.videos: none of these videos can be used; see the lines above")

    def _reject(self, path: Path, error: BadVideo) -> None:
        with self._lock:
            if path not in self._bad:
                self._bad.add(path)
                self._say(f"left out: {error}")
            bad = len(self._bad)
        if bad > max(1, _BAD_SHARE * len(self._sources)):
            raise UserError(
                f"{self._data.videos}: data.videos: {bad} of {len(self._sources)} videos cannot be used, the last one "
                f"since {error}; mend them, or take them out"
            )


def cut(frames: NDArray[np.uint8], data: VideoData, random: np.random.Generator | None) -> NDArray[np.uint8]:
    """`data.clip_frames` frames out of a video's `frames` uint8 [F, H, W, 3], as uint8 [clip_frames, size, size, 3].

    They are data.frame_stride apart, or one where the video is too short for that; of a video with fewer frames the
    last one is repeated. All frames of a clip get the same crop and flip.

    Args:
        random: where start, crop and flip are drawn; None for the first frames, their centre, and no flip.
    """
    span = (data.clip_frames - 1) * data.frame_stride
    stride = data.frame_stride if span < len(frames) else 1
    start = 0 if random is None else int(random.integers(max(1, len(frames) - span)))
    chosen = frames[np.minimum(start + stride * np.arange(data.clip_frames), len(frames) - 1)]
    where = (0.5, 0.5) if random is None or data.crop == "center" else tuple(random.random(2))
    if random is not None and data.flip and random.random() < 0.5:
        chosen = chosen[:, :, ::-1]
    height, width = chosen.shape[1:3]
    scale = data.size / min(height, width)
    scaled = (max(data.size, round(width * scale)), max(data.size, round(height * scale)))
    left, top = (int(share * (side - data.size + 1)) for share, side in zip(where, scaled, strict=True))
    box = (left, top, left + data.size, top + data.size)
    images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in chosen)
    return np.stack([np.asarray(image.resize(scaled, Image.Resampling.BILINEAR).crop(box)) for image in images])


def read_frames(paths: Sequence[Path]) -> Tensor:
    """All frames of the videos of one size at `paths`, uint8 [N, 3, H, W]."""
    return _channels_first([read_video(path).frames for path in paths])


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1


def _sources(where: str, videos: str, split: str | None) -> list[Source]:
    """As `find_sources`, whose errors here begin with the recipe and the key."""
    try:
        return find_sources(videos, split)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _channels_first(clips: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2)
