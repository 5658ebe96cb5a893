"""Flat pieces of tensors, written and read by torch.distributed.checkpoint."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from far_scale.train.checkpoint.hashed import FileSum, HashingFileSystem
from far_scale.train.checkpoint.metadata import Reader, read_metadata
from far_scale.utils.errors import UserError


@dataclass(frozen=True)
class FlatPiece:
    """A contiguous piece of one flat tensor, with the methods that torch.distributed.checkpoint calls on a tensor.

    Attributes:
        total: number of elements of the whole tensor.
        offset: start of this piece.
        data: `[piece]` the elements; loading writes into them.
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
        piece: FlatPiece = self.state_dict[index.fqn]
        return piece.data


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default does the same, but copies every piece.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        piece: FlatPiece = self.state_dict[index.fqn]
        return piece.data


class HostCopy:
    """Copies pieces to host memory (pinned, from a GPU), into buffers that every call reuses.

    The pieces of every call must have the same names and sizes.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Mapping[str, FlatPiece]) -> dict[str, FlatPiece]:
        """Copies of the pieces, valid until the next call; returns when all is copied."""
        copies = {}
        for name, piece in pieces.items():
            on_gpu = piece.data.device.type == "cuda"
            if name not in self._buffers:
                self._buffers[name] = torch.empty(piece.data.shape, dtype=piece.data.dtype, pin_memory=on_gpu)
            self._buffers[name].copy_(piece.data, non_blocking=on_gpu)
            copies[name] = FlatPiece(piece.total, piece.offset, self._buffers[name])
        if any(piece.data.device.type == "cuda" for piece in pieces.values()):
            torch.cuda.synchronize()
        return copies


def write(folder: Path, pieces: Mapping[str, FlatPiece], group: dist.ProcessGroup | None) -> dict[str, FileSum]:
    """Write the pieces of all ranks of `group` into `folder`; of this process only, without process groups.

    Returns:
        The checksums of the files that this process wrote in order, by name.

    Raises:
        CheckpointException: on every rank, if one of them failed.
    """
    writer = FileSystemWriter(str(folder))
    writer.fs = files = HashingFileSystem()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is intended
        state_dict_saver.save(
            dict(pieces),
            storage_writer=writer,
            planner=_SavePlanner(),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    return files.sums


def load(folder: Path, pieces: Mapping[str, FlatPiece], single_process: bool = False) -> None:
    """Load `pieces` in place from a checkpoint that was written in any other pieces.

    Args:
        folder: the checkpoint.
        pieces: what to load, by the tensors' names.
        single_process: load in this process only, without a process group.

    Raises:
        UserError: a tensor is missing, has another size, or cannot be read.
    """
    metadata = read_metadata(folder)
    for name, piece in pieces.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata) or stored.size != torch.Size([piece.total]):
            found = f"one of {stored.size.numel()} numbers" if isinstance(stored, TensorStorageMetadata) else "none"
            raise UserError(
                f"{folder}: the model needs {name} of {piece.total} numbers, there is {found}; another model's?"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is intended
            state_dict_loader.load(
                dict(pieces), storage_reader=Reader(folder, metadata), planner=_LoadPlanner(), no_dist=single_process
            )
    except CheckpointException as error:
        raise to_user_error(error, folder) from error


def to_user_error(error: CheckpointException, folder: Path) -> UserError:
    """The first rank's failure in one line."""
    cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, pickle.UnpicklingError):  # PyTorch's text describes how to load it unsafely
        return UserError(f"{folder}: a .distcp file holds something else than tensors; use an earlier checkpoint")
    return UserError(f"{folder}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}")
