"""Reads the sources of an encoding: videos (transformed to square frames), or latents from the official code.

Extracted latents are a .pt file per video, one tensor [F, C, H, W], unscaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far_scale.data.encode.job import EncodingJob
from far_scale.data.shards.errors import Mismatch
from far_scale.data.shards.manifest import DTYPES
from far_scale.data.shards.tensor_formats import BrokenFileError, load_torch, plain_tensor
from far_scale.data.video.containers import BadVideo, check_readable
from far_scale.data.video.decode import DEFAULT_FPS
from far_scale.data.video.sources import Source
from far_scale.data.video.videos import Video, read_actions, read_label, read_video
from far_scale.utils.errors import UserError

LATENTS_SUFFIX = ".pt"


@dataclass(frozen=True)
class SourceData:
    """The data of one source.

    Attributes:
        data: `far_scale.data.video.transforms.Frames` as a tensor, or latents [F, C, H, W].
    """

    source: Source
    data: Tensor
    actions: Tensor | None
    label: int | None
    fps: float


class SourceReader:
    """Reads sources of one job; keeps the last video, since its mirrored sample comes next.

    Args:
        pin_memory: pin frames, so that their copy to a GPU is asynchronous.
    """

    def __init__(self, job: EncodingJob, pin_memory: bool) -> None:
        self._job, self._pin_memory = job, pin_memory
        self._last: tuple[Path, Video] | None = None

    def read(self, source: Source) -> SourceData:
        """Read a source.

        Raises:
            BadVideo: its content cannot be used.
            UserError: a file cannot be read.
        """
        for path in (source.path, source.actions):
            if path is not None and not path.is_file():
                problem = "is no plain file; put one there" if path.exists() else "there is no such file; put it back"
                raise BadVideo(f"{path}: {problem}, or leave the video out")
        return self._read_latents(source) if source.path.suffix == LATENTS_SUFFIX else self._read_video(source)

    def _read_video(self, source: Source) -> SourceData:
        transform, has_actions = self._job.transform, self._job.facts.actions > 0
        if self._last is None or self._last[0] != source.path:
            self._last = None  # frees its memory first
            video = read_video(source.path, has_actions, source.actions, transform.stride, transform.resize_frames)
            self._last = source.path, video
        video = self._last[1]
        self._check_length(source, len(video.frames))
        cropped = transform.crop_frames(video.frames, source.key)
        if source.flip:
            cropped = cropped[:, :, ::-1]
        frames = torch.from_numpy(np.ascontiguousarray(cropped))
        if self._pin_memory:
            frames = frames.pin_memory()
        actions = None if video.actions is None else torch.from_numpy(video.actions)
        return SourceData(source, frames, actions, self._label(source, video.label), float(video.fps))

    def _read_latents(self, source: Source) -> SourceData:
        facts, stride = self._job.facts, self._job.transform.stride
        latents = read_latents(source.path, facts.latent_shape, facts.latent_dtype)
        actions = None
        if facts.actions and source.actions is not None:
            actions = torch.from_numpy(read_actions(source.actions, len(latents)))[::stride]
        self._check_length(source, len(latents[::stride]))
        return SourceData(source, latents[::stride], actions, self._label(source, None), DEFAULT_FPS / stride)

    def _label(self, source: Source, video_label: int | None) -> int | None:
        """The class of a source: from the list, else from the video, else from its sidecar, else from its folder.

        Raises:
            BadVideo: it has none.
        """
        if not self._job.facts.labels:
            return None
        if source.label is not None:
            return source.label
        if video_label is None and source.label_sidecar is not None:
            video_label = read_label(source.label_sidecar)
        if video_label is None and source.folder_label is None:
            raise BadVideo(f"{source.path}: has no label, and its folder's name is none of the classes; give it one")
        return video_label if video_label is not None else source.folder_label

    def _check_length(self, source: Source, frames: int) -> None:
        if frames < self._job.min_frames:
            raise BadVideo(f"{source.path}: {frames} frames, fewer than the {self._job.min_frames} of --min-frames")


def read_latents(path: Path, shape: tuple[int, int, int], dtype: str) -> Tensor:
    """Read extracted latents in the dtype of a shard set ("bfloat16" or "float16").

    Half precision is taken bit for bit. float32 is rounded, as in the official trainer with half precision.

    Args:
        shape: [C, H, W] of the shard set.

    Raises:
        BadVideo: not a file of torch.save (as a zip archive) with one tensor of that shape.
        UserError: the file is missing or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of latents")
    try:
        latents = plain_tensor(*load_torch(path))
    except BrokenFileError as error:
        check_readable(path)
        raise BadVideo(f"{path}: no latents ({error}); extract them again with torch.save") from None
    except Mismatch as problem:
        raise BadVideo(f"{path}: {problem}; store only one tensor [F, C, H, W]") from None
    if latents.ndim != 4 or tuple(latents.shape[1:]) != shape or not len(latents):
        raise BadVideo(
            f"{path}: latents {list(latents.shape)}, not [F, {', '.join(map(str, shape))}] as by --autoencoder and "
            "--size; give those that they were extracted with"
        )
    if latents.dtype not in (DTYPES[dtype], torch.float32):
        raise BadVideo(
            f"{path}: latents in {str(latents.dtype).removeprefix('torch.')}; give the --dtype that they have"
        )
    return latents.to(DTYPES[dtype]).contiguous()
