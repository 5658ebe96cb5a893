"""The official code's metrics, its MP4 writer and its reader, loaded from a clone and run unchanged.

Its networks get far_scale's weights: nothing is downloaded. What it imports beside is stood in for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import torch
import torch.nn.functional as F
from official import register_packages, stood_in
from torch import Tensor, nn

from far_scale.autoencoder.lpips_network import LPIPSNetwork
from far_scale.evaluation.i3d import I3D, SIDE
from far_scale.utils.errors import UserError

PACKAGES = (
    "diffusers",
    "einops",
    "imageio",
    "imageio_ffmpeg",
    "iopath",
    "lpips",
    "pytorchvideo",
    "requests",
    "scipy",
    "torchmetrics",
)
STAND_INS = (
    "accelerate",
    "accelerate.logging",
    "accelerate.utils",
    "far.models.autoencoder_dc_model",
    "far.utils.ema_util",
    "torchvision",
    "wandb",
)
_POOLS_AFTER = ("0", "3", "10")  # torchvision's numbers of AlexNet's convolutions before a pooling


class OfficialEvaluation:
    """The modules of a clone.

    Args:
        clone: the folder that holds `far/`.
        scratch: a folder for the network that the official code loads from a file.
        frames: of a clip, for FVD.

    Raises:
        UserError: it is no clone, or a package that the official code needs is not installed.
    """

    def __init__(self, clone: Path, scratch: Path, lpips: LPIPSNetwork, i3d: I3D, frames: int) -> None:
        if not (clone / "far" / "metrics" / "metric.py").is_file():
            raise UserError(f"{clone}: no official FAR code here; clone github.com/showlab/FAR and name that folder")
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"the official code needs {', '.join(missing)}; pip install them")
        scipy_linalg = importlib.import_module("scipy.linalg")
        if "disp" not in inspect.signature(scipy_linalg.sqrtm).parameters:
            raise UserError(
                "the official code needs the argument `disp` of scipy.linalg.sqrtm; pip install 'scipy<1.18'"
            )
        importlib.import_module("diffusers.training_utils")  # before the stand-ins: it would look at accelerate
        importlib.import_module("torchmetrics.image")
        register_packages(clone)
        _skip_package("pytorchvideo.data")
        with stood_in(STAND_INS):
            sys.modules["torchvision"].models.alexnet = lambda pretrained: _alexnet(lpips)
            self._metric = importlib.import_module("far.metrics.metric")
            self._fvd = importlib.import_module("far.metrics.fvd")
            self._pictures = importlib.import_module("far.utils.vis_util")
            self._trainer = importlib.import_module("far.trainers.trainer_far")
        self._detector = scratch / "i3d_torchscript.pt"
        _write_detector(i3d, frames, self._detector)

    def write(self, folder: Path, key: str, sample: Tensor, truth: Tensor, given: int, border: bool) -> None:
        """An MP4 of a clip's samples `[S, F, 3, h, w]` from 0 to 1, and of its truth as often."""
        self._pictures.log_paired_video(
            sample[None].clone(),
            truth[None].clone(),
            context_frames=given,
            save_suffix=[key],
            save_dir=str(folder),
            annotate_context_frame=border,
        )

    def read(self, folder: Path, samples: int) -> tuple[Tensor, Tensor]:
        """Samples and truth `[N, S, F, 3, h, w]` of all MP4 in a folder, by name."""
        pair: tuple[Tensor, Tensor] = self._trainer.FARTrainer.read_video_folder(None, str(folder), samples)
        return pair

    def scores(self, sample: Tensor, truth: Tensor, given: int, metrics: Sequence[str]) -> dict[str, float]:
        """Of samples and truth `[N, S, F, 3, h, w]` from 0 to 1."""
        with mock.patch.object(self._fvd, "open_url", self._open):
            compute = self._metric.VideoMetric(metric=metrics, device="cpu").compute
        scores: dict[str, float] = compute(sample, truth, context_length=given)
        return scores

    def _open(self, url: str, verbose: bool) -> BinaryIO:
        return self._detector.open("rb")


def _skip_package(name: str) -> None:
    """Let modules of a package be imported without the package's own imports."""
    package = types.ModuleType(name)
    spec = importlib.util.find_spec(name.rpartition(".")[0])
    assert spec is not None and spec.submodule_search_locations is not None
    package.__path__ = [str(Path(place, name.rpartition(".")[2])) for place in spec.submodule_search_locations]
    sys.modules[name] = package


def _alexnet(lpips: LPIPSNetwork) -> Any:
    """A stand-in for torchvision's network, with what the lpips package reads: `features`, with far_scale's weights."""
    layers: list[nn.Module] = []
    for number, convolution in lpips.features.items():
        layers += [convolution, nn.ReLU()]
        if number in _POOLS_AFTER:
            layers.append(nn.MaxPool2d(3, 2))
    return types.SimpleNamespace(features=nn.Sequential(*layers))


class _Logits(nn.Module):
    def __init__(self, i3d: I3D) -> None:
        super().__init__()
        self.i3d = i3d

    def forward(self, x: Tensor) -> Tensor:
        return self.i3d.logits_of(x)


class _Detector(nn.Module):
    """Called as the official code calls StyleGAN-V's i3d_torchscript.pt: videos `[B, 3, T, h, w]` in [-1, 1]."""

    def __init__(self, logits: nn.Module, side: int) -> None:
        super().__init__()
        self.logits, self.side = logits, side

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert resize and return_features and not rescale
        x = F.interpolate(x, size=[x.size(2), self.side, self.side], mode="trilinear", align_corners=False)
        logits: Tensor = self.logits(x)
        return logits


def _write_detector(i3d: I3D, frames: int, path: Path) -> None:
    video = torch.zeros(1, 3, frames, SIDE, SIDE)
    with torch.no_grad():
        traced = torch.jit.trace(_Logits(i3d), (video,), check_trace=False)
    torch.jit.script(_Detector(traced, SIDE)).save(str(path))
