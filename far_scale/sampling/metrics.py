"""PSNR and SSIM of predicted frames, beside those of repeating the last given frame."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

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


def psnr(frames: Tensor, truth: Tensor) -> float:
    """PSNR in dB of frames in 0..1: of the mean squared error over all of them, as torchmetrics counts a data set.

    Not the mean of each frame's PSNR: a frame that is repeated exactly, where the world stands still, has an infinite
    one, and would make any mean say more about such frames than about all others.
    """
    return min(PSNR_CAP, peak_signal_noise_ratio(frames, truth, data_range=1.0).item())


def frame_ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """SSIM of every single frame, `[B, F]`, of `[B, F, 3, H, W]` frames in 0..1, at least 6 pixels high and wide.

    That of Wang et al. (2004) as torchmetrics has it: a Gaussian of deviation 1.5, mirrored borders, and the mean
    over channels and all pixels of a frame.
    """
    each = structural_similarity_index_measure(
        frames.flatten(0, 1), truth.flatten(0, 1), data_range=1.0, reduction="none"
    )
    assert isinstance(each, Tensor)  # it is a pair only where the full image is asked for
    return each.reshape(frames.shape[:2])


def quality(frames: Tensor, truth: Tensor) -> Quality:
    """PSNR and SSIM of `frames` against `truth`, both `[B, F, 3, H, W]` in 0..1; SSIM is the mean over the frames."""
    ssim = frame_ssim(frames, truth)
    return Quality(
        psnr=psnr(frames, truth),
        ssim=ssim.mean().item(),
        psnr_per_frame=[psnr(frames[:, f], truth[:, f]) for f in range(frames.shape[1])],
        ssim_per_frame=ssim.mean(dim=0).tolist(),
    )


def compare(prediction: Tensor, truth: Tensor, last_given: Tensor) -> Comparison:
    """The prediction's quality and that of repeating the last given frame.

    Args:
        prediction: `[B, F, 3, H, W]` in 0..1.
        truth: `[B, F, 3, H, W]` in 0..1, the frames that really followed.
        last_given: `[B, 3, H, W]` in 0..1, the frame before them.
    """
    return Comparison(
        prediction=quality(prediction, truth),
        repeat_last=quality(last_given[:, None].expand_as(truth), truth),
    )
