"""Figures with known values, and pictures that show what they claim to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from far_scale.errors import UserError
from far_scale.sampling.metrics import PSNR_CAP, compare, frame_ssim, quality
from far_scale.sampling.pictures import (
    BORDER,
    CAPTION_HEIGHT,
    CAPTION_WIDTH,
    GIVEN_COLOUR,
    loss_curve,
    sample_sheet,
    sample_video,
)


def grey(value: float, clips: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.full((clips, frames, 3, 16, 16), value)


def test_known_psnr() -> None:
    # mean squared error 0.01 and 0.0001 at a range of 1: 20 and 40 dB; over clips and frames the errors are averaged
    frames = grey(0.5)
    frames[:, 0] += 0.1
    frames[0, 1] += 0.1
    frames[:, 2] += 0.01
    result = quality(frames, grey(0.5))
    assert result["psnr_per_frame"] == pytest.approx([20.0, 10 * math.log10(1 / 0.005), 40.0], abs=1e-3)
    assert result["psnr"] == pytest.approx(10 * math.log10(6 / (0.01 * 3 + 0.0001 * 2)), abs=1e-3)


def test_one_exact_frame_does_not_rule_the_mean() -> None:
    frames = grey(0.5)
    frames[:, 1:] += 0.1
    assert quality(frames, grey(0.5))["psnr"] == pytest.approx(20 + 10 * math.log10(3 / 2), abs=1e-3)


def test_an_exact_frame_is_capped() -> None:
    result = quality(grey(0.5), grey(0.5))
    assert result["psnr"] == PSNR_CAP
    assert result["ssim"] == pytest.approx(1.0, abs=1e-6)


def test_known_ssim_of_flat_frames() -> None:
    # without contrast SSIM is its luminance term (2ab + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2
    ssim = frame_ssim(grey(0.6), grey(0.3))
    assert ssim.shape == (2, 3)
    assert torch.allclose(ssim, torch.full((2, 3), (2 * 0.18 + 1e-4) / (0.36 + 0.09 + 1e-4)), atol=1e-3)


def test_frames_are_judged_each_by_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 3, 16, 16, generator=draw)
    frames = truth.clone()
    frames[1, 2] = torch.rand(3, 16, 16, generator=draw)
    ssim = frame_ssim(frames, truth)
    assert ssim[1, 2] < 0.5
    others = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.allclose(ssim[others], torch.ones(5), atol=1e-4)


def test_the_baseline_repeats_the_last_given_frame() -> None:
    truth = grey(0.5)
    truth[:, 1] += 0.1
    truth[:, 2] += 0.3
    result = compare(truth + 0.01, truth, last_given=grey(0.4)[:, 0])
    assert result["prediction"]["psnr_per_frame"] == pytest.approx([40.0] * 3, abs=1e-2)
    expected = [-20 * np.log10(difference) for difference in (0.1, 0.2, 0.4)]
    assert result["repeat_last"]["psnr_per_frame"] == pytest.approx(expected, abs=1e-3)
    assert result["repeat_last"]["psnr"] == pytest.approx(10 * math.log10(3 / (0.01 + 0.04 + 0.16)), abs=1e-3)
    json.dumps(result, allow_nan=False)


def some_frames(clips: int = 2, frames: int = 5, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction in flat colours that tell clip and frame; red says truth, blue says prediction."""
    truth, prediction = np.zeros((2, clips, frames, side, side, 3), dtype=np.uint8)
    for clip in range(clips):
        for frame in range(frames):
            truth[clip, frame] = (200, 40 * clip, 20 * frame)
            prediction[clip, frame] = (20 * frame, 40 * clip, 200)
    return truth, prediction


def test_the_sheet_shows_truth_above_prediction_and_marks_the_given_frames(tmp_path: Path) -> None:
    truth, prediction = some_frames()
    sample_sheet(tmp_path / "sheet.png", truth, prediction, given=2)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    cell = 2 * 64 + 2 * BORDER  # frames of 64 pixels are shown at twice their size
    episode = 2 * cell + 4 * BORDER
    for clip in range(2):
        for row, clips in enumerate((truth, prediction)):
            for frame in range(5):
                top = CAPTION_HEIGHT + clip * episode + row * cell
                left = CAPTION_WIDTH + frame * cell
                shown = sheet[top : top + cell, left : left + cell]
                inside = shown[BORDER:-BORDER, BORDER:-BORDER]
                assert (inside == clips[clip, frame, 0, 0]).all(), (clip, row, frame)
                marked = (shown == GIVEN_COLOUR).all(axis=-1)
                assert marked.sum() == (cell**2 - 128**2 if frame < 2 else 0), (clip, row, frame)
    assert (sheet[:CAPTION_HEIGHT] < 128).any()  # the frame numbers
    assert (sheet[:, :CAPTION_WIDTH] < 128).any()  # "truth", "FAR"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_long_clip_is_shown_by_some_of_its_frames(tmp_path: Path) -> None:
    truth, prediction = some_frames(clips=1, frames=12)
    long = np.repeat(prediction, 20, axis=1)
    sample_sheet(tmp_path / "sheet.png", None, long, given=1)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width <= CAPTION_WIDTH + 24 * (128 + 2 * BORDER) + 2 * BORDER
    assert height < 2 * 128  # one row, since no truth is known
    with pytest.raises(ValueError, match="one shape"):
        sample_sheet(tmp_path / "other.png", truth, long, given=1)


def test_the_video_has_every_frame_and_marks_the_given_ones(tmp_path: Path) -> None:
    truth, prediction = some_frames(clips=3)
    sample_video(tmp_path / "samples.mp4", truth, prediction, given=2, fps=5.0)
    with av.open(str(tmp_path / "samples.mp4")) as file:
        assert file.streams.video[0].average_rate == 5
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
    assert len(frames) == 5
    cell = 3 * 64 + 2 * BORDER
    for index, picture in enumerate(frames):
        middle = CAPTION_WIDTH + cell // 2
        for top, clips in ((0, truth), (cell, prediction)):
            assert np.abs(picture[top + cell // 2, middle] - clips[0, index, 0, 0]).max() < 30, index
        orange = (np.abs(picture - np.array(GIVEN_COLOUR)).max(axis=-1) < 60).sum()
        borders = 6 * (cell**2 - (3 * 64) ** 2)
        assert orange > borders / 2 if index < 2 else orange < borders / 50, index


def test_the_loss_curve_is_drawn_from_the_log(tmp_path: Path) -> None:
    log, curve = tmp_path / "log.jsonl", tmp_path / "loss.png"
    entries = [
        {"step": step, "loss": 0.3 + 1 / step, "learning_rate": 1e-3 * min(1, step / 50), "grad_norm": 1.0, "mfu": 0.1}
        for step in range(1, 300)
    ]
    lines = [json.dumps(entry) for entry in entries]
    log.write_text("\n".join([*lines, lines[-1], json.dumps({"step": 299, "event": "checkpoint"})]) + "\n")
    loss_curve(curve, log)
    picture = np.array(Image.open(curve).convert("RGB")).astype(int)
    assert picture.shape == (600, 960, 3)
    blue = (picture[..., 2] - picture[..., 0] > 80).any(axis=0)
    assert blue.sum() > 0.8 * 960  # a line across the picture


def test_a_log_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(UserError, match="there is no training log here"):
        loss_curve(tmp_path / "loss.png", log)
    log.write_text('{"step": 1, "event": "start"}\n')
    with pytest.raises(UserError, match="no line holds a loss"):
        loss_curve(tmp_path / "loss.png", log)
    log.write_text('{"step": 1, "loss": 1.0, "learning_rate": 0.1}\n{"step": 2, "lo')
    with pytest.raises(UserError, match="line 2 is no entry"):
        loss_curve(tmp_path / "loss.png", log)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
