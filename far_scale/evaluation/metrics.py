"""Metrics of samples: PSNR, SSIM and LPIPS of each predicted frame, and the features for FVD.

shape letters   B clips   S samples of a clip   F frames of a clip   P predicted ones   h/w pixels
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_scale.evaluation.codec import through_h264, with_border
from far_scale.evaluation.metric_networks import I3D, LPIPS
from far_scale.evaluation.protocol import FVDSection, LPIPSSection, Protocol
from far_scale.evaluation.rollouts.psnr_ssim import frame_ssim
from far_scale.evaluation.weights import load_i3d, load_lpips, weights_sha256
from far_scale.utils.errors import UserError

Pixels = NDArray[np.uint8]
Arrays = dict[str, NDArray[np.generic]]


class Metrics:
    """A protocol's metrics with their networks.

    Raises:
        UserError: a network is not in the cache folder, or is not the protocol's.
    """

    def __init__(self, protocol: Protocol, device: torch.device) -> None:
        self._protocol, self._device = protocol, device
        self._lpips, self._i3d = None, None
        if "lpips" in protocol.metrics and protocol.lpips is not None:
            self._lpips = _load_lpips(protocol.lpips, device)
        if "fvd" in protocol.metrics and protocol.fvd is not None:
            self._i3d = _load_i3d(protocol.fvd, device)

    def compute(self, samples: Pixels, truth: Pixels) -> Arrays:
        """The metrics of some clips' samples.

        Args:
            samples: `[B, S, F, h, w, 3]`, given frames first.
            truth: `[B, F, h, w, 3]`.

        Returns:
            Those in the protocol of `mse`, `ssim` and `lpips` `[B, S, P]` float64 and `logits` `[B, S, 400]` float32.
            If truth and sample go through the codec together, also the truth's `real_logits`, like `logits`.
        """
        compared = [self._as_compared(sample, true) for sample, true in zip(samples, truth, strict=True)]
        paired: dict[str, list[Tensor]] = {}
        if set(self._protocol.metrics) != {"fvd"}:
            for sample, true in compared:
                for name, values in self._paired(sample, true).items():
                    paired.setdefault(name, []).append(values)
        arrays: Arrays = {name: torch.stack(values).numpy() for name, values in paired.items()}
        if self._i3d is not None:
            arrays["logits"] = self._logits([video for sample, _ in compared for video in sample], samples.shape[:2])
            if self._truth_per_sample:
                arrays["real_logits"] = self._logits(
                    [video for _, true in compared for video in true], samples.shape[:2]
                )
        return arrays

    def real_logits(self, truth: Pixels) -> Arrays:
        """`real_logits` `[B, 1, 400]` of true clips `[B, F, h, w, 3]`; empty without FVD, or if the truth goes through
        the codec with each sample."""
        if self._i3d is None or self._truth_per_sample:
            return {}
        given = self._protocol.sampling.given
        videos = [with_border(clip, given) if self._protocol.frames.border else clip for clip in truth]
        return {"real_logits": self._logits(videos, (len(truth), 1))}

    @property
    def _truth_per_sample(self) -> bool:
        return self._protocol.frames.codec != "none"

    def _as_compared(self, sample: Pixels, truth: Pixels) -> tuple[Pixels, Pixels]:
        """A clip's samples `[S, F, h, w, 3]` and its truth, repeated S times, with border and codec."""
        true = np.repeat(truth[None], len(sample), axis=0)
        if self._protocol.frames.border:
            given = self._protocol.sampling.given
            sample, true = (np.stack([with_border(video, given) for video in videos]) for videos in (sample, true))
        if self._protocol.frames.codec == "none":
            return sample, true
        shape = sample.shape
        decoded = through_h264(sample.reshape(-1, *shape[2:]), true.reshape(-1, *shape[2:]))
        return decoded[0].reshape(shape), decoded[1].reshape(shape)

    def _paired(self, samples: Pixels, truth: Pixels) -> dict[str, Tensor]:
        """Paired metrics `[S, P]` float64 of one clip's samples `[S, F, h, w, 3]`."""
        protocol, given, metrics = self._protocol, self._protocol.sampling.given, dict[str, list[Tensor]]()
        for sample, true in zip(samples, truth, strict=True):
            pixels, truth_pixels = (self._tensor(video[given:]) for video in (sample, true))
            if "psnr" in protocol.metrics:
                difference = torch.from_numpy(sample[given:]).double() - torch.from_numpy(true[given:]).double()
                metrics.setdefault("mse", []).append((difference / 255).square().mean(dim=(1, 2, 3)))
            if "ssim" in protocol.metrics:
                metrics.setdefault("ssim", []).append(frame_ssim(pixels, truth_pixels).double().cpu())
            if self._lpips is not None and protocol.lpips is not None:
                if protocol.lpips.range == "[-1, 1]":
                    pixels, truth_pixels = pixels * 2 - 1, truth_pixels * 2 - 1
                with torch.no_grad():
                    metrics.setdefault("lpips", []).append(self._lpips.distances(pixels, truth_pixels).double().cpu())
        return {name: torch.stack(values) for name, values in metrics.items()}

    def _logits(self, videos: Sequence[Pixels], shape: tuple[int, ...]) -> NDArray[np.float32]:
        """I3D's logits, `[*shape, 400]`, of videos `[F, h, w, 3]`, always in full batches of `fvd.batch`."""
        section = self._protocol.fvd
        assert section is not None and self._i3d is not None
        first = 0 if section.frames == "all" else self._protocol.sampling.given
        rows = []
        for start in range(0, len(videos), section.batch):
            part = [torch.from_numpy(video[first:]) for video in videos[start : start + section.batch]]
            filled = torch.stack(part + [part[-1]] * (section.batch - len(part))).permute(0, 1, 4, 2, 3)
            with torch.no_grad():
                rows.append(self._i3d(filled.to(self._device))[: len(part)].cpu())
        logits: NDArray[np.float32] = torch.cat(rows).reshape(*shape, -1).numpy()
        return logits

    def _tensor(self, video: Pixels) -> Tensor:
        """Frames `[P, h, w, 3]` as float32 `[P, 3, h, w]` from 0 to 1 on the device."""
        return torch.from_numpy(video).to(self._device).permute(0, 3, 1, 2).contiguous().float() / 255


def _load_lpips(section: LPIPSSection, device: torch.device) -> LPIPS:
    network = load_lpips(section.net, "cpu", section.name)
    _check_network("lpips", section.network, weights_sha256(network))
    return network.to(device)


def _load_i3d(section: FVDSection, device: torch.device) -> I3D:
    network = load_i3d("cpu", section.name)
    _check_network("fvd", section.network, weights_sha256(network))
    return network.to(device)


def _check_network(key: str, expected: str, found: str) -> None:
    if found != expected:
        raise UserError(
            f"{key}.network: the protocol names {expected[:12]}, and the network in the cache folder is {found[:12]}; "
            "import the protocol's own by tools/metric_weights.py, or write a protocol for this one"
        )
