"""The official code's trained DC-AE (showlab/FAR, `MyAutoencoderDC` of far/models/autoencoder_dc_model.py) as ours.

Its state dict has the names of diffusers' `AutoencoderDC`, as ours has; its trainer's ema.pth is complete, with the
running statistics of the batch norms. Every tensor is converted bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

import far_scale
from far_scale.autoencoder import build_network
from far_scale.autoencoder.deep_compression import CLASS_NAME, PRESETS, SCALING_FACTOR
from far_scale.convert.official import read_official
from far_scale.model.model_files import check_state_dict
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, sha256, write_json
from far_scale.utils.tensor_files import save_tensors


def is_autoencoder(path: str | Path) -> bool:
    """Whether an official file holds a DC-AE rather than a FAR model, by its tensors' names.

    Raises:
        UserError: as `read_official`, or the file holds neither.
    """
    names = list(read_official(path))
    if names and all(name.startswith(("encoder.", "decoder.")) for name in names):
        return True
    if any(re.match(r"(module\.)?(x_embedder|transformer_blocks)\.", name) for name in names):
        return False
    content = ", ".join(names[:3]) or "nothing"
    raise UserError(
        f"{path}: holds {content}, ...: neither an official FAR or FAR_Long (x_embedder, transformer_blocks, ...) "
        "nor an official DC-AE (only encoder and decoder); give a file of one of these"
    )


def import_autoencoder(path: str | Path, out: str | Path) -> str:
    """Write an official DC-AE as a .safetensors file, with its metadata in a .json file beside it.

    Args:
        path: see `read_official`.
        out: the .safetensors file to write; its stem becomes the autoencoder's name.

    Returns:
        The name of its configuration: f8c32, f16c32 or f32c32.

    Raises:
        UserError: diffusers is missing, `out` has another suffix, or the tensors (named) are not those of an official
            configuration.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: an autoencoder is a file; give a name that ends in .safetensors")
    state = read_official(path)
    preset = _guess_preset(state)
    config = {"_class_name": CLASS_NAME, **PRESETS[preset]}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in build_network(config).state_dict().items()}
    fix = f"it is not an official DC-AE ({', '.join(PRESETS)}); use other configurations as a folder saved by diffusers"
    check_state_dict(f"{path}: it has as many stages as {preset}, but", expected, state, fix)
    with atomic_write(out) as staged:
        save_tensors({name: tensor.contiguous() for name, tensor in state.items()}, staged)
    metadata = {
        "name": out.stem,
        "config": config,
        "scaling_factor": SCALING_FACTOR,
        "weights_sha256": sha256(out),
        "imported_from": Path(path).name,
        "imported_sha256": sha256(path),
        "far_scale": far_scale.__version__,
    }
    write_json(out.with_suffix(".json"), metadata)
    return preset


def _guess_preset(names: Iterable[str]) -> str:
    """The configuration with as many stages as the tensors' names have; whether they fit is not checked."""
    stages = {int(match[1]) for name in names if (match := re.match(r"encoder\.down_blocks\.(\d+)\.", name))}
    by_last_stage = {len(config["encoder_block_types"]) - 1: preset for preset, config in PRESETS.items()}
    return by_last_stage.get(max(stages, default=0), next(iter(PRESETS)))
