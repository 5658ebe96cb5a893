"""Files of tensors: safetensors, and files of unknown origin: their pickles are read without being executed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from far_scale.utils.errors import UserError

_SUFFIXES = (".pth", ".pt", ".safetensors")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` with the user's default permissions; `save_file` lets only the owner read the file."""
    path.touch()
    permissions = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(permissions)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file of torch.save or safetensors, or of a folder of such files; other values are ignored.

    Raises:
        UserError: there is no such file, or it is of another format or holds more than weights_only=True reads.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            values = (
                load_file(file)
                if file.suffix == ".safetensors"
                else torch.load(file, map_location="cpu", weights_only=True)
            )
        except FileNotFoundError:
            raise UserError(f"{file}: there is no such file or folder") from None
        except Exception as error:  # of any kind, since the file may hold any bytes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: not a file of weights ({reason}); get it again") from None
        if isinstance(values, dict):
            tensors |= {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    return tensors


class Record:
    """Stands for an object of any class that a pickle names; holds its arguments and attributes."""

    name = ""
    module = ""
    values: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class RecordUnpickler(pickle.Unpickler):
    """Reads a pickle of unknown origin: builds only lists, dicts, numbers, strings and `Record`s.

    A pickle may call any function. Here its names are never looked up: each becomes an empty class, a `Record`, and
    names that do not belong in such a file are refused. The caller then checks and copies the values that it needs.
    """

    def __init__(self, file: IO[bytes], names: re.Pattern[str], known: Mapping[str, Any] | None = None) -> None:
        """Read from `file`.

        Args:
            names: pattern of the full names of classes and functions that become records; others are refused.
            known: objects by full name that are taken as they are, such as dtypes.
        """
        super().__init__(file)
        self._names, self._known = names, known or {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if self._names.fullmatch(full) is None:
            raise pickle.UnpicklingError(f"it names {full[:80]!r}, which does not belong in such a file")
        return type("Record", (Record,), {"name": name, "module": module})
