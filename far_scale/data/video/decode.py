"""Decoding of video files by PyAV: upright frames, all of them or none, and how many there are in a second."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from far_scale.data.video.container_file import MOST_BEHIND, Said
from far_scale.data.video.containers import BadVideo, check_container, check_mp4, check_readable

DEFAULT_FPS = 25.0  # of a file that does not say
_BLOCK = 32  # frames that are shrunk together
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails  # the cover of a song, pictures for a player's menu
# What a decoder notices is an error then, and no frame is made up. "aggressive" would refuse right files.
_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode+careful"}
_LONGEST_EMPTY_MPEG4 = 19  # bytes; these say that the frame before is shown again, or that it came already
_ABOUT_0 = 0.02  # of a display matrix: one degree, as players have it

Shrink = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""Makes frames uint8 [n, H, W, 3] into [n, h, w, 3], as soon as they are decoded: whole videos may be too large."""


class Kept:
    """The frames of a video that are kept: every n-th one, shrunk a block at a time.

    Attributes:
        seen: all frames so far, with those that are not kept.
    """

    def __init__(self, path: Path, stride: int, shrink: Shrink | None) -> None:
        self.seen = 0
        self._path, self._stride, self._shrink = path, stride, shrink
        self._shape: tuple[int, ...] | None = None
        self._waiting: list[NDArray[np.uint8]] = []
        self._done: list[NDArray[Any]] = []

    def wants_next(self) -> bool:
        """Whether the next frame is one to keep; it counts as seen."""
        self.seen += 1
        return (self.seen - 1) % self._stride == 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Keep a frame [H, W, 3].

        Raises:
            BadVideo: it has another size than those before.
        """
        if self._shape not in (None, frame.shape):
            raise BadVideo(f"{self._path}: its frames change their size midway; convert it to one size")
        self._shape = frame.shape
        self._waiting.append(frame)
        if len(self._waiting) == _BLOCK:
            self._flush()

    def frames(self) -> NDArray[Any]:
        """All frames that were kept; there must be one at least."""
        self._flush()
        return np.concatenate(self._done)

    def _flush(self) -> None:
        if self._waiting:
            block = np.stack(self._waiting)
            self._done.append(block if self._shrink is None else self._shrink(block))
            self._waiting.clear()


def as_file(path: Path) -> str:
    """The name by which FFmpeg opens a file, whatever it is called: `http:a.mp4` alone would be sought in the net."""
    return f"file:{path}"


def decode(path: Path, kept: Kept) -> float:
    """Add a video's frames to `kept`, upright, and return how many it has in a second.

    Raises:
        BadVideo: it is cut off, does not decode to its end, or has no frames.
        UserError: it cannot be read.
    """
    try:
        with av.open(as_file(path), metadata_errors="replace") as container:  # titles may be in any encoding
            streams = [one for one in container.streams.video if not one.disposition & _NO_FILM]
            if not streams:
                check_container(path, container.format.name, -1, 0)  # what is cut off may have lost them
                raise BadVideo(f"{path}: no video stream in this file")
            # a cover in a Matroska file may be a track like any other, but not the one to be played
            stream = next((one for one in streams if one.disposition & Disposition.default), streams[0])
            said = check_container(path, container.format.name, stream.index, stream.id)
            if stream.codec_context is None:
                raise BadVideo(f"{path}: in a format that PyAV does not know; convert it, or leave it out")
            stream.codec_context.options = _STRICT
            seen = _decode(path, container, stream, kept)
    except av.error.FFmpegError as error:
        check_readable(path)
        check_mp4(path)
        raise BadVideo(f"{path}: does not decode ({error.strerror}); convert it, or leave it out") from None
    if not kept.seen:
        raise BadVideo(f"{path}: no frames in this video; leave it out")
    if problem := seen.problem(said):
        raise BadVideo(f"{path}: {problem}; copy it again, or leave it out")
    return seen.rate()


class _Seen:
    """What came out of a file: of its packets, and of the frames decoded from them.

    Attributes:
        packets: with data.
        shown: those that are not hidden by an edit list.
        frames: decoded.
    """

    def __init__(self, stream: Any) -> None:
        self.packets = self.shown = self.frames = self._due = self._early = 0
        self._has_key = False
        self._codec = stream.codec_context.name
        self._tick = float(stream.time_base)
        self._rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        self._first_key: int | None = None
        self._key_end: int | None = None
        self._start: int | None = None  # of packets that are shown
        self._end: int | None = None
        self._hidden_until = 0
        self._hidden_group = False  # behind packets that are shown
        self._hidden_late = False  # one behind so many of them that it cannot belong to the hidden beginning
        self._times: list[tuple[int, int]] = []  # of packets that are shown: time and length
        self._unseen: int | None = None  # the time of a packet that shows nothing
        self._first: int | None = None  # of frames
        self._last: int | None = None
        self._length = self._longest = 0  # of packets, in ticks: of all, of the longest
        self._fields = False

    def add_packet(self, packet: Any) -> None:
        """Count a packet with data, before it is decoded."""
        self.packets += 1
        if packet.is_discard:
            self._hidden_until = max(self._hidden_until, packet.pts or 0)
            self._hidden_late = self._hidden_late or self.shown >= MOST_BEHIND
            self._hidden_group = self._hidden_group or (packet.is_keyframe and self.shown > 0)
            return
        self.shown += 1
        pts, length = packet.dts if packet.pts is None else packet.pts, packet.duration or 0
        self._length += length
        self._longest = max(self._longest, length)
        if pts is not None:
            self._times.append((pts, length))
            self._start = pts if self._start is None else min(self._start, pts)
            self._end = pts + length if self._end is None else max(self._end, pts + length)
        if not self._has_key:
            if not packet.is_keyframe:
                self._early += 1
                return
            self._has_key, self._first_key, self._key_end = True, pts, self._end
        elif self._before_key(pts):
            return
        if self._unseen is not None and (pts is None or pts - self._unseen > max(length / 2, 1)):
            self._due += 1  # there is a gap where its frame was
        self._unseen = None
        if self._codec == "vp8" and not memoryview(packet)[0] & 0x10:
            self._unseen = pts  # only predicted from; the next one has about the same time
        elif self._codec != "mpeg4" or packet.size > _LONGEST_EMPTY_MPEG4:
            self._due += 1

    def add_frame(self, frame: Any) -> None:
        """Count a decoded frame."""
        self.frames += 1
        # the two fields of an interlaced frame may lie in packets of their own
        self._fields = self._fields or (frame.interlaced_frame and self._codec in ("h264", "mpeg2video"))
        if frame.pts is not None:
            self._first = frame.pts if self._first is None else min(self._first, frame.pts)
            self._last = frame.pts if self._last is None else max(self._last, frame.pts)

    def problem(self, said: Said) -> str | None:
        """What is missing, compared with what the container says."""
        if said.packets is not None and self.shown < said.packets and not self._hidden(said):
            return f"{said.packets - self.shown} of its {said.packets} frames are missing"
        due = self._due if self._has_key else self._early
        if self.frames < (due / 2 if self._fields else due):
            return f"{due - self.frames} of its {due} frames do not decode"
        return None

    def _before_key(self, pts: int | None) -> bool:
        """Whether a packet behind the first key frame is shown before it, predicted from what was cut away.

        FFmpeg gives no time to such packets of a Matroska file that would have a time below 0.
        """
        if self._first_key is None:
            return False
        return self._end == self._key_end if pts is None else pts < self._first_key

    def _hidden(self, said: Said) -> bool:
        """Whether it is an edit list that hides packets, as far as what is said of times agrees."""
        if said.edits is None:  # fragments: a beginning may be hidden
            begins = self._start is not None and self._hidden_until < self._start and not self._hidden_group
            return self.packets == said.packets and begins
        edits, frame = said.edits, self._longest * self._tick
        return (
            edits.shown is not None
            and edits.shown >= frame
            and edits.offsets_agree
            # a group that was cut open has frames that count in one of the two only
            and (
                abs(edits.media - edits.samples) <= max(4 * frame, 0.01 * edits.media)
                or abs(edits.media - edits.end) <= frame
            )
            and abs(edits.track - edits.shown) <= frame
            # it may begin within a frame
            and edits.shown - (self._length + self._gaps_at_end()) * self._tick < 0.99 * frame
        )

    def _gaps_at_end(self) -> int:
        """Ticks at the end in which nothing is shown, since a copy was cut between frames that change their order.

        Where packets are hidden that do not belong to the beginning, the file goes on, and there are none.
        """
        if self._hidden_late or self._start is None or self._hidden_until > self._start:
            return 0
        last = sorted(self._times)[-MOST_BEHIND:]
        return sum(max(0, later - pts - length) for (pts, length), (later, _) in itertools.pairwise(last))

    def rate(self) -> float:
        """Frames a second: as the file says, if its frames' times agree with that, or else by these times."""
        said = self._rates[0] if self._rates else DEFAULT_FPS
        if self.frames < 2 or self._first is None or self._last is None or self._first == self._last:
            return said
        span, gaps = (self._last - self._first) * self._tick, self.frames - 1
        for rate in self._rates:  # times are rounded to ticks
            if abs(span - gaps / rate) <= 2 * self._tick + 1e-4 * span:
                return rate
        return gaps / span


def _decode(path: Path, container: Any, stream: Any, kept: Kept) -> _Seen:
    to_rgb = VideoReformatter()  # one for all frames: making its tables costs more than converting a small frame
    seen = _Seen(stream)
    for packet in container.demux(stream):
        damaged = packet.is_corrupt  # before it is decoded, which may end it
        if packet.size:
            seen.add_packet(packet)
        elif packet.dts is not None:
            continue  # Theora's way to show the frame before again; the last packet of all, which ends it, has no time
        for frame in packet.decode():
            seen.add_frame(frame)
            if kept.wants_next():
                picture: Any = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                kept.add(_upright(path, frame, picture))
            damaged = damaged or frame.is_corrupt
        if damaged:
            raise BadVideo(f"{path}: cut off or damaged at frame {kept.seen}; copy it again, or leave it out")
    return seen


def _upright(path: Path, frame: Any, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn and flip a picture [H, W, 3] as the file asks players to: telephones store what the sensor sees.

    Raises:
        BadVideo: it is turned by something else than a multiple of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if max(abs(b), abs(c)) <= _ABOUT_0 * max(abs(a), abs(d)):
        across, down = a < 0, d < 0
    elif max(abs(a), abs(d)) <= _ABOUT_0 * max(abs(b), abs(c)):
        picture, across, down = picture.swapaxes(0, 1), c < 0, b < 0
    else:
        raise BadVideo(f"{path}: turned by {frame.rotation} degrees, no multiple of 90; convert it, or leave it out")
    return picture[:: -1 if down else 1, :: -1 if across else 1]
