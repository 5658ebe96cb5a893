"""Files of official weights: read, written, and imported as a model directory."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import far_scale
from far_scale.convert.model_dir import ImportMetadata, ModelMetadata, WeightsMetadata, save_model_dir
from far_scale.convert.official import to_far_scale
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.model import FARConfig
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, sha256


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The state dict in an official file: a published .pth, the trainer's ema.pth, or .safetensors; mapped, not read.

    The trainer's ema.pth is the average's state dict under the model's own names, without anything around it.

    Raises:
        UserError: there is no such file, or it is none that torch.save (as a zip archive) or safetensors wrote, or it
            holds anything but tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give an official .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: is no whole file that torch.save wrote; download or copy it again")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # PyTorch's own text says how to load it all the same
        raise UserError(
            f"{path}: cannot be read as weights (it holds more than tensors); save a state_dict()"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: cannot be read as weights ({reason}); download or copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        keys = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else ""
        found = f"a dict with {keys}" if keys else type(state).__name__
        raise UserError(f"{path}: holds {found} in place of tensors by name; save the model's state_dict() alone")
    return state


def write_official(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Write an official state dict (of `from_far_scale`) as torch.save does, which is what the official code reads.

    Raises:
        UserError: the disk is full, or a file name that promises another format.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt"):
        raise UserError(f"{path}: the official code reads .pth files; name one")
    try:
        with atomic_write(path) as beside:
            torch.save(state_dict, beside)
    except RuntimeError as error:  # so PyTorch's writer tells a full disk
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: could not be written ({reason}); free some space, or write elsewhere") from error


def import_file(
    path: str | Path,
    out: str | Path,
    window: int = 16,
    patch: int = 1,
    shards: str | Path | None = None,
    scaling: Literal["factor", "channel"] = "factor",
    frame_stride: int = 1,
) -> FARConfig:
    """Write an official file's weights as a model directory.

    Args:
        path: see `read_official`.
        out: the model directory to write.
        window, patch: what the file does not tell, see `to_far_scale`.
        shards: the shard set of the latents that the model takes; its manifest tells the autoencoder, the latents'
            shape and the frame rate. Without it the directory holds weights alone: it loads, but does not sample.
        scaling: how those latents are brought to the model's scale; officially by the autoencoder's one factor.
        frame_stride: the model takes every n-th frame of them.

    Returns:
        The model's shape.

    Raises:
        UserError: a file that is none or does not fit (the keys are named), or a shard set of other latents.
    """
    if frame_stride < 1:
        raise UserError(f"frame stride {frame_stride}: every n-th frame is taken; give 1 or more")
    state = read_official(path)
    try:
        config, state = to_far_scale(state, window, patch)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    origin = ImportMetadata(imported_from=Path(path).name, sha256=sha256(path), far_scale=far_scale.__version__)
    card: ModelMetadata | WeightsMetadata = WeightsMetadata(training=origin)
    if shards is not None:
        manifest = Manifest.read(shards)
        _check_latents(Path(shards), manifest, config)
        card = ModelMetadata(
            autoencoder=manifest.autoencoder,
            scaling=LatentScaling.of(manifest, scaling),
            latent_shape=manifest.latent_shape,
            fps=manifest.fps,
            frame_stride=frame_stride,
            classes=manifest.classes,
            training=origin,
        )
    save_model_dir(out, config, state, card)
    return config


def _check_latents(shards: Path, manifest: Manifest, config: FARConfig) -> None:
    channels, *size = manifest.latent_shape
    patch = config.context_patch or config.patch
    if channels != config.channels or any(side % patch for side in size):
        raise UserError(
            f"{shards}: frame latents of {list(manifest.latent_shape)}, the model takes {config.channels} channels in "
            f"patches of {patch}; name the shard set of the model's own latents"
        )
    for what, own, theirs in (
        ("actions", config.actions, manifest.actions),
        ("labels", config.labels, manifest.labels),
    ):
        if own and own != theirs:
            raise UserError(f"{shards}: {theirs} {what}, the model knows {own}; name the shard set of the model's own")
