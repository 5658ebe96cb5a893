"""The border and the way through an MP4; benchmarks/official_metrics.py compares them with the official code."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from far_scale.evaluation.codec import _encode_mp4, through_h264, with_border
from far_scale.utils.errors import UserError

Pixels = NDArray[np.uint8]


def waves(frames: int, side: int = 32, phase: float = 0.0) -> Pixels:
    """Smooth colours that move: [frames, side, side, 3]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    turns = [(x + t) / side + phase, (y - t) / side + phase, (x + y) / (2 * side) - phase]
    return np.stack([127.5 + 100 * np.sin(2 * np.pi * turn) for turn in turns], axis=3).astype(np.uint8)


def test_the_border_is_one_red_pixel_on_given_frames_of_a_copy() -> None:
    frames = waves(3, 16)
    before = frames.copy()
    framed = with_border(frames, 2)
    assert (frames == before).all()
    edge = np.ones((16, 16), bool)
    edge[1:-1, 1:-1] = False
    assert (framed[:2, edge] == (255, 0, 0)).all()
    assert (framed[:2, ~edge] == frames[:2, ~edge]).all()
    assert (framed[2] == frames[2]).all()


def test_without_given_frames_nothing_gets_a_border() -> None:
    assert (with_border(waves(2, 16), 0) == waves(2, 16)).all()


def test_both_videos_come_back_lossy_in_place_and_reproducibly() -> None:
    sample, truth = waves(20, 64), waves(20, 64, phase=0.3)  # at smaller sides libx264 itself is not reproducible
    decoded = through_h264(sample, truth)
    for before, after in zip((sample, truth), decoded, strict=True):
        assert after.shape == before.shape and after.dtype == np.uint8
        error = np.abs(after.astype(int) - before).mean()
        assert 0 < error < 6
    again = through_h264(sample, truth)
    assert all((one == other).all() for one, other in zip(decoded, again, strict=True))


def test_greys_keep_their_values_and_sides() -> None:
    """A wrong range would give 30 and 218 instead of 16 and 235, or the other way round."""
    sample, truth = (np.full((4, 32, 32, 3), grey, np.uint8) for grey in (16, 235))
    left, right = through_h264(sample, truth)
    assert np.abs(left[:, :, :24].astype(int) - 16).max() <= 2
    assert np.abs(right[:, :, 8:].astype(int) - 235).max() <= 2


@pytest.mark.parametrize(("side", "threads"), [(16, 1), (64, 2), (128, 4)])
def test_libx264_gets_the_official_settings(side: int, threads: int) -> None:
    """libx264 writes its settings into the file."""
    file = _encode_mp4(waves(2, side)).getvalue()
    found = re.search(rb"cabac=1 [ -~]*", file)
    assert found is not None
    settings = dict(each.split("=") for each in found.group().decode().split())
    wanted = {"rc": "crf", "crf": "23.0", "bframes": "3", "keyint": "250", "subme": "7", "mbtree": "1"}
    wanted |= {"threads": str(threads), "sliced_threads": "0"}
    assert {key: settings[key] for key in wanted} == wanted


@pytest.mark.parametrize("shape", [(2, 24, 32, 3), (2, 32, 24, 3), (2, 33, 33, 3)])
def test_other_sides_are_refused(shape: tuple[int, ...]) -> None:
    frames = np.zeros(shape, np.uint8)
    with pytest.raises(
        UserError, match=rf"^frames.codec: h264 needs .* 16, and frames are {shape[1]}x{shape[2]}; set it"
    ):
        through_h264(frames, frames)


@pytest.mark.parametrize("frames", [1, 0])
def test_other_shapes_are_refused(frames: int) -> None:
    with pytest.raises(
        UserError, match=r"^frames.codec: frames of shapes .* give two of \[frames, height, width, 3\]$"
    ):
        through_h264(np.zeros((frames, 32, 32, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8))
