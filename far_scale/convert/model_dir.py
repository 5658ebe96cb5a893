"""Model directories: what is exported, loaded and sampled from.

A folder with `config.json` (the model's shape, its card, and size and SHA-256 of the other files) and
`model.safetensors`, or, above 5 GB, with `model-00001-of-0000N.safetensors` files and `model.safetensors.index.json`,
laid out as Hugging Face libraries do.
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
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from far_scale.convert.fit import check_fit, empty_model
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
OWN_FILES = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors")


class TrainingMetadata(StrictModel):
    """Where the weights come from: the step, the recipe, which of the two sets, and the version that exported them.

    Attributes:
        checkpoint: what the exported checkpoint held (`checkpoint.fingerprint`); None of directories from before.
    """

    step: Annotated[int, Field(ge=0)]
    recipe_hash: str
    weights: Literal["ema", "model"]
    far_scale: str
    checkpoint: Digest | None = None


class WeightsFile(StrictModel):
    """Size and SHA-256 that a file of the weights was written with."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class ImportMetadata(StrictModel):
    """Where weights come from that were trained elsewhere: the file, its SHA-256, the version that imported it."""

    imported_from: str
    sha256: Digest
    far_scale: str


class WeightsMetadata(StrictModel):
    """The card of weights of which nobody has told yet what latents they go with."""

    training: ImportMetadata


class ModelMetadata(ModelWithClasses):
    """What one has to know beside the model's shape to sample from its weights.

    Attributes:
        autoencoder: the one whose latents the model was trained on.
        scaling: how those latents are brought to the model's scale.
        latent_shape: (C, H, W) of a frame latent.
        fps: frames a second of the videos trained on, or None where they differ.
        frame_stride: the model was trained on every n-th frame of them.
        classes: the names of the labels' classes, or None where they are not known.
        training: where the weights come from, a run or an imported file.
    """

    autoencoder: AutoencoderInfo
    scaling: LatentScaling
    latent_shape: tuple[Positive, Positive, Positive]
    fps: Annotated[float, Field(gt=0)] | None
    frame_stride: Positive = 1
    training: TrainingMetadata | ImportMetadata

    @model_validator(mode="after")
    def _channels_agree(self) -> ModelMetadata:
        if len(self.scaling.scale) != self.latent_shape[0]:
            raise ValueError(f"scaling must have {self.latent_shape[0]} numbers, one a latent channel")
        return self


def is_model_dir(folder: str | Path) -> bool:
    """Whether `folder` is a model directory, with nothing else in it; its files may be damaged or missing."""
    try:
        text = (Path(folder) / CONFIG_FILE).read_text(errors="replace")
        own = all(OWN_FILES.fullmatch(name) for name in os.listdir(folder))
    except OSError:
        return False
    try:
        config = parse_json(text)
    except ValueError:  # cut off, but it begins as ours do
        return own and re.match(rf'{{\s*"format": "{FORMAT}"', text) is not None
    return own and isinstance(config, dict) and config.get("format") == FORMAT


def holds(folder: str | Path, config: FARConfig, card: ModelMetadata | WeightsMetadata) -> bool:
    """Whether `folder` is a model directory of this shape and card, whose files are all as they were written."""
    if not is_model_dir(folder):
        return False
    try:
        return read_any_config(folder) == (config, card) and _damage(Path(folder), _recorded_files(folder)) is None
    except UserError:
        return False


def save_model_dir(
    folder: str | Path,
    config: FARConfig,
    state: Mapping[str, Tensor],
    card: ModelMetadata | WeightsMetadata,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write a model directory beside `folder`, then rename it; an older model directory there is replaced.

    Args:
        state: the tensors of FAR.state_dict(), kept in their dtype; checked against the model of `config`.
        max_file_bytes: weights of more bytes than this are spread over several files.

    Raises:
        UserError: tensors that are not those of `config`, or something at `folder` that is no model directory.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, and goes on to name the model
    _check_tensors(folder, empty_model(config), state)
    if os.path.lexists(folder) and not is_model_dir(folder) and not (folder.is_dir() and not os.listdir(folder)):
        raise UserError(f"{folder}: is there already and is no mere model directory; name a folder that is not there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    own_name = uuid.uuid4().hex[:12]
    beside = folder.with_name(f".{folder.name}.{own_name}.part")
    replaced = folder.with_name(f".{folder.name}.{own_name}.old.part")
    try:
        beside.mkdir()
        _write_weights(beside, state, max_file_bytes)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(beside.iterdir())}
        values = {"format": FORMAT, "model": config.to_dict(), **card.model_dump(mode="json"), "files": files}
        (beside / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")
        _sync_files(beside)
        _swap_in(beside, folder, replaced)
        sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (SafetensorError, OSError) as error:
        if replaced.exists() and not folder.exists():
            os.replace(replaced, folder)
        raise UserError(f"{folder}: could not be written ({error}); free some space, or write elsewhere") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _swap_in(beside: Path, folder: Path, replaced: Path) -> None:
    """Give `beside` the name `folder`, and what has it the name `replaced`, also while others do the same."""
    while True:
        # A folder cannot be renamed over a full one, so there is a moment without either.
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, replaced)
        try:
            os.replace(beside, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(replaced, ignore_errors=True)  # another export was faster: replace its model
        else:
            return


def load_model_dir(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[FAR, ModelMetadata]:
    """The model of a model directory, in evaluation mode, and its card.

    Args:
        dtype: of the weights; that of the file unless given.

    Raises:
        UserError: no such folder, a config.json that is not valid or lacks what sampling needs, or weights that are
            unreadable, missing, unexpected, of another shape (named) or not those that config.json was written with.
    """
    config, card = read_config(folder)
    return _load(Path(folder), config, device, dtype), card


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> FAR:
    """The model alone, also of a directory that does not tell what latents it goes with; otherwise as
    `load_model_dir`."""
    return _load(Path(folder), read_any_config(folder)[0], device, dtype)


def read_config(folder: str | Path) -> tuple[FARConfig, ModelMetadata]:
    """The model's shape and card from a model directory's config.json; errors as `load_model_dir`."""
    config, card = read_any_config(folder)
    if isinstance(card, WeightsMetadata):
        raise UserError(
            f"{Path(folder) / CONFIG_FILE}: autoencoder, scaling and latent_shape are not set; run "
            f"tools/import_checkpoint.py on {card.training.imported_from} again with --shards, a shard set of the "
            "latents that the model takes"
        )
    return config, card


def read_any_config(folder: str | Path) -> tuple[FARConfig, ModelMetadata | WeightsMetadata]:
    """As `read_config`, also of a directory that holds imported weights alone."""
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
        card = kind.model_validate_json(json.dumps(rest))  # from JSON, where a list may be a tuple
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; export the model again") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: model: {error}; export the model again") from None
    if isinstance(card, ModelMetadata) and card.latent_shape[0] != config.channels:
        raise UserError(
            f"{path}: latent_shape has {card.latent_shape[0]} channels and model.channels is {config.channels}; "
            "export the model again"
        )
    return config, card


def _load(folder: Path, config: FARConfig, device: str | torch.device, dtype: torch.dtype | None) -> FAR:
    # A copy of each: tensors that lie in the mapped file are not aligned as kernels like it, and round differently.
    state = {
        name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in _read_weights(folder, device).items()
    }
    model = empty_model(config)
    _check_tensors(folder, model, state)
    files = _recorded_files(folder)
    if files is not None and (problem := _damage(folder, files)) is not None:
        raise UserError(
            f"{problem}; copy or export the model again, or, where its weights were changed on purpose, take files out "
            f"of {CONFIG_FILE}"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def _recorded_files(folder: str | Path) -> dict[str, WeightsFile] | None:
    """The files of weights that config.json names; None of a directory from before it did, or made by others."""
    path = Path(folder) / CONFIG_FILE
    files = read_json(path, "model directory's config.json").get("files")
    if files is None:
        return None
    try:
        return TypeAdapter(dict[str, WeightsFile]).validate_python(files)
    except ValidationError as error:
        raise UserError(f"{path}: files: {first_problem(error)}; export the model again") from None


def _damage(folder: Path, files: Mapping[str, WeightsFile] | None) -> str | None:
    """In which file the folder differs from what config.json says of it, in one line; None where in none."""
    if files is None:
        return f"{folder / CONFIG_FILE}: does not say what the files of weights are"
    there = {path.name for path in folder.iterdir() if OWN_FILES.fullmatch(path.name)} - {CONFIG_FILE}
    for name in sorted(there | files.keys()):
        path = folder / name
        if name not in files:
            return f"{path}: this file is not named in {CONFIG_FILE}"
        if name not in there:
            return f"{path}: this file of weights is missing"
        size, expected = path.stat().st_size, files[name].bytes
        if size != expected:
            return f"{path}: has {size} bytes, was written with {expected}"
        if sha256(path) != files[name].sha256:
            return f"{path}: does not have the SHA-256 that it was written with"
    return None


def _check_tensors(folder: Path, model: FAR, state: Mapping[str, Tensor]) -> None:
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_fit(f"{folder}: the model", expected, state, "config.json and weights do not fit together")


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_file_bytes: int) -> None:
    """One file, or several of at most `max_file_bytes` (a tensor is never cut) and their index."""
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
    """Hugging Face's loaders look for `{"format": "pt"}`; safetensors refuses views, so they are cloned."""
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
            raise UserError(f"{path}: this file of weights is missing; copy or export the model again")
        try:
            state.update(load_file(path, device=str(device)))
        except SafetensorError as error:
            raise UserError(f"{path}: is no whole safetensors file ({error}); copy or export the model again") from None
    return state
