"""What the official code does to frames before it scores them: a border on given ones, and encoding as MP4.

`through_h264` gives the same frames as its imageio writer and PyAV reader, bit for bit, wherever swscale and libx264
compute the same. It is lossy, for the truth too, and moves scores in both directions. It is reproducible at sides of
64, 128 and 256; at 32 and 48 libx264 reads memory that nobody wrote, and one video in tens comes out otherwise.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from far_scale.utils.errors import UserError

H264_BLOCK = 16
"""Frames for H.264 need sides that are multiples of it; imageio would rescale others."""
_FPS = 8
_RED = (255, 0, 0)
_CRF = "23"  # of libx264 itself: imageio's quality of 5, a crf of 25, does not reach FFmpeg's command
_ROWS_OF_A_THREAD = 32


def with_border(frames: NDArray[np.uint8], given: int) -> NDArray[np.uint8]:
    """A copy of frames `[F, H, W, 3]` with a red border of one pixel on the first `given` ones."""
    framed = frames.copy()
    for edge in (np.s_[:given, 0], np.s_[:given, -1], np.s_[:given, :, 0], np.s_[:given, :, -1]):
        framed[edge] = _RED
    return framed


def through_h264(sample: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Encode and decode both videos `[F, H, W, 3]`, side by side in one MP4, sample left.

    The F frames may hold several trajectories, one after the other. libx264's defaults, yuv420p, 8 frames a second.

    Raises:
        UserError: shapes that differ, no frames, or a side that is not a multiple of 16.
    """
    if sample.shape != truth.shape or sample.ndim != 4 or sample.shape[3] != 3 or not len(sample):
        shapes = f"{list(sample.shape)} and {list(truth.shape)}"
        raise UserError(f"frames.codec: frames of shapes {shapes}; give two of [frames, height, width, 3]")
    height, width = sample.shape[1:3]
    if height % H264_BLOCK or width % H264_BLOCK:
        raise UserError(
            f"frames.codec: h264 needs sides that are multiples of {H264_BLOCK}, and frames are {height}x{width}; "
            f"set it to none, or clips.size to such a multiple"
        )
    frames = _decode_mp4(_encode_mp4(np.concatenate([sample, truth], axis=2)))
    return frames[:, :, :width], frames[:, :, width:]


def _encode_mp4(frames: NDArray[np.uint8]) -> io.BytesIO:
    file, to_yuv = io.BytesIO(), VideoReformatter()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"crf": _CRF})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The result depends on the number of threads. libx264 takes 3 for 2 cores, and at most this number: every
        # machine with enough cores takes it (6 for 256 rows). Fixed, the result is the same on all machines.
        stream.thread_count = max(1, frames.shape[1] // _ROWS_OF_A_THREAD)
        stream.thread_type = "FRAME"  # PyAV's default cuts each frame into slices
        for index, pixels in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # FFmpeg's command converts colours with bicubic interpolation, PyAV with bilinear.
            frame = to_yuv.reformat(rgb, format="yuv420p", interpolation=Interpolation.BICUBIC)
            frame.pts, frame.time_base = index, Fraction(1, _FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file.seek(0)
    return file


def _decode_mp4(file: io.BytesIO) -> NDArray[np.uint8]:
    to_rgb = VideoReformatter()
    with av.open(file, "r") as container:
        decoded = [
            to_rgb.reformat(frame, format="rgb24", interpolation=Interpolation.BILINEAR).to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(decoded)
