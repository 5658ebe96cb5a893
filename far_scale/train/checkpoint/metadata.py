"""torch.distributed.checkpoint's `.metadata`, which says where a checkpoint's tensors lie, read without running it.

The file is a pickle, which `RecordUnpickler` reads without looking its classes up; the numbers and texts that are
needed are checked and copied into new objects.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from far_scale.utils.errors import UserError
from far_scale.utils.tensor_files import Record, RecordUnpickler

METADATA_FILE = ".metadata"
# Of PyTorch 2.9 and later, on Python 3.10 and later; some Pythons pickle an enum's member as getattr(class, name).
_NAMES = re.compile(
    r"torch\.distributed\.checkpoint(\.\w+)+|torch\.(Size|\w*int\d+|b?float\d+\w*|strided)|torch\.serialization\._get_layout"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|collections\.OrderedDict|builtins\.getattr"
)
_DTYPES = {
    full: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and _NAMES.fullmatch(full := f"torch.{name}")
}
_TENSOR_FILE = re.compile(r"__\d+_\d+\.distcp")


def read_metadata(folder: Path) -> Metadata:
    """The tensors of a checkpoint, their sizes and where in which file their pieces lie.

    Raises:
        UserError: it is not what torch.distributed.checkpoint writes of flat tensors, or holds something to be called.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            return _metadata(RecordUnpickler(file, _NAMES, _DTYPES).load())
    except Exception as error:  # of whatever kind: any bytes may stand there
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path}: this is not the metadata of a checkpoint ({reason}); use an earlier checkpoint, or copy it again"
        ) from None


class Reader(FileSystemReader):
    """PyTorch's reader, which loads tensors with weights_only=True, on metadata that `read_metadata` has read."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        """What was read already. Without arguments: so nobody asks for the metadata of one rank, another pickle."""
        return self._metadata


def _metadata(found: Any) -> Metadata:
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        _typed(name, str): _tensor(_object(entry, "TensorStorageMetadata"))
        for name, entry in _typed(_object(found, "Metadata")["state_dict_metadata"], dict).items()
    }
    places = {_index(index): _place(place) for index, place in _typed(found.__dict__["storage_data"], dict).items()}
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def _tensor(entry: dict[str, Any]) -> TensorStorageMetadata:
    dtype, *_ = _object(entry["properties"], "TensorProperties")["state"]
    found = (_object(chunk, "ChunkStorageMetadata") for chunk in _typed(entry["chunks"], list))
    chunks = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in found]
    (total,), end = _size(entry["size"]), 0
    for (offset,), (length,) in sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks):
        if not 0 <= offset <= end or length < 0:
            break  # PyTorch would leave a hole as it is
        end = max(end, offset + length)
    if end != total:
        raise ValueError(f"its pieces are not the whole of a tensor of {total} numbers")
    return TensorStorageMetadata(TensorProperties(dtype=_typed(dtype, torch.dtype)), torch.Size([total]), chunks)


def _index(index: Any) -> MetadataIndex:
    values = _object(index, "MetadataIndex")
    return MetadataIndex(_typed(values["fqn"], str), _size(values["offset"]))


def _place(place: Any) -> _StorageInfo:
    values = _object(place, "_StorageInfo")
    if not _TENSOR_FILE.fullmatch(_typed(values["relative_path"], str)):
        raise ValueError(f"{values['relative_path']!r} is not the name of a file of tensors beside it")
    return _StorageInfo(values["relative_path"], _typed(values["offset"], int), _typed(values["length"], int))


def _size(size: Any) -> torch.Size:
    if not isinstance(size, Record) or size.name != "Size":
        raise TypeError(f"{type(size).__name__} where a size should be")
    (numbers,) = size.values
    return torch.Size([_typed(number, int) for number in _typed(numbers, tuple)])


def _object(found: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of the class of that name."""
    if not isinstance(found, Record) or found.name != name:
        raise TypeError(f"{getattr(found, 'name', type(found).__name__)} where {name} should be")
    return found.__dict__


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} should be")
    return value
