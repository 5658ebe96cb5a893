"""Checkpoints of strangers: with a pickle that would do harm, under checksums that fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from far_scale.train.checkpoint.folders import checksums
from far_scale.utils.io import write_json


class Evil:
    """Unpickled by Python's own reader, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


def seal_again(folder: Path) -> None:
    """Checksums that fit the files as they are, as the stranger would write them."""
    write_json(folder / "checksums.json", checksums(p for p in folder.iterdir() if p.name != "checksums.json"))
