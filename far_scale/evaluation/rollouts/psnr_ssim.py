"""PSNR and SSIM of predicted frames and of a baseline that repeats the last given frame, accumulated by frame."""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor

PSNR_CAP = 100.0  # dB, for equal frames: JSON has no infinity


class Quality(TypedDict):
    """PSNR and SSIM of some frames; the lists have one number a frame index, over all clips."""

    psnr: float
    ssim: float
    psnr_per_frame: list[float]
    ssim_per_frame: list[float]


class Comparison(TypedDict):
    """The quality of the prediction and of the baseline, which repeats the last given frame."""

    prediction: Quality
    repeat_last: Quality


class QualityMeter:
    """Accumulates the quality of frames that come one at a time, as two sums for each frame index."""

    def __init__(self, frames: int) -> None:
        """`frames` is the number of frame indices."""
        self._mse = [0.0] * frames  # sums over the clips
        self._ssim = [0.0] * frames
        self._clips = [0] * frames

    def add(self, index: int, frames: Tensor, truth: Tensor) -> None:
        """Add the frames of one index, of some clips: both `[B, 3, H, W]` in 0..1."""
        self._mse[index] += frame_mse(frames, truth).sum().item()
        self._ssim[index] += frame_ssim(frames, truth).double().sum().item()
        self._clips[index] += len(frames)

    def quality(self) -> Quality:
        """The quality of all frames added; every index must have been added.

        PSNR is that of the mean squared error over all frames, as torchmetrics counts a data set. The mean of each
        frame's PSNR would be dominated by frames that are repeated exactly, where the world stands still and PSNR is
        infinite. SSIM is the mean over the frames.
        """
        clips = sum(self._clips)
        return Quality(
            psnr=psnr(sum(self._mse) / clips),
            ssim=sum(self._ssim) / clips,
            psnr_per_frame=[psnr(mse / n) for mse, n in zip(self._mse, self._clips, strict=True)],
            ssim_per_frame=[ssim / n for ssim, n in zip(self._ssim, self._clips, strict=True)],
        )


class MetricAccumulator:
    """Accumulates the quality of a prediction and of the baseline."""

    def __init__(self, frames: int) -> None:
        """`frames` is the number of frame indices."""
        self._prediction, self._repeat_last = QualityMeter(frames), QualityMeter(frames)

    def add(self, index: int, prediction: Tensor, truth: Tensor, last_given: Tensor) -> None:
        """Add new frame `index` of some clips, with the true last given frame; all `[B, 3, H, W]` in 0..1."""
        self._prediction.add(index, prediction, truth)
        self._repeat_last.add(index, last_given, truth)

    def comparison(self) -> Comparison:
        """The quality of all frames added; every index must have been added."""
        return Comparison(prediction=self._prediction.quality(), repeat_last=self._repeat_last.quality())


def psnr(mse: float) -> float:
    """PSNR in dB of a mean squared error of values in 0..1."""
    return PSNR_CAP if mse <= 10 ** (-PSNR_CAP / 10) else -10 * math.log10(mse)


def frame_mse(frames: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each frame, `[B]` float64, of `[B, 3, H, W]` frames in 0..1."""
    return (frames.double() - truth.double()).square().mean(dim=(1, 2, 3))


def frame_ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """SSIM of each frame, `[B]`, of `[B, 3, H, W]` frames in 0..1, at least 6 pixels high and wide.

    SSIM of Wang et al. (2004) as torchmetrics computes it: a Gaussian window of std 1.5, mirrored borders, and the
    mean over channels and all pixels of a frame.
    """
    # Here, for it loads matplotlib: half a second of each training's start.
    from torchmetrics.functional.image import structural_similarity_index_measure

    ssim = structural_similarity_index_measure(frames, truth, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)  # it is a pair only where the full image is asked for
    return ssim
