"""Decoding of video files by PyAV: upright RGB frames and the frame rate. Incomplete files are refused."""

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

from far_scale.data.video.container_file import MAX_REORDER, StreamInfo
from far_scale.data.video.containers import BadVideo, check_container, check_mp4, check_readable

DEFAULT_FPS = 25.0  # of a file that declares none
_BLOCK = 32  # frames that are transformed together
_NOT_A_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails  # cover art, thumbnails for a player's menu
# A decoder reports damage as an error and makes up no frame. "aggressive" would refuse valid files.
_STRICT = {"err_detect": "crccheck+bitstream+buffer+explode+careful"}
_MAX_EMPTY_MPEG4 = 19  # bytes of a packet that repeats the previous frame, or whose frame was in an earlier packet
_ROTATION_TOLERANCE = 0.02  # of a display matrix: one degree, as in players

BlockTransform = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""Maps frames uint8 [n, H, W, 3] to [n, h, w, 3] as soon as they are decoded: whole videos may be too large."""


class FrameCollector:
    """Collects every `stride`-th frame of a video, and transforms the frames in blocks.

    Attributes:
        frames_seen: number of frames so far, skipped ones included.
    """

    def __init__(self, path: Path, stride: int, transform: BlockTransform | None) -> None:
        self.frames_seen = 0
        self._path, self._stride, self._transform = path, stride, transform
        self._shape: tuple[int, ...] | None = None
        self._pending: list[NDArray[np.uint8]] = []
        self._blocks: list[NDArray[Any]] = []

    def count_frame(self) -> bool:
        """Count the next frame of the video. Returns whether it is to be added."""
        self.frames_seen += 1
        return (self.frames_seen - 1) % self._stride == 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Add a frame [H, W, 3].

        Raises:
            BadVideo: its size differs from that of the frames before.
        """
        if self._shape not in (None, frame.shape):
            raise BadVideo(f"{self._path}: its frames change their size midway; convert it to one size")
        self._shape = frame.shape
        self._pending.append(frame)
        if len(self._pending) == _BLOCK:
            self._flush()

    def stack(self) -> NDArray[Any]:
        """All added frames as one array; there must be at least one."""
        self._flush()
        return np.concatenate(self._blocks)

    def _flush(self) -> None:
        if self._pending:
            block = np.stack(self._pending)
            self._blocks.append(block if self._transform is None else self._transform(block))
            self._pending.clear()


def ffmpeg_url(path: Path) -> str:
    """The URL under which FFmpeg opens a local file: it would take a file named `http:a.mp4` for an address."""
    return f"file:{path}"


def decode_video(path: Path, collector: FrameCollector) -> float:
    """Add the upright frames of a video to `collector`, and return its frame rate.

    Raises:
        BadVideo: it is truncated, does not decode to its end, or has no frames.
        UserError: it cannot be read.
    """
    try:
        with av.open(ffmpeg_url(path), metadata_errors="replace") as container:  # titles may be in any encoding
            streams = [stream for stream in container.streams.video if not stream.disposition & _NOT_A_VIDEO]
            if not streams:
                check_container(path, container.format.name, -1, 0)  # a truncated file may have lost its streams
                raise BadVideo(f"{path}: no video stream in this file")
            # cover art in a Matroska file may be an ordinary track, but not the default one
            stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
            declared = check_container(path, container.format.name, stream.index, stream.id)
            if stream.codec_context is None:
                raise BadVideo(f"{path}: in a format that PyAV does not know; convert it, or leave it out")
            stream.codec_context.options = _STRICT
            stats = _decode_stream(path, container, stream, collector)
    except av.error.FFmpegError as error:
        check_readable(path)
        check_mp4(path)
        raise BadVideo(f"{path}: does not decode ({error.strerror}); convert it, or leave it out") from None
    if not collector.frames_seen:
        raise BadVideo(f"{path}: no frames in this video; leave it out")
    if problem := stats.find_problem(declared):
        raise BadVideo(f"{path}: {problem}; copy it again, or leave it out")
    return stats.frame_rate()


class _StreamStats:
    """Counts packets and decoded frames of a stream, to find missing frames and the frame rate.

    Attributes:
        packets: with data.
        presented: packets that no edit list hides.
        frames: decoded.
    """

    def __init__(self, stream: Any) -> None:
        self.packets = self.presented = self.frames = 0
        self._codec = stream.codec_context.name
        self._tick = float(stream.time_base)
        self._rates = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        self._expected_frames = 0
        self._before_keyframe = 0  # presented packets before the first key frame
        self._has_keyframe = False
        self._keyframe_pts: int | None = None  # of the first key frame
        self._keyframe_end: int | None = None
        self._start: int | None = None  # of presented packets
        self._end: int | None = None
        self._times: list[tuple[int, int]] = []  # of presented packets: time and duration
        self._total_ticks = self._longest_ticks = 0  # durations of presented packets
        self._hidden_until = 0
        self._hidden_keyframe_late = False  # a key frame is hidden after presented packets
        self._hidden_packet_late = False  # a packet is hidden after too many to be part of a hidden beginning
        self._invisible_pts: int | None = None  # time of a preceding packet that shows nothing
        self._first_frame_pts: int | None = None
        self._last_frame_pts: int | None = None
        self._has_fields = False

    def add_packet(self, packet: Any) -> None:
        """Count a packet with data, before it is decoded."""
        self.packets += 1
        if packet.is_discard:
            self._hidden_until = max(self._hidden_until, packet.pts or 0)
            self._hidden_packet_late = self._hidden_packet_late or self.presented >= MAX_REORDER
            self._hidden_keyframe_late = self._hidden_keyframe_late or (packet.is_keyframe and self.presented > 0)
            return
        self.presented += 1
        pts, duration = packet.dts if packet.pts is None else packet.pts, packet.duration or 0
        self._total_ticks += duration
        self._longest_ticks = max(self._longest_ticks, duration)
        if pts is not None:
            self._times.append((pts, duration))
            self._start = pts if self._start is None else min(self._start, pts)
            self._end = pts + duration if self._end is None else max(self._end, pts + duration)
        if not self._has_keyframe:
            if not packet.is_keyframe:
                self._before_keyframe += 1
                return
            self._has_keyframe, self._keyframe_pts, self._keyframe_end = True, pts, self._end
        elif self._precedes_keyframe(pts):
            return
        if self._invisible_pts is not None and (pts is None or pts - self._invisible_pts > max(duration / 2, 1)):
            self._expected_frames += 1  # there is a gap where its frame was
        self._invisible_pts = None
        if self._codec == "vp8" and not memoryview(packet)[0] & 0x10:
            self._invisible_pts = pts  # only a reference; the next packet has about the same time
        elif self._codec != "mpeg4" or packet.size > _MAX_EMPTY_MPEG4:
            self._expected_frames += 1

    def add_frame(self, frame: Any) -> None:
        """Count a decoded frame."""
        self.frames += 1
        # the two fields of an interlaced frame may be in packets of their own
        self._has_fields = self._has_fields or (frame.interlaced_frame and self._codec in ("h264", "mpeg2video"))
        if frame.pts is not None:
            first, last = self._first_frame_pts, self._last_frame_pts
            self._first_frame_pts = frame.pts if first is None else min(first, frame.pts)
            self._last_frame_pts = frame.pts if last is None else max(last, frame.pts)

    def find_problem(self, declared: StreamInfo) -> str | None:
        """Describe which frames are missing, compared with what the container declares; None if none are."""
        if (
            declared.packets is not None
            and self.presented < declared.packets
            and not self._hidden_by_edit_list(declared)
        ):
            return f"{declared.packets - self.presented} of its {declared.packets} frames are missing"
        expected = self._expected_frames if self._has_keyframe else self._before_keyframe
        if self.frames < (expected / 2 if self._has_fields else expected):
            return f"{expected - self.frames} of its {expected} frames do not decode"
        return None

    def frame_rate(self) -> float:
        """Frames per second: as declared if the frames' times agree with that, otherwise computed from the times."""
        declared = self._rates[0] if self._rates else DEFAULT_FPS
        first, last = self._first_frame_pts, self._last_frame_pts
        if self.frames < 2 or first is None or last is None or first == last:
            return declared
        span, gaps = (last - first) * self._tick, self.frames - 1
        for rate in self._rates:  # times are rounded to ticks
            if abs(span - gaps / rate) <= 2 * self._tick + 1e-4 * span:
                return rate
        return gaps / span

    def _precedes_keyframe(self, pts: int | None) -> bool:
        """Whether a packet stored after the first key frame is presented before it, predicted from frames cut away.

        FFmpeg gives no time to such packets of a Matroska file if their time would be below 0.
        """
        if self._keyframe_pts is None:
            return False
        return self._end == self._keyframe_end if pts is None else pts < self._keyframe_pts

    def _hidden_by_edit_list(self, declared: StreamInfo) -> bool:
        """Whether missing packets are hidden by an edit list, as far as the declared durations agree with that."""
        if declared.edits is None:  # fragments: a beginning may be hidden
            hides_beginning = (
                self._start is not None and self._hidden_until < self._start and not self._hidden_keyframe_late
            )
            return self.packets == declared.packets and hides_beginning
        edits, frame = declared.edits, self._longest_ticks * self._tick
        return (
            edits.presented is not None
            and edits.presented >= frame
            and edits.offsets_agree
            # a group of pictures that was cut open has frames that count in only one of the two
            and (
                abs(edits.media - edits.samples) <= max(4 * frame, 0.01 * edits.media)
                or abs(edits.media - edits.last_end) <= frame
            )
            and abs(edits.track - edits.presented) <= frame
            # it may begin within a frame
            and edits.presented - (self._total_ticks + self._gaps_at_end()) * self._tick < 0.99 * frame
        )

    def _gaps_at_end(self) -> int:
        """Ticks without a frame at the end, where a copy was cut between reordered frames.

        0 where packets after the beginning are hidden: then the file continues after them.
        """
        if self._hidden_packet_late or self._start is None or self._hidden_until > self._start:
            return 0
        last = sorted(self._times)[-MAX_REORDER:]
        return sum(max(0, later - pts - duration) for (pts, duration), (later, _) in itertools.pairwise(last))


def _decode_stream(path: Path, container: Any, stream: Any, collector: FrameCollector) -> _StreamStats:
    to_rgb = VideoReformatter()  # one for all frames: building its tables costs more than converting a small frame
    stats = _StreamStats(stream)
    for packet in container.demux(stream):
        is_damaged = packet.is_corrupt  # read before decoding, which may free the packet
        if packet.size:
            stats.add_packet(packet)
        elif packet.dts is not None:
            continue  # Theora repeats the previous frame; the empty packet that flushes the decoder has no time
        for frame in packet.decode():
            stats.add_frame(frame)
            if collector.count_frame():
                rgb: Any = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                collector.add(_rotate_upright(path, frame, rgb))
            is_damaged = is_damaged or frame.is_corrupt
        if is_damaged:
            raise BadVideo(
                f"{path}: cut off or damaged at frame {collector.frames_seen}; copy it again, or leave it out"
            )
    return stats


def _rotate_upright(path: Path, frame: Any, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rotate and flip a frame [H, W, 3] by its display matrix: phones store frames as the sensor sees them.

    Raises:
        BadVideo: the rotation is not a multiple of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if max(abs(b), abs(c)) <= _ROTATION_TOLERANCE * max(abs(a), abs(d)):
        flip_x, flip_y = a < 0, d < 0
    elif max(abs(a), abs(d)) <= _ROTATION_TOLERANCE * max(abs(b), abs(c)):
        rgb, flip_x, flip_y = rgb.swapaxes(0, 1), c < 0, b < 0
    else:
        raise BadVideo(f"{path}: turned by {frame.rotation} degrees, not a multiple of 90; convert it, or leave it out")
    return rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
