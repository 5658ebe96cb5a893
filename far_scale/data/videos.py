"""Videos in and out: any file that PyAV decodes, .npz files of frames and actions, and H.264 for people to watch.

`actions[f]` is the action that led to frame f, taken between the frames f-1 and f; `actions[0]` is 0.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from far_scale.errors import UserError
from far_scale.files import atomic_write

SUFFIXES = frozenset((".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v", ".gif", ".npz"))
_DEFAULT_FPS = 25.0  # of a file that does not say
_MAY_BE_MISSING = 2  # frames: some encoders count one too many, or one that repeats the last


class BadVideo(UserError):
    """A file whose content cannot be used; that the disk or the network cannot be read is not one of these."""


@dataclass(frozen=True)
class Video:
    """One decoded video.

    Attributes:
        key: the file's name without its suffix.
        frames: uint8 [F, H, W, 3], RGB.
        actions: int64 [F], or None; `actions[f]` led to frame f.
        label: the video's class, or None.
        fps: frames a second.
        source: where it comes from, for people.
    """

    key: str
    frames: NDArray[np.uint8]
    actions: NDArray[np.int64] | None
    label: int | None
    fps: float
    source: str


def find_videos(path: str | Path) -> list[Path]:
    """The videos at `path`: itself, if it is a file, or those in the folder and its folders, sorted by path.

    Raises:
        UserError: there is nothing at `path`, or a folder without videos.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder of videos")
    # a name that begins with a dot is a file in the making (files.atomic_write), or hidden on purpose
    found = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
    if not found:
        raise UserError(f"{path}: no videos in this folder; they end in {', '.join(sorted(SUFFIXES))}")
    return sorted(file for file in found if file.is_file())


def read_video(path: str | Path) -> Video:
    """Read all frames of a video file, or of an .npz file of arrays.

    An .npz file holds `frames` uint8 [F, H, W, 3] and may hold `actions` (integers [F]), `label` (an integer) and
    `fps`; other keys are not read, and pickled objects are refused.

    Raises:
        BadVideo: it does not decode to its end, has no frames, or its arrays are not as said above.
        UserError: the file is not there or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such video")
    return _read_npz(path) if path.suffix.lower() == ".npz" else _decode(path)


def write_mp4(path: str | Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Write frames uint8 [H, W, 3] as H.264 (yuv420p, which every player plays), atomically.

    `frames` may be an array [F, H, W, 3], or make its frames one by one: none is kept after it is written. The first
    one is asked for before anything is written.

    Raises:
        UserError: no frames, another shape or dtype, sizes that differ, an odd height or width, or an fps that is
            not above 0.
    """
    path, source = Path(path), iter(frames)
    if not fps > 0:
        raise UserError(f"{path}: {fps} frames a second; it must be above 0")
    first = next(source, None)
    if first is None:
        raise UserError(f"{path}: there are no frames to write; give at least one")
    _check_picture(path, first, first.shape)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames are {height}x{width}; H.264 needs an even height and width, so pad or crop")
    with atomic_write(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # without mbtree: with AVX-512, libx264 wrote other bytes of the same frames from run to run
        stream.options = {"crf": "14", "x264-params": "mbtree=0"}
        stream.thread_count = 1  # more threads would cut the frames differently on other machines
        for frame in itertools.chain([first], source):
            _check_picture(path, frame, first.shape)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def read_actions(path: Path, frames: int) -> NDArray[np.int64]:
    """The actions [F] of a video with that many frames, out of a .npy file of their own.

    Raises:
        BadVideo: it holds no actions for these frames.
        UserError: the file is not there or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of actions")
    try:
        actions = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        _check_readable(path)
        raise BadVideo(f"{path}: no actions ({error}); write them with numpy.save") from None
    if not isinstance(actions, np.ndarray):
        raise BadVideo(f"{path}: holds several arrays; write one with numpy.save")
    return _actions(path, actions, frames)


def _decode(path: Path) -> Video:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadVideo(f"{path}: no video stream in this file")
            stream = container.streams.video[0]
            frames, end = [], 0.0
            for packet in container.demux(stream):
                damaged = packet.is_corrupt  # before it is decoded, which may end it
                for frame in packet.decode():
                    frames.append(frame.to_ndarray(format="rgb24"))
                    end = max(end, frame.time or 0.0)
                    damaged = damaged or frame.is_corrupt
                if damaged:
                    raise BadVideo(f"{path}: cut off or damaged at frame {len(frames)}; copy it again, or leave it out")
            rate = stream.average_rate or stream.guessed_rate
            missing = _missing_frames(container, stream, len(frames), end, float(rate or _DEFAULT_FPS))
    except av.error.FFmpegError as error:
        _check_readable(path)
        raise BadVideo(f"{path}: does not decode ({error.strerror}); convert it, or leave it out") from None
    if not frames:
        raise BadVideo(f"{path}: no frames in this video; leave it out")
    if missing > _MAY_BE_MISSING:
        raise BadVideo(f"{path}: cut off: the last {missing:.0f} frames are missing; copy it again, or leave it out")
    if len({frame.shape for frame in frames}) > 1:
        raise BadVideo(f"{path}: its frames change their size midway; convert it to one size")
    return Video(path.stem, np.stack(frames), None, None, float(rate or _DEFAULT_FPS), path.name)


def _missing_frames(container: Any, stream: Any, frames: int, end: float, rate: float) -> float:
    """How many frames fewer there are than the file says, of containers that a decoder takes cut off without a word.

    An AVI tells the count, a Matroska or WebM file how long its longest stream is: so with sound nothing is known.
    """
    if container.format.name == "avi":
        return float(stream.frames - frames)
    if "matroska" in container.format.name and container.duration and len(container.streams) == 1:
        return float(container.duration / av.time_base - end) * rate - 1
    return 0.0


def _check_readable(path: Path) -> None:
    """Tell a broken disk or network from a broken file: what cannot be read now may be whole.

    Raises:
        UserError: the file's bytes cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend that and run again") from None


def _read_npz(path: Path) -> Video:
    if not zipfile.is_zipfile(path):
        _check_readable(path)
        raise BadVideo(f"{path}: not a whole .npz file; write it again with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in ("frames", "actions", "label", "fps") if key in archive.files}
    except ValueError as error:
        hint = "store plain arrays only" if "pickle" in str(error).lower() else "write it again with numpy.savez"
        raise BadVideo(f"{path}: {error}; {hint}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        _check_readable(path)
        raise BadVideo(f"{path}: broken ({error}); write it again with numpy.savez") from None
    if "frames" not in arrays:
        raise BadVideo(f"{path}: no array `frames`; store uint8 [frames, height, width, 3] under that key")
    frames = arrays["frames"]
    if problem := _problem_of_frames(frames):
        raise BadVideo(f"{path}: `frames` {problem}")
    label = _number(path, arrays, "label", "iu")
    fps = _number(path, arrays, "fps", "iuf")
    if fps is not None and not fps > 0:
        raise BadVideo(f"{path}: `fps` is {fps}; it must be above 0")
    if label is not None and label < 0:
        raise BadVideo(f"{path}: `label` is {label}; classes count from 0")
    return Video(
        key=path.stem,
        frames=frames,
        actions=_actions(path, arrays["actions"], len(frames)) if "actions" in arrays else None,
        label=None if label is None else int(label),
        fps=_DEFAULT_FPS if fps is None else float(fps),
        source=path.name,
    )


def _problem_of_frames(frames: NDArray[Any]) -> str | None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        return f"are {frames.dtype} {list(frames.shape)}; they must be uint8 [frames, height, width, 3]"
    if 0 in frames.shape:
        return f"are empty: {list(frames.shape)}"
    return None


def _check_picture(path: Path, frame: NDArray[Any], shape: tuple[int, ...]) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise UserError(f"{path}: a frame is {frame.dtype} {list(frame.shape)}; it must be uint8 [height, width, 3]")
    if frame.shape != shape:
        raise UserError(f"{path}: frames are {list(shape)} and {list(frame.shape)}; they must have one size")


def _actions(path: Path, actions: NDArray[Any], frames: int) -> NDArray[np.int64]:
    if actions.dtype.kind not in "iu" or actions.ndim != 1:
        raise BadVideo(f"{path}: `actions` are {actions.dtype} {list(actions.shape)}; they must be integers [frames]")
    if len(actions) != frames:
        raise BadVideo(f"{path}: {len(actions)} actions for {frames} frames; store one a frame (0 for the first)")
    if actions.min() < 0:
        raise BadVideo(f"{path}: action {actions.min()} in `actions`; actions count from 0")
    return actions.astype(np.int64)


def _number(path: Path, arrays: Mapping[str, NDArray[Any]], key: str, kinds: str) -> float | int | None:
    """The scalar under `key`, None where there is none."""
    if key not in arrays:
        return None
    value = arrays[key]
    if value.ndim != 0 or value.dtype.kind not in kinds:
        what = "an integer" if kinds == "iu" else "a number"
        raise BadVideo(f"{path}: `{key}` is {value.dtype} {list(value.shape)}; it must be {what}")
    number: float | int = value.item()
    return number
