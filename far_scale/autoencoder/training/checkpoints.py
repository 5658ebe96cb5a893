"""Checkpoints of an autoencoder training: one atomically written file per step; the last two are kept."""

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
_KEEP = 2
_BROKEN = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    OSError,
)  # raised by torch.load on damaged files


class Checkpoints:
    """The checkpoints of one folder; only the main process writes.

    Args:
        folder: the checkpoint folder.
        processes: the ranks; all of them load the checkpoint.
        log: called with a line about each broken checkpoint.
    """

    def __init__(self, folder: Path, processes: Processes, log: Callable[[str], None]) -> None:
        self._folder, self._processes, self._log = folder, processes, log
        if processes.is_main_process:
            for part in folder.glob(".step-*.part.pt"):  # left by a run that was killed while writing
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
            with atomic_write(path) as staged:
                torch.save({"format": FORMAT, "step": step, **state}, staged)
        except RuntimeError as error:  # this is how PyTorch's writer reports a full disk
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: could not be written ({reason}); free some space, and start again") from error
        steps = [other for other in self._steps() if other <= step]
        for old in steps[_KEEP:]:
            self._path(old).unlink()

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Path and state of the newest readable checkpoint, the same on all ranks; None where there is none.

        Raises:
            UserError: no checkpoint is readable, or a later version wrote it.
        """
        newest: tuple[Path, dict[str, Any]] | None = None
        if self._processes.is_main_process:
            newest = self._read_newest()
        path: Path | None = all_gather_objects(newest and newest[0], self._processes.host_group)[0]
        if path is None:
            return None
        if newest is None:
            newest = path, self._read(path)
        if newest[1].get("format") != FORMAT:
            raise UserError(f"{path}: format {newest[1].get('format')!r}, this version reads {FORMAT!r}")
        return newest

    def _read_newest(self) -> tuple[Path, dict[str, Any]] | None:
        steps = self._steps()
        for step in steps:
            try:
                return self._path(step), self._read(self._path(step))
            except _BROKEN as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self._log(f"{self._path(step)}: this checkpoint is broken ({reason}); trying the previous one")
        if steps:
            raise UserError(f"{self._folder}: none of these checkpoints can be read; remove them to start over")
        return None

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def _steps(self) -> list[int]:
        """Steps of the existing checkpoints, newest first."""
        matches = [re.fullmatch(r"step-(\d{8})\.pt", path.name) for path in self._folder.glob("step-*.pt")]
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.pt"
