"""PSNR and SSIM of predicted frames, beside those of repeating the last given frame."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CAP = 60.0  # dB; an exactly equal frame (a world that stands still) would be infinite and so would every mean


class Quality(TypedDict):
    """How near some frames are to the truth; the lists have one number a frame index, averaged over the clips."""

    psnr: float
    ssim: float
    psnr_per_frame: list[float]
    ssim_per_frame: list[float]


class Comparison(TypedDict):
    """The prediction beside the baseline that shows the last given frame for ever."""

    prediction: Quality
    repeat_last: Quality


def frame_psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of every single frame, `[B, F]`, of `[B, F, 3, H, W]` frames in 0..1; at most PSNR_CAP."""
    each = peak_signal_noise_ratio(
        frames.flatten(0, 1), truth.flatten(0, 1), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return each.reshape(frames.shape[:2]).clamp(max=PSNR_CAP)


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
    """PSNR and SSIM of `frames` against `truth`, both `[B, F, 3, H, W]` in 0..1.

    Both figures are means over frames of the figure of each frame. For PSNR that is not the PSNR of the mean squared
    error of all frames, which the worst frames would rule.
    """
    psnr, ssim = frame_psnr(frames, truth), frame_ssim(frames, truth)
    return Quality(
        psnr=psnr.mean().item(),
        ssim=ssim.mean().item(),
        psnr_per_frame=psnr.mean(dim=0).tolist(),
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
