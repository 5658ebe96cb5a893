"""Writes one checkpoint, all ranks together, so that the last good one exists at every moment."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from far_scale.distributed.process_group import all_gather_objects
from far_scale.train.checkpoint.folders import EPHEMERAL, checksums, clear_parts, commit, finalize
from far_scale.train.checkpoint.pieces import FlatPiece, to_user_error, write
from far_scale.train.run_dir import latest_stamp, step_folder
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import NO_SPACE, full_disk


def save(
    run: Path,
    step: int,
    pieces: Mapping[str, FlatPiece],
    state: dict[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> str | None:
    """Write one checkpoint, then remove all but the newest `keep`.

    Every rank of `group` calls this; without process groups one process writes everything.

    Args:
        run: the run directory.
        step: steps done.
        pieces: this rank's pieces by the tensors' names.
        state: for state.json (rank 0's is written).
        keep: whole checkpoints to keep, at least 1.
        group: for CPU tensors; None for the default one.

    Returns:
        `latest_stamp` of the run afterwards, the same on every rank.

    Raises:
        UserError: on every rank, if one of them could not write, as on a full disk; earlier checkpoints are untouched.
    """
    folder = step_folder(run, step)
    temporary = folder.with_name(folder.name + ".part")
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    try:
        with _OnAllRanks(folder, group) as begin:
            if rank == 0:
                temporary.mkdir(parents=True, exist_ok=True)  # so that `clear_parts` finds a folder
                clear_parts(temporary.parent)
                temporary.mkdir()
        begin.check()
        try:
            written = write(temporary, pieces, group)
        except CheckpointException as error:
            # PyTorch's writer reports a full disk as an unexpected file position, so check the disk itself. A quota
            # cannot be checked.
            needed = sum(piece.data.numel() * piece.data.element_size() for piece in pieces.values())
            is_full = shutil.disk_usage(temporary).free < needed
            if any(all_gather_objects(is_full, group)):
                raise _no_space(folder) from error
            raise UserError(f"{to_user_error(error, folder)}; is your quota on this disk used up?") from error
        with _OnAllRanks(folder, group) as sums:
            unhashed = [path for path in temporary.glob(f"__{rank}_*") if path.name not in written]
            for path in unhashed:
                print_warning(f"{folder / path.name}: was not written in order, so it is read again for its SHA-256")
            sums.value = {**written, **checksums(unhashed)}
        parts = sums.check()
        with _OnAllRanks(folder, group) as end:
            if rank == 0:
                finalize(
                    temporary, {"step": step, **state}, {name: sum_ for part in parts for name, sum_ in part.items()}
                )
                commit(temporary, folder, keep, ephemeral=EPHEMERAL in state)
                end.value = latest_stamp(run)
        stamp: str | None = end.check()[0]
        return stamp
    except UserError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


class _OnAllRanks:
    """Work that every rank does by itself; afterwards `check` raises on all ranks if one failed."""

    def __init__(self, folder: Path, group: dist.ProcessGroup | None) -> None:
        self._folder, self._group = folder, group
        self._error: str | None = None
        self.value: Any = None

    def __enter__(self) -> _OnAllRanks:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if isinstance(error, OSError):
            reason = full_disk(error)
            self._error = f"{self._folder}: {error}" if reason is None else str(_no_space(self._folder, reason))
        elif isinstance(error, UserError):
            self._error = str(error)
        return self._error is not None

    def check(self) -> list[Any]:
        """All ranks' `value`s; raises UserError on all of them if one failed."""
        results = all_gather_objects((self._error, self.value), self._group)
        errors = [error for error, _ in results if error is not None]
        if errors:
            raise UserError(errors[0])
        return [value for _, value in results]


def _no_space(folder: Path, reason: str = NO_SPACE) -> UserError:
    return UserError(f"{folder}: {reason}; free some space, or lower checkpoint.keep")
