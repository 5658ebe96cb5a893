"""Small videos in every container and codec that PyAV writes, and damage to their files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FPS = 12
_HEVC = {"x265-params": "log-level=none:pools=none:frame-threads=1:keyint=12"}


@dataclass(frozen=True)
class Kind:
    """How a video is written.

    Attributes:
        suffix: of the file.
        codec: of the pictures, as PyAV names the encoder.
        sound: the encoder of the sound, or None.
        options: of the container.
        encoding: options of the encoder.
    """

    suffix: str
    codec: str
    sound: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    encoding: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sound = f" + {self.sound}" if self.sound else ""
        return f"{self.suffix[1:]} {self.codec}{sound}{', fragments' if self.options else ''}"


KINDS = (
    Kind(".mp4", "libx264", encoding={"g": "12"}),
    Kind(".mp4", "libx264", "aac"),
    Kind(".mp4", "libx264", options={"movflags": "frag_keyframe+empty_moov"}, encoding={"g": "6"}),
    Kind(".mp4", "libx265", encoding=_HEVC),
    Kind(".mp4", "libvpx-vp9"),
    Kind(".mp4", "mpeg4"),
    Kind(".mkv", "libx264", "aac"),
    Kind(".mkv", "libx265", encoding=_HEVC),
    Kind(".mkv", "libvpx-vp9", "libopus"),
    Kind(".mkv", "mpeg4"),
    Kind(".mkv", "mjpeg"),
    Kind(".webm", "libvpx-vp9"),
    Kind(".webm", "libvpx-vp9", "libopus"),
    Kind(".webm", "libvpx"),
    Kind(".avi", "libx264"),
    Kind(".avi", "mpeg4"),
    Kind(".avi", "mpeg4", "libmp3lame"),
    Kind(".avi", "mjpeg"),
    Kind(".mov", "libx264", "aac"),
    Kind(".mov", "libx265", encoding=_HEVC),
    Kind(".mov", "mpeg4"),
    Kind(".mov", "mjpeg"),
    Kind(".gif", "gif"),
)


def moving_picture(frames: int = 24, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Frames uint8 [F, H, W, 3]: a texture that moves, and a square that moves otherwise; no two are equal."""
    texture = np.random.default_rng(1).integers(0, 256, (height // 4, width // 4 + frames, 3)).astype(np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    pictures = np.stack([texture[:, 2 * frame : 2 * frame + width] for frame in range(frames)])
    for frame, picture in enumerate(pictures):
        at = 2 * frame % (height - 12)
        picture[at : at + 12, at : at + 12] = 255 - 8 * frame % 256
    return pictures


def write_video(
    path: Path,
    frames: NDArray[np.uint8],
    codec: str,
    fps: int = FPS,
    *,
    times: Sequence[int] | None = None,
    sound: str | None = None,
    seconds: float | None = None,
    options: Mapping[str, str] | None = None,
    encoding: Mapping[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda _: None,
) -> None:
    """Write frames uint8 [F, H, W, 3].

    Args:
        codec: the name of the encoder.
        times: of the frames, in 1/fps seconds; default: 0, 1, 2 and so on.
        sound: the encoder of a tone beside the pictures.
        seconds: how long the tone is; default: as long as the pictures.
        options: of the container.
        encoding: options of the encoder.
        prepare: called with the stream before anything is encoded.
    """
    with av.open(f"file:{path}", "w", options=dict(options or {})) as container:
        stream = container.add_stream(codec, rate=fps, options=dict(encoding or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        if codec in ("mpeg4", "mjpeg"):
            stream.bit_rate = 1_000_000
        prepare(stream)
        tone = container.add_stream(sound, rate=48_000, layout="mono") if sound else None
        length = len(frames) / fps if seconds is None else seconds
        waiting = iter(_tone(tone, length)) if tone else iter(())
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = index if times is None else times[index], Fraction(1, fps)
            container.mux(stream.encode(frame))
            for _ in range(int(48_000 / fps / 960) + 1):  # the sound beside the pictures
                _mux(container, next(waiting, ()))
        container.mux(stream.encode(None))
        for packets in waiting:
            _mux(container, packets)


def _mux(container: Any, packets: Iterable[Any]) -> None:
    for packet in packets:
        container.mux(packet)


def _tone(stream: Any, seconds: float) -> Iterable[list[Any]]:
    """The packets of a tone, 20 ms after 20 ms."""
    samples = (8_000 * np.sin(np.arange(int(seconds * 48_000)) / 20)).astype(np.int16)[None]
    resampler = av.AudioResampler(format=stream.format, layout="mono", rate=48_000)
    for start in range(0, samples.shape[1], 960):
        frame = av.AudioFrame.from_ndarray(samples[:, start : start + 960], format="s16", layout="mono")
        frame.rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        yield [packet for part in resampler.resample(frame) for packet in stream.encode(part)]
    yield stream.encode(None)


DAMAGE = ("cut off", "a flipped bit", "a changed byte", "zeros", "a part removed", "a part twice")


def damage(whole: bytes, kind: str, chance: random.Random) -> bytes:
    """The bytes of a file with damage of that kind (one of DAMAGE) at a random place."""
    at, size = chance.randrange(1, len(whole)), chance.choice((1, 16, 64, 512, 4096))
    before, after = whole[:at], whole[at + size :]
    if kind == "cut off":
        return before
    if kind == "a flipped bit":
        return before + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
    if kind == "a changed byte":
        return before + bytes([whole[at] ^ chance.randrange(1, 256)]) + whole[at + 1 :]
    if kind == "zeros":
        return before + bytes(len(whole[at : at + size])) + after
    return before + (after if kind == "a part removed" else whole[at : at + size] + whole[at:])
