"""safetensors files that others may read, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` with the permissions of any other file of this user: `save_file` leaves it to its owner alone."""
    path.touch()
    permissions = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(permissions)
