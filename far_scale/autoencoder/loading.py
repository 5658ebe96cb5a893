"""Trained autoencoders by name or path: our own files with a card, and folders of diffusers."""

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
from far_scale.autoencoder.network import AutoencoderNetwork
from far_scale.autoencoder.trained import Autoencoder
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, sha256

WEIGHTS = Path(__file__).parent / "weights"  # what ships with the package
FOLDER_VARIABLE = "FAR_SCALE_AUTOENCODERS"  # names the folder of the autoencoders that do not
DEFAULT_FOLDER = "autoencoders"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def network_of(config: Mapping[str, Any]) -> AutoencoderNetwork:
    """The network, with fresh weights, of a card's `config`: see `AutoencoderNetwork.card_config`.

    Raises:
        UserError: another kind of autoencoder, or diffusers is missing.
        Exception: of whatever kind, a config that its kind cannot be built from; diffusers does not check it.
    """
    kind = config.get("_class_name")
    if kind is None:
        return CompactAutoencoder(CompactConfig(**config))
    if kind != CLASS_NAME:
        raise UserError(f"_class_name is {kind}, and only {CLASS_NAME} is taken (compact ones have none)")
    # What else begins so are diffusers' notes, such as its version; the factor is the card's, no part of the network.
    notes = ("_", "scaling_factor")
    return DeepCompressionAutoencoder({key: value for key, value in config.items() if not key.startswith(notes)})


def load(
    name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """A trained autoencoder, by its name or path.

    A path is a .safetensors file with its .json card beside it, or a folder that diffusers' `AutoencoderDC` was saved
    to, which has the folder's name. A name is one that ships with the package, or that of such a file or folder in
    the folder that FAR_SCALE_AUTOENCODERS names (by default `autoencoders`): so what has the name alone, as a shard
    set or a model directory, finds it again.

    Args:
        name_or_path: see above.
        device: where it computes.
        dtype: what it computes in, float32 or bfloat16; what goes in and comes out is float32 either way.

    Raises:
        UserError: no such name, file or folder, no card, another kind of autoencoder, diffusers is missing, or weights
            that are broken or do not fit the card.
    """
    weights = _find(name_or_path)
    of_diffusers = weights.name == DIFFUSERS_WEIGHTS
    card_file = weights.with_name("config.json") if of_diffusers else weights.with_suffix(".json")
    card = read_json(card_file, "config of an autoencoder" if of_diffusers else "card of an autoencoder")
    try:
        if of_diffusers:  # whose own default is a factor of 1
            card = {
                "name": weights.parent.resolve().name,
                "scaling_factor": card.get("scaling_factor", 1.0),
                "config": card,
            }
        name, factor = str(card["name"]), float(card["scaling_factor"])
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
            network = network_of(card["config"])
    except UserError as error:
        raise UserError(f"{card_file}: {error}") from None
    except Exception as error:
        what = "a config of diffusers' AutoencoderDC" if of_diffusers else "a card that far_scale wrote"
        raise UserError(f"{card_file}: not {what} ({error!r}); take the one that came with the weights") from None
    try:
        network.load_state_dict(load_file(weights), assign=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{weights}: weights are broken or of another autoencoder ({reason}); copy them again"
        ) from None
    weight_hash = sha256(weights)
    if not of_diffusers and card.get("weights_sha256", weight_hash) != weight_hash:
        raise UserError(f"{weights}: these are not the weights of its card {card_file.name}; copy both again")
    return Autoencoder(name, weight_hash, factor, network, torch.device(device), dtype)


def _find(name_or_path: str | Path) -> Path:
    """The file of the weights."""
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        if path.is_file():
            return path
        raise UserError(f"autoencoder {path}: there is no such file")
    own = Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))
    for file in (WEIGHTS / f"{path}.safetensors", own / f"{path}.safetensors"):
        if file.is_file():
            return file
    for folder in (own / path, path):
        if (folder / "config.json").is_file():
            if not (folder / DIFFUSERS_WEIGHTS).is_file():
                raise UserError(f"autoencoder {folder}: has no {DIFFUSERS_WEIGHTS}; save it again by save_pretrained")
            return folder / DIFFUSERS_WEIGHTS
    shipped = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.safetensors")))
    raise UserError(
        f"autoencoder {name_or_path}: there is none of this name; shipped: {shipped}; or give the path of a "
        f".safetensors file or of a folder of diffusers, or put that into {own} ({FOLDER_VARIABLE} names this folder)"
    )
