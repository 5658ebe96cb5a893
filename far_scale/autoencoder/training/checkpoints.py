"""The checkpoints of an autoencoder's run: a file each, whole or not there, of which the last two are kept."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from far_scale.distributed.process_group import Processes, all_gather_objects
from far_scale.utils.errors import UserError
from far_scale.utils.io import atomic_write

FORMAT = "far_scale.autoencoder_checkpoint/1"
_KEPT = 2
_BROKEN = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    OSError,
)  # what torch.load raises of such files


class Checkpoints:
    """Those in one folder; only the main process writes.

    Args:
        folder: where they lie.
        processes: who all read them.
        say: takes a line about a checkpoint that is broken.
    """

    def __init__(self, folder: Path, processes: Processes, say: Callable[[str], None]) -> None:
        self._folder, self._processes, self._say = folder, processes, say
        if processes.is_main_process:
            for part in folder.glob(".step-*.part.pt"):  # of a run that was killed while it wrote
                part.unlink()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, from the main process; then remove the oldest.

        Raises:
            UserError: the disk is full.
        """
        if not self._processes.is_main_process:
            return
        path = self._path(step)
        try:
            with atomic_write(path) as beside:
                torch.save({"format": FORMAT, "step": step, **state}, beside)
        except RuntimeError as error:  # so PyTorch's writer tells a full disk
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: could not be written ({reason}); free some space, and start again") from error
        steps = [other for other in self._steps() if other <= step]
        for old in steps[_KEPT:]:
            self._path(old).unlink()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read and its path, the same on all ranks; None where there is none.

        Raises:
            UserError: there are some, and none can be read; or a later version wrote it.
        """
        found: tuple[Path, dict[str, Any]] | None = None
        if self._processes.is_main_process:
            found = self._read_newest()
        path: Path | None = all_gather_objects(found and found[0], self._processes.host_group)[0]
        if path is None:
            return None
        if found is None:
            found = path, self._read(path)
        if found[1].get("format") != FORMAT:
            raise UserError(f"{path}: format {found[1].get('format')!r}, this version reads {FORMAT!r}")
        return found

    def _read_newest(self) -> tuple[Path, dict[str, Any]] | None:
        steps = self._steps()
        for step in steps:
            try:
                return self._path(step), self._read(self._path(step))
            except _BROKEN as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self._say(f"{self._path(step)}: this checkpoint is broken ({reason}); trying the one before it")
        if steps:
            raise UserError(f"{self._folder}: none of these checkpoints can be read; remove them to begin anew")
        return None

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def _steps(self) -> list[int]:
        """Of the checkpoints that there are, newest first."""
        names = [re.fullmatch(r"step-(\d{8})\.pt", path.name) for path in self._folder.glob("step-*.pt")]
        return sorted((int(name.group(1)) for name in names if name), reverse=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.pt"
