"""Model directories: what is exported, loaded and sampled from.

far_scale/model/model_files.py describes and reads the files. Here are the metadata in config.json, and the writer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor

from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.records import ModelWithClasses, Positive
from far_scale.model import FAR, FARConfig
from far_scale.model.model_files import (
    CONFIG_FILE,
    FORMAT,
    INDEX_FILE,
    MODEL_FILES,
    WEIGHTS_FILE,
    check_state_dict,
    find_damage,
    read_config_values,
    recorded_files,
    stored_dtypes,
)
from far_scale.utils.errors import UserError
from far_scale.utils.io import parse_json, sha256, sync_folder
from far_scale.utils.strict_model import Digest, StrictModel, first_problem
from far_scale.utils.tensor_files import save_tensors

MAX_FILE_BYTES = 5 * 10**9
CARD_FILE = "README.md"
CARD_MARK = "<!-- far_scale made this card from config.json, and replaces it while this line is here. -->"


class TrainingMetadata(StrictModel):
    """The origin of trained weights: step, recipe, EMA or model weights, and the version that exported them.

    Attributes:
        checkpoint: the exported checkpoint's content hash (`checkpoint.fingerprint`); None in older directories.
    """

    step: Annotated[int, Field(ge=0)]
    recipe_hash: str
    weights: Literal["ema", "model"]
    far_scale: str
    checkpoint: Digest | None = None


class ImportMetadata(StrictModel):
    """The origin of weights trained elsewhere: the file, its SHA-256, and the version that imported it."""

    imported_from: str
    sha256: Digest
    far_scale: str


class WeightsMetadata(StrictModel):
    """Metadata of imported weights without the latents they go with; these load, but cannot sample."""

    training: ImportMetadata


class ModelMetadata(ModelWithClasses):
    """What sampling needs beside the model's shape and weights.

    Attributes:
        autoencoder: the autoencoder of the training latents.
        scaling: the map from those latents to the model's scale.
        latent_shape: (C, H, W) of a frame latent.
        fps: frames per second of the training videos, or None where they differ.
        frame_stride: the model was trained on every n-th frame.
        classes: class names of the labels, or None where unknown.
        context_frames: the most coarse context frames of a clip in training; None where unknown, or without context.
        training: the origin of the weights, a run or an imported file.
    """

    autoencoder: AutoencoderInfo
    scaling: LatentScaling
    latent_shape: tuple[Positive, Positive, Positive]
    fps: Annotated[float, Field(gt=0)] | None
    frame_stride: Positive = 1
    context_frames: Annotated[int, Field(ge=0)] | None = None
    training: TrainingMetadata | ImportMetadata

    @model_validator(mode="after")
    def _channels_agree(self) -> ModelMetadata:
        if len(self.scaling.scale) != self.latent_shape[0]:
            raise ValueError(f"scaling must have {self.latent_shape[0]} numbers, one a latent channel")
        return self


def is_model_dir(folder: str | Path) -> bool:
    """Whether `folder` is a model directory with nothing else but its card; its files may be damaged or missing."""
    folder = Path(folder)
    try:
        text = (folder / CONFIG_FILE).read_text(errors="replace")
        only_model_files = all(
            MODEL_FILES.fullmatch(name) or (name == CARD_FILE and is_generated_card(folder / name))
            for name in os.listdir(folder)
        )
    except OSError:
        return False
    try:
        config = parse_json(text)
    except ValueError:  # truncated, but it begins like ours
        return only_model_files and re.match(rf'{{\s*"format": "{FORMAT}"', text) is not None
    return only_model_files and isinstance(config, dict) and config.get("format") == FORMAT


def is_generated_card(path: Path) -> bool:
    """Whether the file is a model card as tools/model_card.py writes it, and not edited by hand."""
    return CARD_MARK in path.read_text(errors="replace").splitlines()


def is_intact(
    folder: str | Path, config: FARConfig, metadata: ModelMetadata | WeightsMetadata, dtype: torch.dtype
) -> bool:
    """Whether `folder` is a model directory of this shape and metadata, with all files as they were written.

    Args:
        dtype: of all its weights.
    """
    folder = Path(folder)
    if not is_model_dir(folder):
        return False
    try:
        return (
            read_any_config(folder) == (config, metadata)
            and find_damage(folder, recorded_files(folder)) is None
            and stored_dtypes(folder) == {dtype}
        )
    except UserError:
        return False


def save_model_dir(
    folder: str | Path,
    config: FARConfig,
    state: Mapping[str, Tensor],
    metadata: ModelMetadata | WeightsMetadata,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model directory atomically; an older model directory at `folder` is replaced.

    Args:
        state: `FAR.state_dict()`, kept in its dtypes; checked against the model of `config`.
        max_file_bytes: larger weights are split into several files.

    Raises:
        UserError: tensors that do not fit `config`, or `folder` exists and is no model directory.
    """
    folder = Path(os.path.realpath(folder))  # a symlink stays and points to the new model
    _check_tensors(folder, empty_model(config), state)
    if os.path.lexists(folder) and not is_model_dir(folder) and not (folder.is_dir() and not os.listdir(folder)):
        raise UserError(f"{folder}: exists and is not only a model directory; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:12]
    staged = folder.with_name(f".{folder.name}.{unique}.part")
    replaced = folder.with_name(f".{folder.name}.{unique}.old.part")
    try:
        staged.mkdir()
        _write_weights(staged, state, max_file_bytes)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(staged.iterdir())}
        unknown = {"context_frames"} if getattr(metadata, "context_frames", None) is None else set()
        described = metadata.model_dump(mode="json", exclude=unknown)
        values = {"format": FORMAT, "model": config.to_dict(), **described, "files": files}
        (staged / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")
        _sync_files(staged)
        _replace_folder(staged, folder, replaced)
        sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (SafetensorError, OSError) as error:
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        raise UserError(f"{folder}: could not be written ({error}); free some space, or write elsewhere") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _replace_folder(staged: Path, folder: Path, replaced: Path) -> None:
    """Rename `folder` to `replaced` and `staged` to `folder`, safe against concurrent exports."""
    while True:
        # A folder cannot be renamed over a non-empty one, so for a moment `folder` does not exist.
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, replaced)
        try:
            os.replace(staged, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(replaced, ignore_errors=True)  # another export was faster: replace its result
        else:
            return


def load_model_dir(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[FAR, ModelMetadata]:
    """Load a model in evaluation mode, with its metadata.

    Args:
        dtype: of the weights; default: as stored.

    Raises:
        UserError: no such folder, a config.json that is invalid or lacks what sampling needs, or weights that are
            unreadable, missing, unexpected, of another shape (named) or not those that config.json was written with.
    """
    config, metadata = read_config(folder)
    return FAR.load(Path(folder), config, device, dtype), metadata


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> FAR:
    """As `load_model_dir`, without the metadata; also loads a directory of imported weights only."""
    return FAR.load(Path(folder), read_any_config(folder)[0], device, dtype)


def read_config(folder: str | Path) -> tuple[FARConfig, ModelMetadata]:
    """Read the model's shape and metadata from config.json; errors as `load_model_dir`."""
    config, metadata = read_any_config(folder)
    if isinstance(metadata, WeightsMetadata):
        raise UserError(
            f"{Path(folder) / CONFIG_FILE}: autoencoder, scaling and latent_shape are not set; run "
            f"tools/import_checkpoint.py on {metadata.training.imported_from} again with --shards, a shard set of the "
            "model's latents"
        )
    return config, metadata


def read_any_config(folder: str | Path) -> tuple[FARConfig, ModelMetadata | WeightsMetadata]:
    """As `read_config`, also for a directory of imported weights only."""
    path, values = Path(folder) / CONFIG_FILE, read_config_values(folder)
    rest = {key: value for key, value in values.items() if key not in ("format", "model", "files")}
    kind = WeightsMetadata if rest.keys() == WeightsMetadata.model_fields.keys() else ModelMetadata
    config = FARConfig.read(folder)
    try:
        metadata = kind.model_validate_json(json.dumps(rest))  # from JSON, where a list may be a tuple
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; export the model again") from None
    if isinstance(metadata, ModelMetadata) and metadata.latent_shape[0] != config.channels:
        raise UserError(
            f"{path}: latent_shape has {metadata.latent_shape[0]} channels and model.channels is {config.channels}; "
            "export the model again"
        )
    return config, metadata


def _check_tensors(folder: Path, model: FAR, state: Mapping[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_state_dict(f"{folder}: the model", expected, state, "config.json and weights do not fit together")


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_file_bytes: int) -> None:
    """Write one file, or several of at most `max_file_bytes` (a tensor is never split) and their index."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    if len(files) == 1:
        _save(files[0], folder / WEIGHTS_FILE)
        return
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _save(tensors, folder / file_name)
        weight_map.update(dict.fromkeys(tensors, file_name))
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Hugging Face's loaders look for {"format": "pt"}. Clones, because safetensors refuses views.
    dense = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_tensors(dense, path, metadata={"format": "pt"})


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def empty_model(config: FARConfig) -> FAR:
    """The model on the meta device: names and shapes without memory, or for weights that are assigned later."""
    with torch.device("meta"):
        return FAR(config)
