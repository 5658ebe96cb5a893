"""Files whose SHA-256 is computed while they are written, so that none is read again after a save.

Hash and write of a large block run in parallel, since both release the GIL.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

FileSum = dict[str, Any]
"""`bytes` and `sha256` of a file, as in checksums.json."""

_PARALLEL_BYTES = 1 << 20  # block size from which a second thread is faster


class HashedFile(io.BufferedWriter):
    """A new file to be written from beginning to end."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._digest, self._hashed, self._in_order = hashlib.sha256(), 0, True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sha256")  # starts with the first large block

    def write(self, data: Any, /) -> int:
        block = memoryview(data).cast("B")
        self._hashed += block.nbytes
        if block.nbytes < _PARALLEL_BYTES:
            self._digest.update(block)
            return super().write(block)
        hashing = self._thread.submit(self._digest.update, block)
        try:
            return super().write(block)
        finally:
            hashing.result()  # the block may change once this returns

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._in_order = False
        return super().seek(offset, whence)

    def truncate(self, size: int | None = None, /) -> int:
        self._in_order = False
        return super().truncate(size)

    def close(self) -> None:
        self._thread.shutdown()
        super().close()

    def sum(self) -> FileSum | None:
        """The sum of the file; None if it was not written in order and must be read again."""
        return {"bytes": self._hashed, "sha256": self._digest.hexdigest()} if self._in_order else None


class HashingFileSystem(FileSystem):
    """PyTorch's file system for checkpoints, with sums.

    Attributes:
        sums: of the files that were written in order, by name.
    """

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(path) as file:
            yield file
        if (file_sum := file.sum()) is not None:
            self.sums[Path(path).name] = file_sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        if (file_sum := self.sums.pop(Path(path).name, None)) is not None:
            self.sums[Path(new_path).name] = file_sum


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> FileSum:
    """Write flat float32 CPU tensors as a safetensors file, byte for byte as safetensors does."""
    header: dict[str, Any] = {}
    end = 0
    ordered = dict(sorted(tensors.items()))
    for name, tensor in ordered.items():
        assert tensor.dtype == torch.float32, f"{name}: {tensor.dtype}"
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(tensor.detach().numpy())  # a copy of a weight may require gradients
    file_sum = file.sum()
    assert file_sum is not None
    return file_sum
