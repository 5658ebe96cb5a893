"""Reads torch.distributed.checkpoint's `.metadata`: a checkpoint's tensors and their positions in its files.

The file is a pickle. `RecordUnpickler` reads it without looking up classes; the numbers and texts that are needed are
checked and copied into new objects.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
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
# Written by PyTorch 2.9 and later on Python 3.10 and later; some pickle an enum member as getattr(class, name).
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
    """The tensors of a checkpoint: their sizes, and files and offsets of their pieces.

    Raises:
        UserError: the file is not metadata of flat tensors, or would call something.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            return _parse_metadata(RecordUnpickler(file, _NAMES, _DTYPES).load())
    except Exception as error:  # of any type: the file may hold any bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path}: this is not the metadata of a checkpoint ({reason}); use an earlier checkpoint, or copy it again"
        ) from None


class Reader(FileSystemReader):
    """PyTorch's reader, which loads tensors with weights_only=True, with metadata from `read_metadata`."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        """The given metadata. Takes no arguments, so that nothing asks for the metadata of one rank, another pickle."""
        return self._metadata


def _parse_metadata(record: Any) -> Metadata:
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        _typed(name, str): _parse_tensor(_attributes(entry, "TensorStorageMetadata"))
        for name, entry in _typed(_attributes(record, "Metadata")["state_dict_metadata"], dict).items()
    }
    storage = _typed(record.__dict__["storage_data"], dict)
    storage_data = {_parse_index(index): _parse_storage_info(info) for index, info in storage.items()}
    return Metadata(tensors, storage_data=storage_data, storage_meta=StorageMeta())


def _parse_tensor(entry: dict[str, Any]) -> TensorStorageMetadata:
    dtype, *_ = _attributes(entry["properties"], "TensorProperties")["state"]
    records = (_attributes(chunk, "ChunkStorageMetadata") for chunk in _typed(entry["chunks"], list))
    chunks = [ChunkStorageMetadata(_parse_size(chunk["offsets"]), _parse_size(chunk["sizes"])) for chunk in records]
    (total,), end = _parse_size(entry["size"]), 0
    for (offset,), (length,) in sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks):
        if not 0 <= offset <= end or length < 0:
            break  # PyTorch would load a tensor with a hole
        end = max(end, offset + length)
    if end != total:
        raise ValueError(f"its pieces are not the whole of a tensor of {total} numbers")
    return TensorStorageMetadata(TensorProperties(dtype=_typed(dtype, torch.dtype)), torch.Size([total]), chunks)


def _parse_index(index: Any) -> MetadataIndex:
    values = _attributes(index, "MetadataIndex")
    return MetadataIndex(_typed(values["fqn"], str), _parse_size(values["offset"]))


def _parse_storage_info(info: Any) -> _StorageInfo:
    values = _attributes(info, "_StorageInfo")
    if not _TENSOR_FILE.fullmatch(_typed(values["relative_path"], str)):
        raise ValueError(f"{values['relative_path']!r} is not the name of a tensor file beside it")
    return _StorageInfo(values["relative_path"], _typed(values["offset"], int), _typed(values["length"], int))


def _parse_size(size: Any) -> torch.Size:
    if not isinstance(size, Record) or size.name != "Size":
        raise TypeError(f"{type(size).__name__} where a size should be")
    (numbers,) = size.values
    return torch.Size([_typed(number, int) for number in _typed(numbers, tuple)])


def _attributes(record: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of class `name`."""
    if not isinstance(record, Record) or record.name != name:
        raise TypeError(f"{getattr(record, 'name', type(record).__name__)} where {name} should be")
    return record.__dict__


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} should be")
    return value
