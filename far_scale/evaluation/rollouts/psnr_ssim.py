"""PSNR and SSIM of predicted frames, beside those of repeating the last given frame; gathered frame by frame."""

from __future__ import annotations

import math
from typing import TypedDict

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

PSNR_CAP = 100.0  # dB, for frames that are all exactly equal: JSON knows no infinity


class Quality(TypedDict):
    """How near some frames are to the truth; the lists have one number a frame index, over all clips."""

    psnr: float
    ssim: float
    psnr_per_frame: list[float]
    ssim_per_frame: list[float]


class Comparison(TypedDict):
    """The prediction beside the baseline that shows the last given frame for ever."""

    prediction: Quality
    repeat_last: Quality


class QualityMeter:
    """Gathers the quality of frames that come one at a time, and keeps two numbers of each."""

    def __init__(self, frames: int) -> None:
        """`frames` is how many frame indices will come."""
        self._squares = [0.0] * frames  # sum over the clips of a frame's mean squared error
        self._ssim = [0.0] * frames
        self._clips = [0] * frames

    def add(self, index: int, frames: Tensor, truth: Tensor) -> None:
        """Count the frames of one index, of some clips: both `[B, 3, H, W]` in 0..1."""
        self._squares[index] += (frames.double() - truth.double()).square().mean(dim=(1, 2, 3)).sum().item()
        self._ssim[index] += frame_ssim(frames, truth).double().sum().item()
        self._clips[index] += len(frames)

    def quality(self) -> Quality:
        """Of all that was counted; every index must have come.

        PSNR is that of the mean squared error over all frames, as torchmetrics counts a data set, and not the mean of
        each frame's PSNR: a frame that is repeated exactly, where the world stands still, has an infinite one, and
        would make any mean say more about such frames than about all others. SSIM is the mean over the frames.
        """
        clips = sum(self._clips)
        return Quality(
            psnr=psnr(sum(self._squares) / clips),
            ssim=sum(self._ssim) / clips,
            psnr_per_frame=[psnr(sums / n) for sums, n in zip(self._squares, self._clips, strict=True)],
            ssim_per_frame=[sums / n for sums, n in zip(self._ssim, self._clips, strict=True)],
        )


class MetricAccumulator:
    """Gathers the quality of a prediction and of the baseline."""

    def __init__(self, frames: int) -> None:
        """`frames` is how many frame indices will come."""
        self._prediction, self._repeat_last = QualityMeter(frames), QualityMeter(frames)

    def add(self, index: int, prediction: Tensor, truth: Tensor, last_given: Tensor) -> None:
        """Count new frame `index` of some clips, all `[B, 3, H, W]` in 0..1; `last_given` is the last given frame."""
        self._prediction.add(index, prediction, truth)
        self._repeat_last.add(index, last_given, truth)

    def comparison(self) -> Comparison:
        """Of all that was counted; every index must have come."""
        return Comparison(prediction=self._prediction.quality(), repeat_last=self._repeat_last.quality())


def psnr(squared_error: float) -> float:
    """PSNR in dB of a mean squared error of values in 0..1."""
    return PSNR_CAP if squared_error <= 10 ** (-PSNR_CAP / 10) else -10 * math.log10(squared_error)


def frame_ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """SSIM of every single frame, `[B]`, of `[B, 3, H, W]` frames in 0..1, at least 6 pixels high and wide.

    That of Wang et al. (2004) as torchmetrics has it: a Gaussian of deviation 1.5, mirrored borders, and the mean
    over channels and all pixels of a frame.
    """
    each = structural_similarity_index_measure(frames, truth, data_range=1.0, reduction="none")
    assert isinstance(each, Tensor)  # it is a pair only where the full image is asked for
    return each
