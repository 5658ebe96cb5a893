"""Official weights (showlab/FAR, `FAR` and `FAR_Long` of far/models): state dicts converted both ways, and their files.

Every tensor is converted bit for bit, both ways. Ours stacks a block's q, k and v projections into one tensor, in this
order; otherwise only the names differ.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import far_scale
from far_scale.convert.model_dir import (
    ImportMetadata,
    ModelMetadata,
    WeightsMetadata,
    empty_model,
    save_model_dir,
)
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import Manifest
from far_scale.model import FARConfig
from far_scale.model.layers import HEAD_DIM
from far_scale.model.model_files import check_state_dict
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, sha256

MODULES = {
    "patch_embedding": "x_embedder",
    "context_patch_embedding": "context_embedder",
    "timestep_embedding.up": "timestep_embedder.linear_1",
    "timestep_embedding.out": "timestep_embedder.linear_2",
    "output.modulation": "norm_out.linear",
    "output.out": "proj_out",
    "context_output": "context_proj_out",
}
"""Our module's name -> the official one's."""

BLOCK_MODULES = {
    "attention_modulation": ("norm1.linear",),
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.norm_q": ("attn.norm_q",),
    "attention.norm_k": ("attn.norm_k",),
    "attention.out": ("attn.to_out.0",),
    "attention.context_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.context_norm_q": ("attn.norm_added_q",),
    "attention.context_norm_k": ("attn.norm_added_k",),
    "attention.context_out": ("attn.to_add_out",),
    "mlp_modulation": ("norm2.linear",),
    "mlp.up": ("mlp.net.0.proj",),
    "mlp.down": ("mlp.net.2",),
}
"""Within a block: our module -> official modules; several are stacked along the first axis."""

ACTIONS, LABELS = "action_embedder.embedding_table.weight", "label_embedder.embedding_table.weight"
PARALLEL_PREFIX = "module."  # DistributedDataParallel puts it before every name


def to_far_scale(
    state_dict: Mapping[str, Tensor], window: int = 16, patch: int = 1
) -> tuple[FARConfig, dict[str, Tensor]]:
    """An official state dict as a FARConfig and the state dict of `FAR(config)`.

    Args:
        state_dict: of the official FAR or FAR_Long, also with DistributedDataParallel's `module.` prefix. It is not
            changed; tensors keep their dtype, and all but the stacked ones are shared.
        window: window frames, which do not follow from the tensors; officially 16.
        patch: patch side of a window frame in latent pixels; only patch^2 x channels follows. Officially 1.

    Raises:
        UserError: tensors that are missing, unexpected, of another shape or of several dtypes, named.
    """
    if state_dict and all(name.startswith(PARALLEL_PREFIX) for name in state_dict):
        state_dict = {name.removeprefix(PARALLEL_PREFIX): tensor for name, tensor in state_dict.items()}
    config = _find_config(state_dict, window, patch)
    names, expected = _names_and_shapes(config)
    check_state_dict("official weights: this file", expected, state_dict, "it is not of the official FAR or FAR_Long")
    return config, {ours: _stack([(name, state_dict[name]) for name in theirs]) for ours, theirs in names.items()}


def from_far_scale(config: FARConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_far_scale`: the state dict of `FAR(config)` under the official names, as views.

    The official model must be built with `patch_size=config.patch`, `context_patch_size=config.context_patch`,
    `short_term_ctx_winsize=config.window` and its `condition_cfg`, which the state dict does not hold.

    Raises:
        UserError: tensors that are not those of `config`, named, or a model that is not causal.
    """
    if not config.causal:
        raise UserError(
            "these weights: model.causal is false, and the official code has only causal models; export them "
            "with --format model"
        )
    shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    check_state_dict("these weights: the model", shapes, state_dict, "config and weights do not fit together")
    official: dict[str, Tensor] = {}
    for ours, theirs in _names_and_shapes(config)[0].items():
        official.update(zip(theirs, state_dict[ours].chunk(len(theirs)), strict=True))
    return official


def read_official(path: str | Path) -> dict[str, Tensor]:
    """Memory-map the state dict in an official file: a published .pth, the trainer's ema.pth, or .safetensors.

    The trainer's ema.pth is the EMA's state dict under the model's names, at the top level.

    Raises:
        UserError: no such file, not written by torch.save (as a zip archive) or safetensors, or it holds anything but
            named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give an official .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: is not a complete torch.save file; download or copy it again")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # PyTorch's text describes how to load it unsafely
        raise UserError(
            f"{path}: cannot be read as weights (it holds more than tensors); save a state_dict()"
        ) from None
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: cannot be read as weights ({reason}); download or copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        keys = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else ""
        content = f"a dict with {keys}" if keys else type(state).__name__
        raise UserError(f"{path}: holds {content} instead of named tensors; save only the model's state_dict()")
    return state


def write_official(path: str | Path, state_dict: dict[str, Tensor]) -> None:
    """Write a state dict of `from_far_scale` by torch.save, as the official code reads it.

    Raises:
        UserError: the disk is full, or the file name has another suffix than .pth or .pt.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pt"):
        raise UserError(f"{path}: the official code reads .pth files; name one")
    try:
        with atomic_write(path) as staged:
            torch.save(state_dict, staged)
    except RuntimeError as error:  # this is how PyTorch's writer reports a full disk
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: could not be written ({reason}); free some space, or write elsewhere") from error


def import_model(
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
        window, patch: not in the file, see `to_far_scale`.
        shards: a shard set of the model's latents; its manifest has autoencoder, latent shape and frame rate.
            Without it the directory holds only weights: it loads, but cannot sample.
        scaling: of those latents to the model's scale; officially by the autoencoder's single factor.
        frame_stride: the model takes every n-th frame.

    Returns:
        The model's shape.

    Raises:
        UserError: the file cannot be read or does not fit (the keys are named), or the shard set has other latents.
    """
    if frame_stride < 1:
        raise UserError(f"frame stride {frame_stride}: it must be 1 or more")
    state = read_official(path)
    try:
        config, state = to_far_scale(state, window, patch)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    origin = ImportMetadata(imported_from=Path(path).name, sha256=sha256(path), far_scale=far_scale.__version__)
    metadata: ModelMetadata | WeightsMetadata = WeightsMetadata(training=origin)
    if shards is not None:
        manifest = Manifest.read(shards)
        _check_latents(Path(shards), manifest, config)
        metadata = ModelMetadata(
            autoencoder=manifest.autoencoder,
            scaling=LatentScaling.of(manifest, scaling),
            latent_shape=manifest.latent_shape,
            fps=manifest.fps,
            frame_stride=frame_stride,
            classes=manifest.classes,
            training=origin,
        )
    save_model_dir(out, config, state, metadata)
    return config


def _find_config(state: Mapping[str, Tensor], window: int, patch: int) -> FARConfig:
    """Infer the model's shape from a few tensors; all tensors are checked against it afterwards."""
    embedding = state.get("x_embedder.weight")
    blocks = {match[1] for name in state if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    if embedding is None or embedding.ndim != 2 or not blocks:
        names = ", ".join(list(state)[:3]) or "nothing"
        raise UserError(
            f"official weights: misses x_embedder.weight or the tensors of transformer_blocks.0, has {names}, ...; "
            "it is not of the official FAR or FAR_Long"
        )
    width, inputs = embedding.shape
    if width % HEAD_DIM or patch < 1 or not inputs or inputs % patch**2:
        raise UserError(
            f"official weights: x_embedder.weight is {[width, inputs]}, which is not a width in heads of {HEAD_DIM} by "
            f"channels x patch^2 with patch={patch}; give the patch that the model was trained with"
        )
    channels = inputs // patch**2
    actions = _axis_length(state, ACTIONS, 0)
    labels = 0 if actions else _axis_length(state, LABELS, 0)
    try:
        return FARConfig(
            layers=len(blocks),
            heads=width // HEAD_DIM,
            patch=patch,
            channels=channels,
            window=window,
            actions=max(actions - 1, 0),  # without the null class
            labels=max(labels - 1, 0),
            context_patch=math.isqrt(_axis_length(state, "context_embedder.weight", 1) // channels),
        )
    except ValueError as error:
        raise UserError(f"official weights: {error}") from None


def _axis_length(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    """The length of an axis of a matrix; 0 where there is no such matrix."""
    return state[name].shape[axis] if name in state and state[name].ndim == 2 else 0


def _names_and_shapes(config: FARConfig) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Our names -> the official names of their parts, and the official names -> shapes."""
    names: dict[str, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    for ours, tensor in empty_model(config).state_dict().items():
        names[ours] = _official_names(ours, config)
        length, *rest = tensor.shape
        shapes |= {name: [length // len(names[ours]), *rest] for name in names[ours]}
    return names, shapes


def _official_names(name: str, config: FARConfig) -> list[str]:
    if name == "condition_embedding.weight":
        return [ACTIONS if config.actions else LABELS]
    module, _, kind = name.rpartition(".")
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return [f"transformer_blocks.{block[1]}.{part}.{kind}" for part in BLOCK_MODULES[block[2]]]
    return [f"{MODULES[module]}.{kind}"]


def _stack(parts: list[tuple[str, Tensor]]) -> Tensor:
    tensors = [tensor for _, tensor in parts]
    if len(tensors) == 1:
        return tensors[0]
    if len({tensor.dtype for tensor in tensors}) > 1:  # concatenation would round some of them
        dtypes = ", ".join(f"{name} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in parts)
        raise UserError(f"official weights: {dtypes}; these must have the same dtype")
    return torch.cat(tensors)


def _check_latents(shards: Path, manifest: Manifest, config: FARConfig) -> None:
    channels, *size = manifest.latent_shape
    patch = config.context_patch or config.patch
    if channels != config.channels or any(side % patch for side in size):
        raise UserError(
            f"{shards}: frame latents of {list(manifest.latent_shape)}, the model takes {config.channels} channels in "
            f"patches of {patch}; name the shard set of the model's own latents"
        )
    for name, classes, classes_of_set in (
        ("actions", config.actions, manifest.actions),
        ("labels", config.labels, manifest.labels),
    ):
        if classes and classes != classes_of_set:
            raise UserError(
                f"{shards}: {classes_of_set} {name}, the model has {classes}; name the shard set of the model's latents"
            )
