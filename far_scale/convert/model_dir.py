"""Model directories: what is exported, loaded and sampled from.

A folder with `config.json` (the model's shape, its metadata, and size and SHA-256 of the other files) and
`model.safetensors`, or above 5 GB `model-00001-of-0000N.safetensors` files and `model.safetensors.index.json`, in the
layout of Hugging Face libraries.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.shards.manifest import AutoencoderInfo
from far_scale.data.shards.records import Digest, ModelWithClasses, Positive, StrictModel, first_problem
from far_scale.model import FAR, FARConfig
from far_scale.utils.errors import UserError
from far_scale.utils.io import parse_json, read_json, sha256, sync_folder
from far_scale.utils.tensor_files import save_tensors

FORMAT = "far_scale.model/1"
MAX_FILE_BYTES = 5 * 10**9
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_FILES = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors")
MAX_NAMED = 3  # tensors that an error names of each kind; the others are counted


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


class WeightsFile(StrictModel):
    """Size and SHA-256 of a weights file when it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


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
    """Whether `folder` is a model directory and holds nothing else; its files may be damaged or missing."""
    try:
        text = (Path(folder) / CONFIG_FILE).read_text(errors="replace")
        only_model_files = all(MODEL_FILES.fullmatch(name) for name in os.listdir(folder))
    except OSError:
        return False
    try:
        config = parse_json(text)
    except ValueError:  # truncated, but it begins like ours
        return only_model_files and re.match(rf'{{\s*"format": "{FORMAT}"', text) is not None
    return only_model_files and isinstance(config, dict) and config.get("format") == FORMAT


def is_intact(folder: str | Path, config: FARConfig, metadata: ModelMetadata | WeightsMetadata) -> bool:
    """Whether `folder` is a model directory of this shape and metadata, with all files as they were written."""
    if not is_model_dir(folder):
        return False
    try:
        return (
            read_any_config(folder) == (config, metadata)
            and _find_damage(Path(folder), _recorded_files(folder)) is None
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
    return _load(Path(folder), config, device, dtype), metadata


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> FAR:
    """As `load_model_dir`, without the metadata; also loads a directory of imported weights only."""
    return _load(Path(folder), read_any_config(folder)[0], device, dtype)


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
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no model directory here; tools/export_checkpoint.py makes one")
    path = folder / CONFIG_FILE
    values = read_json(path, "model directory's config.json")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{path}: format is {found!r}, needed is {FORMAT!r}; export the model with this far_scale")
    rest = {key: value for key, value in values.items() if key not in ("format", "model", "files")}
    kind = WeightsMetadata if rest.keys() == WeightsMetadata.model_fields.keys() else ModelMetadata
    try:
        config = FARConfig.from_dict(values.get("model", {}))
        metadata = kind.model_validate_json(json.dumps(rest))  # from JSON, where a list may be a tuple
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; export the model again") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: model: {error}; export the model again") from None
    if isinstance(metadata, ModelMetadata) and metadata.latent_shape[0] != config.channels:
        raise UserError(
            f"{path}: latent_shape has {metadata.latent_shape[0]} channels and model.channels is {config.channels}; "
            "export the model again"
        )
    return config, metadata


def _load(folder: Path, config: FARConfig, device: str | torch.device, dtype: torch.dtype | None) -> FAR:
    # Copies: tensors in the memory-mapped file are not aligned as kernels expect, and then round differently.
    state = {
        name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in _read_weights(folder, device).items()
    }
    model = empty_model(config)
    _check_tensors(folder, model, state)
    files = _recorded_files(folder)
    if files is not None and (problem := _find_damage(folder, files)) is not None:
        raise UserError(
            f"{problem}; copy or export the model again, or, if its weights were changed on purpose, remove "
            f"the key files from {CONFIG_FILE}"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def _recorded_files(folder: str | Path) -> dict[str, WeightsFile] | None:
    """The weights files listed in config.json; None where it has no list (older or foreign directories)."""
    path = Path(folder) / CONFIG_FILE
    files = read_json(path, "model directory's config.json").get("files")
    if files is None:
        return None
    try:
        return TypeAdapter(dict[str, WeightsFile]).validate_python(files)
    except ValidationError as error:
        raise UserError(f"{path}: files: {first_problem(error)}; export the model again") from None


def _find_damage(folder: Path, files: Mapping[str, WeightsFile] | None) -> str | None:
    """The first file that differs from its record in config.json, as one line; None where all agree."""
    if files is None:
        return f"{folder / CONFIG_FILE}: does not list the weights files"
    present = {path.name for path in folder.iterdir() if MODEL_FILES.fullmatch(path.name)} - {CONFIG_FILE}
    for name in sorted(present | files.keys()):
        path = folder / name
        if name not in files:
            return f"{path}: this file is not named in {CONFIG_FILE}"
        if name not in present:
            return f"{path}: this weights file is missing"
        size, expected = path.stat().st_size, files[name].bytes
        if size != expected:
            return f"{path}: has {size} bytes, but was written with {expected}"
        if sha256(path) != files[name].sha256:
            return f"{path}: does not have the SHA-256 that it was written with"
    return None


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


def _read_weights(folder: Path, device: str | torch.device) -> dict[str, Tensor]:
    if (folder / INDEX_FILE).is_file():
        index: Any = read_json(folder / INDEX_FILE, "index of weights")
        try:
            names = sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{folder / INDEX_FILE}: holds no weight_map; export the model again") from None
    else:
        names = [WEIGHTS_FILE]
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: this weights file is missing; copy or export the model again")
        try:
            state.update(load_file(path, device=str(device)))
        except SafetensorError as error:
            raise UserError(
                f"{path}: is not a complete safetensors file ({error}); copy or export the model again"
            ) from None
    return state


def empty_model(config: FARConfig) -> FAR:
    """The model on the meta device: names and shapes without memory, or for weights that are assigned later."""
    with torch.device("meta"):
        return FAR(config)


def check_state_dict(source: str, expected: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], fix: str) -> None:
    """Check that `state` holds exactly the tensors of `expected`, by name and shape.

    Args:
        source: what holds the tensors, for the error.
        expected: names and shapes.
        fix: what to do about it, for the error.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    kinds = {
        "misses": [name for name in expected if name not in state],
        "has unexpected": [name for name in state if name not in expected],
        "has in another shape": [
            f"{name} ({list(state[name].shape)} instead of {list(shape)})"
            for name, shape in expected.items()
            if name in state and list(state[name].shape) != list(shape)
        ],
    }
    problems = [
        f"{kind} tensors: {', '.join(names[:MAX_NAMED])}"
        + (f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else "")
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise UserError(f"{source} {'; '.join(problems)}; {fix}")
