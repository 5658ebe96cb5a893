"""The official code's trained DC-AE (showlab/FAR, `MyAutoencoderDC` of far/models/autoencoder_dc_model.py) as ours.

Its state dict has the names of diffusers' `AutoencoderDC`, which are ours, too; its trainer's ema.pth is a whole one,
with the running statistics of the batch norms. Every tensor goes over bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

import far_scale
from far_scale.autoencoder import network_of
from far_scale.autoencoder.deep_compression import CLASS_NAME, PRESETS, SCALING_FACTOR
from far_scale.convert.fit import check_fit
from far_scale.convert.official_file import read_official
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write, sha256, write_json
from far_scale.utils.tensor_files import save_tensors


def is_autoencoder(path: str | Path) -> bool:
    """Whether an official file holds a DC-AE, told by its tensors' names; else it is a FAR model.

    Raises:
        UserError: see `read_official`, and a file that holds neither.
    """
    names = list(read_official(path))
    if names and all(name.startswith(("encoder.", "decoder.")) for name in names):
        return True
    if any(re.match(r"(module\.)?(x_embedder|transformer_blocks)\.", name) for name in names):
        return False
    found = ", ".join(names[:3]) or "nothing"
    raise UserError(
        f"{path}: holds {found}, ...: neither an official FAR or FAR_Long (x_embedder, transformer_blocks, ...) "
        "nor an official DC-AE (encoder and decoder alone); give a file of one of these"
    )


def import_autoencoder(path: str | Path, out: str | Path) -> str:
    """Write an official DC-AE as a .safetensors file with its card beside it.

    Args:
        path: see `read_official`.
        out: the .safetensors file to write; the autoencoder will have its name.

    Returns:
        The name of its configuration: f8c32, f16c32 or f32c32.

    Raises:
        UserError: diffusers is missing, `out` is no .safetensors file, or tensors that are not those of the official
            DC-AE in one of its configurations, named.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: an autoencoder is a file; name one that ends in .safetensors")
    state = read_official(path)
    preset = _preset(state)
    config = {"_class_name": CLASS_NAME, **PRESETS[preset]}
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in network_of(config).state_dict().items()}
    known = ", ".join(PRESETS)
    mend = f"it is not an official DC-AE of {known}; one of another configuration is taken as a folder of diffusers"
    check_fit(f"{path}: taken for {preset}, which has as many stages, it", expected, state, mend)
    with atomic_write(out) as beside:
        save_tensors({name: tensor.contiguous() for name, tensor in state.items()}, beside)
    card = {
        "name": out.stem,
        "config": config,
        "scaling_factor": SCALING_FACTOR,
        "weights_sha256": sha256(out),
        "imported_from": Path(path).name,
        "imported_sha256": sha256(path),
        "far_scale": far_scale.__version__,
    }
    write_json(out.with_suffix(".json"), card)
    return preset


def _preset(names: Iterable[str]) -> str:
    """The configuration that has as many stages as tensors are named of; whether they fit is not said."""
    stages = {int(match[1]) for name in names if (match := re.match(r"encoder\.down_blocks\.(\d+)\.", name))}
    by_last_stage = {len(config["encoder_block_types"]) - 1: preset for preset, config in PRESETS.items()}
    return by_last_stage.get(max(stages, default=0), next(iter(PRESETS)))
