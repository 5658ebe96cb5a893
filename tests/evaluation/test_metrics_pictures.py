"""Metrics with known values, and the contents of pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from far_scale.evaluation.rollouts.loss_curve import draw_loss_curve, validation_losses
from far_scale.evaluation.rollouts.psnr_ssim import PSNR_CAP, MetricAccumulator, Quality, QualityMeter, frame_ssim
from far_scale.evaluation.rollouts.video_grid import (
    BORDER,
    CAPTION_WIDTH,
    GAP,
    GIVEN_COLOUR,
    LINE_COLOUR,
    LINE_HEIGHT,
    SHEET_CAPTION_HEIGHT,
    ContactSheet,
    GridSpec,
    VideoGrid,
    to_uint8,
)
from far_scale.utils.errors import UserError


def grey(value: float, clips: int = 2, frames: int = 3) -> torch.Tensor:
    return torch.full((clips, frames, 3, 16, 16), value)


def quality(frames: torch.Tensor, truth: torch.Tensor) -> Quality:
    """Of `[B, F, 3, H, W]`, counted one frame index at a time, last index first, and clip by clip."""
    meter = QualityMeter(frames.shape[1])
    for index in reversed(range(frames.shape[1])):
        for clip in range(len(frames)):
            meter.add(index, frames[clip : clip + 1, index], truth[clip : clip + 1, index])
    return meter.quality()


def test_known_psnr() -> None:
    # mean squared error 0.01 and 0.0001 at a range of 1: 20 and 40 dB; over clips and frames the errors are averaged
    frames = grey(0.5)
    frames[:, 0] += 0.1
    frames[0, 1] += 0.1
    frames[:, 2] += 0.01
    result = quality(frames, grey(0.5))
    assert result["psnr_per_frame"] == pytest.approx([20.0, 10 * math.log10(1 / 0.005), 40.0], abs=1e-3)
    assert result["psnr"] == pytest.approx(10 * math.log10(6 / (0.01 * 3 + 0.0001 * 2)), abs=1e-3)


def test_accumulated_metrics_equal_torchmetrics_of_all_frames() -> None:
    draw = torch.Generator().manual_seed(0)
    frames, truth = (torch.rand(2, 3, 3, 16, 16, generator=draw) for _ in range(2))
    result = quality(frames, truth)
    assert result["psnr"] == pytest.approx(peak_signal_noise_ratio(frames, truth, data_range=1.0).item(), abs=1e-4)
    assert result["ssim"] == pytest.approx(frame_ssim(frames.flatten(0, 1), truth.flatten(0, 1)).mean().item())
    assert result["ssim_per_frame"][2] == pytest.approx(frame_ssim(frames[:, 2], truth[:, 2]).mean().item())


def test_one_exact_frame_does_not_dominate_the_mean() -> None:
    frames = grey(0.5)
    frames[:, 1:] += 0.1
    assert quality(frames, grey(0.5))["psnr"] == pytest.approx(20 + 10 * math.log10(3 / 2), abs=1e-3)


def test_an_exact_frame_is_capped() -> None:
    result = quality(grey(0.5), grey(0.5))
    assert result["psnr"] == PSNR_CAP
    assert result["ssim"] == pytest.approx(1.0, abs=1e-6)


def test_known_ssim_of_flat_frames() -> None:
    # without contrast SSIM is its luminance term (2ab + c1) / (a^2 + b^2 + c1) with c1 = 0.01^2
    ssim = frame_ssim(grey(0.6)[:, 0], grey(0.3)[:, 0])
    assert torch.allclose(ssim, torch.full((2,), (2 * 0.18 + 1e-4) / (0.36 + 0.09 + 1e-4)), atol=1e-3)


def test_ssim_is_computed_for_each_frame() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(4, 3, 16, 16, generator=draw)
    frames = truth.clone()
    frames[2] = torch.rand(3, 16, 16, generator=draw)
    ssim = frame_ssim(frames, truth)
    assert ssim[2] < 0.5
    assert torch.allclose(ssim[[0, 1, 3]], torch.ones(3), atol=1e-4)


def test_the_baseline_repeats_the_last_given_frame() -> None:
    truth = grey(0.5)
    truth[:, 1] += 0.1
    truth[:, 2] += 0.3
    metrics = MetricAccumulator(3)
    for index in range(3):
        metrics.add(index, truth[:, index] + 0.01, truth[:, index], grey(0.4)[:, 0])
    result = metrics.comparison()
    assert result["prediction"]["psnr_per_frame"] == pytest.approx([40.0] * 3, abs=1e-2)
    expected = [-20 * np.log10(difference) for difference in (0.1, 0.2, 0.4)]
    assert result["repeat_last"]["psnr_per_frame"] == pytest.approx(expected, abs=1e-3)
    assert result["repeat_last"]["psnr"] == pytest.approx(10 * math.log10(3 / (0.01 + 0.04 + 0.16)), abs=1e-3)
    json.dumps(result, allow_nan=False)


GRID = GridSpec(episodes=2, frames=5, given=2, window=4, size=(64, 64), truth=True)


def flat(clips: int, colour: tuple[int, int, int]) -> np.ndarray:
    """Frames in one colour, but for green, which identifies the clip."""
    frames = np.full((clips, 64, 64, 3), colour, dtype=np.uint8)
    frames[..., 1] = 40 * np.arange(clips)[:, None, None]
    return frames


def true_colour(index: int) -> tuple[int, int, int]:
    return (200, 0, 10 * index % 256)


def predicted_colour(index: int) -> tuple[int, int, int]:
    return (10 * index % 256, 0, 200)


def drawn_sheet(grid: GridSpec, path: Path, known: int) -> np.ndarray:
    """The sheet of flat frames whose truth is known before index `known`."""
    sheet = ContactSheet(grid)
    for index in range(grid.frames):
        truth = flat(grid.episodes, true_colour(index)) if index < known else None
        sheet.add(index, truth, flat(grid.episodes, predicted_colour(index)))
    sheet.write(path)
    return np.array(Image.open(path))


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (picture == colour).all(axis=-1)


def test_the_contact_sheet_has_truth_above_prediction_and_marks_the_given_frames(tmp_path: Path) -> None:
    sheet = drawn_sheet(GRID, tmp_path / "sheet.png", known=4)
    cell = 2 * 64 + 2 * BORDER  # frames of 64 pixels are shown at twice their size
    episode = 2 * cell + GAP
    for clip in range(2):
        for row, colour in enumerate((true_colour, predicted_colour)):
            for frame in range(5):
                top = SHEET_CAPTION_HEIGHT + clip * episode + row * cell
                left = CAPTION_WIDTH + frame * cell + (GAP if frame >= 4 else 0)
                shown = sheet[top : top + cell, left : left + cell]
                inside = shown[BORDER:-BORDER, BORDER:-BORDER]
                blank = row == 0 and frame == 4  # its truth is not known
                expected = (255, 255, 255) if blank else (colour(frame)[0], 40 * clip, colour(frame)[2])
                assert (inside == expected).all(), (clip, row, frame)
                marked = is_colour(shown, GIVEN_COLOUR).sum()
                assert marked == (cell**2 - 128**2 if frame < 2 else 0), (clip, row, frame)
    lines = np.flatnonzero(is_colour(sheet, LINE_COLOUR).all(axis=0))
    edge = CAPTION_WIDTH + 4 * cell + GAP  # of frame 4, the first that a window of 4 frames does not join with frame 0
    assert len(lines) == 2 and edge - GAP < lines.min() < lines.max() < edge
    assert (sheet[LINE_HEIGHT:SHEET_CAPTION_HEIGHT] < 128).any()  # the frame numbers
    assert (sheet[:, :CAPTION_WIDTH] < 128).any()  # "truth", "FAR"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_long_clip_is_shown_by_some_of_its_frames(tmp_path: Path) -> None:
    shown = GridSpec(episodes=1, frames=240, given=1, window=240, size=(64, 64), truth=False)
    sheet = drawn_sheet(shown, tmp_path / "sheet.png", known=0)
    cell = 128 + 2 * BORDER
    assert CAPTION_WIDTH + 24 * cell <= sheet.shape[1] <= CAPTION_WIDTH + 24 * cell + 2 * BORDER
    assert cell < sheet.shape[0] < 2 * cell  # one row, since no truth is known
    middle = SHEET_CAPTION_HEIGHT + cell // 2
    assert tuple(sheet[middle, CAPTION_WIDTH + cell // 2]) == predicted_colour(0)
    assert not is_colour(sheet, LINE_COLOUR).any()  # every frame sees the first one
    shorter = GridSpec(episodes=1, frames=48, given=1, window=16, size=(64, 64), truth=False)
    sheet = drawn_sheet(shorter, tmp_path / "sheet.png", known=0)
    assert tuple(sheet[middle, sheet.shape[1] - cell // 2 - BORDER]) == predicted_colour(47)


def test_the_video_grid_has_a_picture_of_every_frame_and_marks_the_given_ones() -> None:
    shown = GridSpec(episodes=3, frames=6, given=2, window=4, size=(64, 64), truth=True)
    video_grid, cell = VideoGrid(shown), 3 * 64 + 2 * BORDER
    for index in range(shown.frames):
        truth = flat(3, true_colour(index)) if index < 5 else None
        picture = video_grid.picture(index, truth, flat(3, predicted_colour(index)))
        assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
        for clip in range(3):
            middle = CAPTION_WIDTH + clip * (cell + GAP) + cell // 2
            true, predicted = (picture[LINE_HEIGHT + row * cell + cell // 2, middle].tolist() for row in (0, 1))
            assert true == ([200, 40 * clip, 10 * index] if index < 5 else [255] * 3), (index, clip)
            assert predicted == [10 * index, 40 * clip, 200], (index, clip)
        borders = is_colour(picture[LINE_HEIGHT:], GIVEN_COLOUR).sum()
        assert borders == (6 * (cell**2 - (3 * 64) ** 2) if index < 2 else 0), index
        text = picture[:LINE_HEIGHT].astype(int)
        assert (text.max(axis=-1) < 100).any()  # its number
        assert (is_colour(text, LINE_COLOUR).any()) == (index >= 4), index
        assert not (text[:, -1] < 255).any()  # nothing is cut off


def test_bytes_of_pixels() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 6)
    frames = to_uint8(pixels)
    assert frames.shape == (2, 4, 6, 3) and frames.dtype == np.uint8
    assert frames[1, 3, 5].tolist() == [0, 128, 255]


def test_the_loss_curve_is_drawn_from_the_log(tmp_path: Path) -> None:
    log, curve = tmp_path / "log.jsonl", tmp_path / "loss.png"
    entries = [
        {"step": step, "loss": 0.3 + 1 / step, "learning_rate": 1e-3 * min(1, step / 50), "grad_norm": 1.0, "mfu": 0.1}
        for step in range(1, 300)
    ]
    lines = [json.dumps(entry) for entry in entries]
    log.write_text(
        "\n".join(
            [
                *lines,
                lines[-1],
                json.dumps({"step": 299, "event": "checkpoint"}),
                json.dumps({"step": 300, "loss": None, "learning_rate": 1e-3}),
            ]
        )
        + "\n"
    )
    draw_loss_curve(curve, log)
    picture = np.array(Image.open(curve).convert("RGB")).astype(int)
    assert picture.shape == (600, 960, 3)
    blue = (picture[..., 2] - picture[..., 0] > 80).any(axis=0)
    assert blue.sum() > 0.7 * 960  # across the axes, whose width depends on fonts and versions of matplotlib


def test_the_curves_of_validation_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    log, curve = tmp_path / "log.jsonl", tmp_path / "loss.png"
    train = [{"step": step, "loss": 0.5, "learning_rate": 1e-3} for step in range(1, 101)]
    held_out = [
        {"step": step, "validation": {"weights": {"loss": 0.7}, "ema": {"loss": 0.3 if step < 90 else None}}}
        for step in range(10, 101, 10)
    ]

    def coloured(lines: list[dict[str, object]]) -> tuple[bool, bool]:
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_loss_curve(curve, log)
        red, green, blue = np.moveaxis(np.array(Image.open(curve).convert("RGB")).astype(int), -1, 0)
        return bool((red - np.maximum(green, blue) > 150).any()), bool((green - np.maximum(red, blue) > 80).any())

    assert coloured(train) == (False, False)
    assert coloured([*train, *held_out]) == (True, True)
    losses = validation_losses(log)
    assert list(losses) == list(range(10, 101, 10))
    assert losses[80] == {"weights": 0.7, "ema": 0.3} and losses[100] == {"weights": 0.7}


def test_a_log_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(UserError, match="there is no training log here"):
        draw_loss_curve(tmp_path / "loss.png", log)
    log.write_text('{"step": 1, "event": "start"}\n')
    with pytest.raises(UserError, match="no line holds a loss"):
        draw_loss_curve(tmp_path / "loss.png", log)
    log.write_text('{"step": 1, "loss": 1.0, "learning_rate": 0.1}\n{"step": 2, "lo')
    with pytest.raises(UserError, match="line 2 is no entry"):
        draw_loss_curve(tmp_path / "loss.png", log)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
