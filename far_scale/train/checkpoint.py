"""Checkpoints: written beside, synced, renamed; `latest` changes last.

    checkpoints/step-00001000/   state.json and torch.distributed.checkpoint's files
    checkpoints/latest           the name of the newest whole one

Weights, Adam's moments and the EMA are stored as flat float32 tensors by parameter name, in whatever pieces the
ranks held; a reader asks for other pieces and gets them. So neither the rank count nor the ZeRO stage is part of
the format, and one process can read any of it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from far_scale.errors import UserError
from far_scale.files import atomic_write, read_json, sync_folder, write_json

FORMAT = "far_scale.checkpoint/1"

LaneStates = dict[int, dict[str, Any]]
"""Where each lane stands, by its number."""


@dataclass(frozen=True)
class FlatPiece:
    """A run of one flat tensor, in the form that torch.distributed.checkpoint asks a tensor for its parts.

    Attributes:
        total: numbers in the whole tensor.
        offset: where this run starts.
        data: `[run]` the numbers; loading writes into them.
    """

    total: int
    offset: int
    data: Tensor

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.offset]), sizes=self.data.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        write = TensorWriteData(
            chunk=self._chunk(),
            properties=TensorProperties.create_from_tensor(self.data),
            size=torch.Size([self.total]),
        )
        index = MetadataIndex(fqn, torch.Size([self.offset]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=write)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default sets up no more than this, but copies every piece on the way.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].data


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def latest_step(run: Path) -> int | None:
    """The step of the newest whole checkpoint of a run; None where there is none yet.

    Raises:
        UserError: `latest` is damaged.
    """
    path = run / "checkpoints" / "latest"
    if not path.exists():
        return None
    match = re.fullmatch(r"step-(\d{8})", path.read_text().strip())
    if match is None:
        raise UserError(f"{path}: this does not name a checkpoint; write the name of a folder beside it, step-XXXXXXXX")
    return int(match.group(1))


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        UserError: there is no checkpoint, it is half-written, or of another format.
    """
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.glob("step-????????"))
        raise UserError(f"{folder}: there is no such checkpoint; there are: {', '.join(there) or 'none'}")
    if not (folder / ".metadata").exists() or not (folder / "state.json").exists():
        raise UserError(f"{folder}: this checkpoint is half-written; remove it and use an earlier one")
    state = read_json(folder / "state.json", "checkpoint state")
    if state.get("format") != FORMAT:
        raise UserError(f"{folder}/state.json: format {state.get('format')!r}, this version reads {FORMAT!r}")
    return state


def save(run: Path, step: int, pieces: Mapping[str, FlatPiece], state: dict[str, Any], keep: int) -> None:
    """Write one checkpoint, all ranks together, then remove all but the newest `keep`.

    Args:
        run: the run directory.
        step: steps done.
        pieces: this rank's pieces by the tensors' names.
        state: what goes into state.json (rank 0's is written).
        keep: whole checkpoints to keep, at least 1.

    Raises:
        UserError: the disk is full; the checkpoints before are untouched.
    """
    folder = step_folder(run, step)
    beside = folder.with_name(folder.name + ".part")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(dict(pieces), checkpoint_id=str(beside), planner=_SavePlanner())
    except dcp.api.CheckpointException as error:
        # PyTorch's writer tells a full disk as a file position it did not expect, so the disk itself is asked.
        need = sum(piece.data.numel() * piece.data.element_size() for piece in pieces.values())
        full = shutil.disk_usage(beside).free < need
        dist.barrier()
        if main:
            shutil.rmtree(beside, ignore_errors=True)
        if full:
            raise UserError(f"{folder}: no space left on this disk; free some, or lower checkpoint.keep") from error
        raise _explained(error, folder) from error
    if main:
        write_json(beside / "state.json", {"format": FORMAT, "step": step, **state})
        sync_folder(beside)
        if folder.exists():  # left by a run that died between this rename and `latest`
            shutil.rmtree(folder)
        beside.rename(folder)
        sync_folder(folder.parent)
        with atomic_write(folder.parent / "latest") as latest:
            latest.write_text(folder.name + "\n")
        for old in sorted(folder.parent.glob("step-????????"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(folder: Path, pieces: Mapping[str, FlatPiece], alone: bool = False) -> None:
    """Fill `pieces` in place from a checkpoint, whatever cut it was written in.

    Args:
        folder: the checkpoint.
        pieces: what to read, by the tensors' names.
        alone: read in this process only, without a process group.

    Raises:
        UserError: a tensor is not there, has another size, or cannot be read.
    """
    stored = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    for name, piece in pieces.items():
        size = getattr(stored.get(name), "size", None)
        if size != torch.Size([piece.total]):
            found = "none" if size is None else f"one of {size.numel()} numbers"
            raise UserError(
                f"{folder}: the model needs {name} of {piece.total} numbers, there is {found}; another model's?"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # `alone` is meant
            dcp.load(dict(pieces), checkpoint_id=str(folder), planner=_LoadPlanner(), no_dist=alone)
    except dcp.api.CheckpointException as error:
        raise _explained(error, folder) from error


def _explained(error: dcp.api.CheckpointException, folder: Path) -> UserError:
    """One line for the first rank's failure."""
    cause = next(iter(error.failures.values()))[0]
    return UserError(f"{folder}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}")
