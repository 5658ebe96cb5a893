"""Trained autoencoders by name or path: safetensors files with metadata, and folders saved by diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from far_scale.autoencoder.compact import CompactAutoencoder, CompactConfig
from far_scale.autoencoder.deep_compression import CLASS_NAME, DeepCompressionAutoencoder
from far_scale.autoencoder.network import Autoencoder, AutoencoderNetwork
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, sha256

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"  # part of the package
FOLDER_VARIABLE = "FAR_SCALE_AUTOENCODERS"  # the user's folder of autoencoders
DEFAULT_FOLDER = "autoencoders"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def build_network(config: Mapping[str, Any]) -> AutoencoderNetwork:
    """Build a network with random weights from `AutoencoderNetwork.config_dict`.

    Raises:
        UserError: an unknown kind of autoencoder, or diffusers is missing.
        Exception: any kind: an invalid config, which diffusers does not check.
    """
    kind = config.get("_class_name")
    if kind is None:
        return CompactAutoencoder(CompactConfig(**config))
    if kind != CLASS_NAME:
        raise UserError(f"_class_name is {kind}, only {CLASS_NAME} is supported (compact ones have none)")
    # Other keys with an underscore are diffusers' notes, such as its version; the factor is not part of the network.
    ignored = ("_", "scaling_factor")
    return DeepCompressionAutoencoder({key: value for key, value in config.items() if not key.startswith(ignored)})


def load(
    name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load a trained autoencoder by name or path.

    A path is a .safetensors file with its metadata (.json) beside it, or a folder saved by diffusers' `AutoencoderDC`,
    whose name is the folder's. A name is that of a shipped autoencoder, or of such a file or folder in
    FAR_SCALE_AUTOENCODERS (default: `autoencoders`). Shard sets and model directories refer to it by name.

    Args:
        name_or_path: see above.
        device: where it computes.
        dtype: compute type, float32 or bfloat16; inputs and outputs are float32.

    Raises:
        UserError: no such name, file or folder, no metadata, an unknown kind of autoencoder, diffusers is missing, or
            weights that are broken or do not fit the metadata.
    """
    weights = _find_weights(name_or_path)
    from_diffusers = weights.name == DIFFUSERS_WEIGHTS
    metadata_file = weights.with_name("config.json") if from_diffusers else weights.with_suffix(".json")
    metadata = read_json(metadata_file, "config of an autoencoder" if from_diffusers else "metadata of an autoencoder")
    try:
        if from_diffusers:  # its default factor is 1
            metadata = {
                "name": weights.parent.resolve().name,
                "scaling_factor": metadata.get("scaling_factor", 1.0),
                "config": metadata,
            }
        name, factor = str(metadata["name"]), float(metadata["scaling_factor"])
        with torch.device("meta"):  # no memory or random numbers for weights that are replaced at once
            network = build_network(metadata["config"])
    except UserError as error:
        raise UserError(f"{metadata_file}: {error}") from None
    except Exception as error:
        expected = "a config of diffusers' AutoencoderDC" if from_diffusers else "metadata written by far_scale"
        raise UserError(f"{metadata_file}: not {expected} ({error!r}); use the one of these weights") from None
    try:
        network.load_state_dict(load_file(weights), assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{weights}: weights are broken or of another autoencoder ({reason}); copy them again"
        ) from None
    weight_hash = sha256(weights)
    if not from_diffusers and metadata.get("weights_sha256", weight_hash) != weight_hash:
        raise UserError(f"{weights}: not the weights that {metadata_file.name} describes; copy both again")
    return Autoencoder(name, weight_hash, factor, network, torch.device(device), dtype)


def _find_weights(name_or_path: str | Path) -> Path:
    """The weights file of a name or path."""
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        if path.is_file():
            return path
        raise UserError(f"autoencoder {path}: there is no such file")
    user_folder = Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))
    for file in (SHIPPED_WEIGHTS / f"{path}.safetensors", user_folder / f"{path}.safetensors"):
        if file.is_file():
            return file
    for folder in (user_folder / path, path):
        if (folder / "config.json").is_file():
            if not (folder / DIFFUSERS_WEIGHTS).is_file():
                raise UserError(f"autoencoder {folder}: has no {DIFFUSERS_WEIGHTS}; save it again by save_pretrained")
            return folder / DIFFUSERS_WEIGHTS
    shipped = ", ".join(sorted(file.stem for file in SHIPPED_WEIGHTS.glob("*.safetensors")))
    raise UserError(
        f"autoencoder {name_or_path}: no such name; shipped: {shipped}; or give the path of a .safetensors file or of "
        f"a folder saved by diffusers, or put that into {user_folder} ({FOLDER_VARIABLE} names this folder)"
    )
