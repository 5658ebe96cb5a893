"""Reads videos (any file that PyAV decodes, .npz files of frames and actions) and writes H.264.

Keys of an .npz file are our own or those of TECO's DMLab (`video` for `frames`). `actions[f]` is the action that led to
frame f, taken between the frames f-1 and f; `actions[0]` is 0.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from far_scale.data.video.containers import BadVideo, check_readable
from far_scale.data.video.decode import DEFAULT_FPS, BlockTransform, FrameCollector, decode_video, ffmpeg_url
from far_scale.data.video.find import VIDEO_SUFFIXES as VIDEO_SUFFIXES
from far_scale.data.video.find import find_videos as find_videos
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

_FRAMES_KEYS = ("frames", "video")  # in an .npz file: ours, TECO's


@dataclass(frozen=True)
class Video:
    """One decoded video.

    Attributes:
        key: the file name without its suffix.
        frames: uint8 [F, H, W, 3], RGB; or the output of the block transform.
        actions: int64 [F], or None; `actions[f]` led to frame f.
        label: class, or None.
        fps: frames per second.
        source: origin, for messages.
    """

    key: str
    frames: NDArray[Any]
    actions: NDArray[np.int64] | None
    label: int | None
    fps: float
    source: str


def read_label(path: Path) -> int | None:
    """Read the `label` of an .npz file, of a video or beside one; None where it has none.

    Raises:
        BadVideo: the file is broken, or its label is not a class.
        UserError: the file cannot be read.
    """
    return _check_label(path, _load_arrays(path, ("label",)))


def read_video(
    path: str | Path,
    actions: bool = True,
    actions_file: Path | None = None,
    stride: int = 1,
    transform: BlockTransform | None = None,
) -> Video:
    """Read the frames of a video file, or of an .npz file of arrays.

    An .npz file holds `frames` (or `video`) uint8 [F, H, W, 3] and may hold `actions` (integers [F]), `label` (an
    integer) and `fps`; other keys are not read, and pickled objects are refused.

    Args:
        actions: read actions, if there are any; otherwise they are not checked (BAIR's are vectors).
        actions_file: read the actions from this file (see `read_actions`) instead of the .npz file.
        stride: keep every n-th frame, from the first, and its action. Actions between kept frames are dropped, as in
            the official code (`random_sample_frames` of showlab/FAR's data sets).
        transform: applied to the kept frames in blocks.

    Raises:
        BadVideo: it does not decode to its end, has no frames, or its arrays are not as above.
        UserError: the file is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such video")
    collector = FrameCollector(path, stride, transform)
    if _is_npz(path):
        video = _read_npz(path, collector, actions and actions_file is None)
    else:
        fps = decode_video(path, collector)
        video = Video(path.stem, collector.stack(), None, None, fps, path.name)
    all_actions = video.actions
    if actions and actions_file is not None:
        all_actions = read_actions(actions_file, collector.frames_seen)
    return replace(video, actions=None if all_actions is None else all_actions[::stride], fps=video.fps / stride)


def write_mp4(path: str | Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Write frames uint8 [H, W, 3] as H.264 (yuv420p, which every player supports), atomically.

    `frames` may be an array [F, H, W, 3] or a generator: no frame is kept after it is written. The first frame is
    taken before anything is written.

    Raises:
        UserError: no frames, another shape or dtype, differing sizes, an odd height or width, or an fps not above 0.
    """
    path, iterator = Path(path), iter(frames)
    if not fps > 0:
        raise UserError(f"{path}: {fps} frames a second; it must be above 0")
    first = next(iterator, None)
    if first is None:
        raise UserError(f"{path}: there are no frames to write; give at least one")
    _check_frame(path, first, first.shape)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames are {height}x{width}; H.264 needs an even height and width, so pad or crop")
    with atomic_write(path) as part, av.open(ffmpeg_url(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # no mbtree: with AVX-512, libx264 wrote different bytes for the same frames from run to run
        stream.options = {"crf": "14", "x264-params": "mbtree=0"}
        stream.thread_count = 1  # more threads would split the frames differently on other machines
        for frame in itertools.chain([first], iterator):
            _check_frame(path, frame, first.shape)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def read_actions(path: Path, frames: int) -> NDArray[np.int64]:
    """Read the actions [F] of a video of F = `frames` frames from a separate file: .npy, or .npz with `actions`.

    Raises:
        BadVideo: its content is not one action per frame.
        UserError: the file is missing or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of actions")
    if _is_npz(path):
        arrays = _load_arrays(path, ("actions", *_FRAMES_KEYS))
        if set(arrays) != {"actions"}:
            content = ", ".join(sorted(arrays)) or "neither frames nor actions"
            raise BadVideo(f"{path}: holds {content}; a file of actions has only `actions`, and a video another name")
        return _check_actions(path, arrays["actions"], frames)
    try:
        actions = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        check_readable(path)
        raise BadVideo(f"{path}: no actions ({error}); write them with numpy.save") from None
    if not isinstance(actions, np.ndarray):
        raise BadVideo(f"{path}: holds several arrays; write one with numpy.save")
    return _check_actions(path, actions, frames)


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _read_npz(path: Path, collector: FrameCollector, actions: bool) -> Video:
    arrays = _load_arrays(path, (*_FRAMES_KEYS, "label", "fps", *(["actions"] if actions else [])))
    keys = [key for key in _FRAMES_KEYS if key in arrays]
    if len(keys) != 1:
        content = "`frames` and `video`" if keys else "no array `frames` or `video`"
        raise BadVideo(f"{path}: {content}; store uint8 [frames, height, width, 3] under one of these keys")
    frames = arrays[keys[0]]
    if problem := _describe_bad_frames(frames):
        raise BadVideo(f"{path}: `{keys[0]}` {problem}")
    for frame in frames:
        if collector.count_frame():
            collector.add(frame)
    fps = _read_scalar(path, arrays, "fps", "iuf")
    if fps is not None and not fps > 0:
        raise BadVideo(f"{path}: `fps` is {fps}; it must be above 0")
    return Video(
        key=path.stem,
        frames=collector.stack(),
        actions=_check_actions(path, arrays["actions"], len(frames)) if "actions" in arrays else None,
        label=_check_label(path, arrays),
        fps=DEFAULT_FPS if fps is None else float(fps),
        source=path.name,
    )


def _load_arrays(path: Path, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Load the arrays with these keys that an .npz file has.

    Raises:
        BadVideo: it is broken, or has pickled objects.
    """
    if not zipfile.is_zipfile(path):
        check_readable(path)
        raise BadVideo(f"{path}: not a whole .npz file; write it again with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys if key in archive.files}
    except ValueError as error:
        hint = "store plain arrays only" if "pickle" in str(error).lower() else "write it again with numpy.savez"
        raise BadVideo(f"{path}: {error}; {hint}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        # zipfile raises RuntimeError or a subclass for encryption and unknown compression
        check_readable(path)
        raise BadVideo(f"{path}: broken ({error}); write it again with numpy.savez") from None


def _describe_bad_frames(frames: NDArray[Any]) -> str | None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        return f"are {frames.dtype} {list(frames.shape)}; they must be uint8 [frames, height, width, 3]"
    if 0 in frames.shape:
        return f"are empty: {list(frames.shape)}"
    return None


def _check_frame(path: Path, frame: NDArray[Any], shape: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise UserError(f"{path}: a frame is {frame.dtype} {list(frame.shape)}; it must be uint8 [height, width, 3]")
    if frame.shape != shape:
        raise UserError(f"{path}: frames are {list(shape)} and {list(frame.shape)}; they must have one size")


def _check_actions(path: Path, actions: NDArray[Any], frames: int) -> NDArray[np.int64]:
    if actions.dtype.kind not in "iu" or actions.ndim != 1:
        raise BadVideo(f"{path}: `actions` are {actions.dtype} {list(actions.shape)}; they must be integers [frames]")
    if len(actions) != frames:
        raise BadVideo(f"{path}: {len(actions)} actions for {frames} frames; store one per frame (0 for the first)")
    if actions.min() < 0:
        raise BadVideo(f"{path}: action {actions.min()} in `actions`; actions count from 0")
    return actions.astype(np.int64)


def _check_label(path: Path, arrays: Mapping[str, NDArray[Any]]) -> int | None:
    label = _read_scalar(path, arrays, "label", "iu")
    if label is not None and label < 0:
        raise BadVideo(f"{path}: `label` is {label}; classes count from 0")
    return None if label is None else int(label)


def _read_scalar(path: Path, arrays: Mapping[str, NDArray[Any]], key: str, kinds: str) -> float | int | None:
    """The scalar under `key`; None where it is missing."""
    if key not in arrays:
        return None
    value = arrays[key]
    if value.ndim != 0 or value.dtype.kind not in kinds:
        what = "an integer" if kinds == "iu" else "a number"
        raise BadVideo(f"{path}: `{key}` is {value.dtype} {list(value.shape)}; it must be {what}")
    number: float | int = value.item()
    return number
