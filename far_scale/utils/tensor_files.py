"""Files of tensors by name: safetensors files that others may read, too, and the files of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from far_scale.utils.errors import UserError

_SUFFIXES = (".pth", ".pt", ".safetensors")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` with the permissions of any other file of this user: `save_file` leaves it to its owner alone."""
    path.touch()
    permissions = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(permissions)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that torch.save or safetensors wrote, or of a folder's files; what else they hold is left.

    Raises:
        UserError: nothing there, or a file that is neither, or that holds more than weights_only=True reads.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            values = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except FileNotFoundError:
            raise UserError(f"{file}: there is no such file or folder") from None
        except Exception as error:  # of whatever kind: any bytes may stand there
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: no file of weights ({reason}); get it again") from None
        if isinstance(values, dict):
            found |= {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    return found
