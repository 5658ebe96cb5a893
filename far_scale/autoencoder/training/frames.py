"""Training frames of an autoencoder; those of a step depend only on the seed and the step."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from far_scale.autoencoder.training.recipe import EpisodeData, VideoData
from far_scale.data.demo.episodes import record_episodes
from far_scale.data.demo.world import SIZE
from far_scale.data.video.containers import BadVideo
from far_scale.data.video.sources import Source, find_sources
from far_scale.data.video.videos import read_video
from far_scale.distributed.process_group import Processes
from far_scale.utils.errors import UserError
from far_scale.utils.rng import generator

_STEPS_AHEAD = 2  # steps read ahead while one computes
_MAX_BAD_FRACTION = 0.05  # of unusable videos before training stops
_MAX_CLIPS_PER_VIDEO = 8  # in `sample`
_MAX_HELDOUT_VIDEOS = 64  # evenly spaced in the list


class FrameSource(ABC):
    """Training and held-out frames. A context manager: its exit stops the read-ahead.

    Attributes:
        fingerprint: identifies the training frames, to detect a change on resume.
        size: height and width.
    """

    fingerprint: str
    size: int

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """This rank's part of the batch of `step`, uint8 [N, 3, size, size]; call it with increasing steps."""

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """About `count` representative training frames, uint8 [N, 3, size, size], the same at every call."""

    @abstractmethod
    def heldout(self) -> Tensor | None:
        """The frames for the PSNR, uint8 [N, 3, size, size], or None."""

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *_: object) -> None:
        return


class EpisodeFrames(FrameSource):
    """All frames of recorded episodes of the demo world, in memory; each step samples from all of them."""

    def __init__(
        self, data: EpisodeData, seed: int, batch: int, folder: Path, workers: int, processes: Processes
    ) -> None:
        """Record missing episodes to `folder`, on the main process, and read all of them.

        Args:
            data: the recipe's data section.
            seed: of the batches.
            batch: frames of a step over all ranks.
            folder: of the episodes.
            workers: processes that record.
            processes: the ranks that share the batch.

        Raises:
            UserError: vizdoom is missing, or the disk is full.
        """
        self.size, self.fingerprint = SIZE, "the demo world"
        self._seed, self._batch, self._processes = seed, batch, processes

        def read(seeds: tuple[int, int]) -> Tensor:
            return read_frames(record_episodes(folder, range(*seeds), data.frames, workers))

        if not processes.is_main_process:  # other ranks wait until the main process has recorded
            dist.barrier(processes.host_group)
        self._train, self._heldout = read(data.train_seeds), read(data.heldout_seeds)
        if processes.is_main_process:
            dist.barrier(processes.host_group)

    def batch(self, step: int) -> Tensor:
        random = generator(self._seed, "batch", step)
        indices = torch.from_numpy(random.integers(0, len(self._train), self._batch))
        return self._train[indices.chunk(self._processes.world_size)[self._processes.rank]]

    def sample(self, count: int) -> Tensor:
        indices = generator(self._seed, "patches").permutation(len(self._train))[:count]
        return self._train[torch.from_numpy(indices)]

    def heldout(self) -> Tensor:
        return self._heldout


class VideoFrames(FrameSource):
    """Clips of videos, read ahead by threads.

    Every epoch goes through all videos in a new order and takes a few frames of each, as the official code does. An
    unusable video is logged once and replaced by the next one in the order.
    """

    def __init__(
        self,
        data: VideoData,
        seed: int,
        batch: int,
        steps: int,
        workers: int,
        processes: Processes,
        log: Callable[[str], None],
    ) -> None:
        """Find the videos.

        Args:
            data: the recipe's data section.
            seed: of order, clips, crops and flips.
            batch: frames of a step over all ranks.
            steps: of the training; nothing is read ahead beyond them.
            workers: threads that read.
            processes: the ranks that share the clips of a step.
            log: called with a line about each unusable video.

        Raises:
            UserError: no videos, or an unreadable list.
        """
        self.size = data.size
        self._data, self._seed, self._steps, self._processes, self._log = data, seed, steps, processes, log
        self._clips = batch // data.clip_frames
        self._sources = _find_sources("data.videos", data.videos, data.split)
        self._heldout_sources: Sequence[Source] = ()
        if data.heldout_videos is not None:
            found = _find_sources("data.heldout_videos", data.heldout_videos, data.heldout_split)
            self._heldout_sources = found[:: -(-len(found) // _MAX_HELDOUT_VIDEOS)]
        self.fingerprint = hashlib.sha256("\n".join(source.name for source in self._sources).encode()).hexdigest()
        self._order = lru_cache(maxsize=4)(
            lambda epoch: generator(seed, "videos", epoch).permutation(len(self._sources))
        )
        self._bad: set[Path] = set()
        self._lock = Lock()  # of self._bad
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="videos")
        self._pending: dict[int, list[Future[NDArray[np.uint8]]]] = {}

    def batch(self, step: int) -> Tensor:
        clips = self._clips // self._processes.world_size
        for ahead in range(step, min(step + 1 + _STEPS_AHEAD, self._steps)):
            if ahead not in self._pending:
                first = ahead * self._clips + self._processes.rank * clips
                self._pending[ahead] = [self._readers.submit(self._read_clip, first + index) for index in range(clips)]
        return _channels_first([future.result() for future in self._pending.pop(step)])

    def sample(self, count: int) -> Tensor:
        clips = min(-(-count // self._data.clip_frames), _MAX_CLIPS_PER_VIDEO * len(self._sources))
        return _channels_first(list(self._readers.map(self._read_clip, range(clips))))

    def heldout(self) -> Tensor | None:
        if not self._heldout_sources:
            return None

        def read(source: Source) -> NDArray[np.uint8]:
            return cut_clip(read_video(source.path).frames, self._data, None)

        return _channels_first(list(self._readers.map(read, self._heldout_sources)))

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _read_clip(self, number: int) -> NDArray[np.uint8]:
        """Read clip `number`, counted from the first step, uint8 [F, H, W, 3]."""
        for position in range(number, number + len(self._sources)):
            epoch, index = divmod(position, len(self._sources))
            path = self._sources[int(self._order(epoch)[index])].path
            if path in self._bad:
                continue
            try:
                video = read_video(path)
            except BadVideo as error:
                self._reject(path, error)
            else:
                return cut_clip(video.frames, self._data, generator(self._seed, "clip", number))
        raise UserError(f"{self._data.videos}: data.videos: none of these videos can be used; see the lines above")

    def _reject(self, path: Path, error: BadVideo) -> None:
        with self._lock:
            if path not in self._bad:
                self._bad.add(path)
                self._log(f"left out: {error}")
            bad = len(self._bad)
        if bad > max(1, _MAX_BAD_FRACTION * len(self._sources)):
            raise UserError(
                f"{self._data.videos}: data.videos: {bad} of {len(self._sources)} videos cannot be used, the last one "
                f"because of {error}; fix or remove them"
            )


def cut_clip(frames: NDArray[np.uint8], data: VideoData, random: np.random.Generator | None) -> NDArray[np.uint8]:
    """Take a clip from a video's `frames` uint8 [F, H, W, 3], as uint8 [data.clip_frames, size, size, 3].

    Frames are data.frame_stride apart, or adjacent where the video is too short; the last frame of a still shorter
    video is repeated. All frames of a clip get the same crop and flip.

    Args:
        random: draws start, crop and flip; None for the first frames, the centre and no flip.
    """
    span = (data.clip_frames - 1) * data.frame_stride
    stride = data.frame_stride if span < len(frames) else 1
    start = 0 if random is None else int(random.integers(max(1, len(frames) - span)))
    clip = frames[np.minimum(start + stride * np.arange(data.clip_frames), len(frames) - 1)]
    position = (0.5, 0.5) if random is None or data.crop == "center" else tuple(random.random(2))
    if random is not None and data.flip and random.random() < 0.5:
        clip = clip[:, :, ::-1]
    height, width = clip.shape[1:3]
    scale = data.size / min(height, width)
    scaled = (max(data.size, round(width * scale)), max(data.size, round(height * scale)))
    left, top = (int(fraction * (side - data.size + 1)) for fraction, side in zip(position, scaled, strict=True))
    box = (left, top, left + data.size, top + data.size)
    images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in clip)
    return np.stack([np.asarray(image.resize(scaled, Image.Resampling.BILINEAR).crop(box)) for image in images])


def read_frames(paths: Sequence[Path]) -> Tensor:
    """Read all frames of videos of the same size, uint8 [N, 3, H, W]."""
    return _channels_first([read_video(path).frames for path in paths])


def to_pixels(frames: Tensor) -> Tensor:
    """Map uint8 to float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1


def _find_sources(key: str, videos: str, split: str | None) -> list[Source]:
    """As `find_sources`; errors name the recipe key."""
    try:
        return find_sources(videos, split)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _channels_first(clips: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2)
