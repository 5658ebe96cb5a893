"""The files of a model directory: `config.json`, and the weights as safetensors.

`config.json` holds the model's shape, its metadata (far_scale/convert/model_dir.py), and size and SHA-256 of the other
files. The weights are in `model.safetensors`, or above 5 GB in `model-00001-of-0000N.safetensors` files with
`model.safetensors.index.json`, in the layout of Hugging Face libraries. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, sha256
from far_scale.utils.strict_model import Digest, StrictModel, first_problem

FORMAT = "far_scale.model/1"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_FILES = re.compile(r"config\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors' names
MAX_NAMED = 3  # tensors that an error names of each kind; the others are counted


class WeightsFile(StrictModel):
    """Size and SHA-256 of a weights file when it was written."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


def read_config_values(folder: str | Path) -> dict[str, Any]:
    """Read config.json, and check its format only.

    Raises:
        UserError: no such folder or file, or it is of another format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no model directory here; tools/export_checkpoint.py makes one")
    path = folder / CONFIG_FILE
    values = read_json(path, "model directory's config.json")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{path}: format is {found!r}, needed is {FORMAT!r}; export the model with this far_scale")
    return values


def read_weights(
    folder: Path, shapes: Mapping[str, Sequence[int]], device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Read the weights of a model directory, and check them against `shapes` and the digests in config.json.

    Args:
        shapes: by name, of all tensors of the model.
        dtype: of the weights; None: as stored.

    Raises:
        UserError: weights that are unreadable, missing, unexpected, of another shape (named) or not those that
            config.json was written with.
    """
    # Copies: tensors in the memory-mapped file are not aligned as kernels expect, and then round differently.
    state = {
        name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in _stored_tensors(folder, device).items()
    }
    check_state_dict(f"{folder}: the model", shapes, state, "config.json and weights do not fit together")
    files = recorded_files(folder)
    if files is not None and (problem := find_damage(folder, files)) is not None:
        raise UserError(
            f"{problem}; copy or export the model again, or, if its weights were changed on purpose, remove "
            f"the key files from {CONFIG_FILE}"
        )
    return state


def stored_dtypes(folder: Path) -> set[torch.dtype | None]:
    """The types of the stored weights; None for one that no export writes.

    Raises:
        UserError: weights are missing or unreadable.
    """
    found: set[torch.dtype | None] = set()
    for path in _weights_paths(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {_DTYPES.get(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _unreadable(path, error) from None
    return found


def recorded_files(folder: str | Path) -> dict[str, WeightsFile] | None:
    """The weights files listed in config.json; None where it has no list (older or foreign directories)."""
    path = Path(folder) / CONFIG_FILE
    files = read_json(path, "model directory's config.json").get("files")
    if files is None:
        return None
    try:
        return TypeAdapter(dict[str, WeightsFile]).validate_python(files)
    except ValidationError as error:
        raise UserError(f"{path}: files: {first_problem(error)}; export the model again") from None


def find_damage(folder: Path, files: Mapping[str, WeightsFile] | None) -> str | None:
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


def indexed_files(index: Path) -> list[str]:
    """The names of the weights files in `model.safetensors.index.json`.

    Raises:
        UserError: it is not readable, or has no weight_map.
    """
    values: Any = read_json(index, "index of weights")
    try:
        return sorted(set(values["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: holds no weight_map; export the model again") from None


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


def _weights_paths(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    paths = [folder / name for name in (indexed_files(index) if index.is_file() else [WEIGHTS_FILE])]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: this weights file is missing; copy or export the model again")
    return paths


def _stored_tensors(folder: Path, device: str | torch.device) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in _weights_paths(folder):
        try:
            state.update(load_file(path, device=str(device)))
        except SafetensorError as error:
            raise _unreadable(path, error) from None
    return state


def _unreadable(path: Path, error: SafetensorError) -> UserError:
    return UserError(f"{path}: is not a complete safetensors file ({error}); copy or export the model again")


def weights_digest(folder: Path) -> str:
    """The SHA-256 of the names and contents of a model directory's weights files."""
    files = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
