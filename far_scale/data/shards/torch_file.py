"""Files of `torch.save`, read without running what a pickle in them names."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from far_scale.data.shards.sample import Mismatch
from far_scale.data.shards.typed import MAX_TENSORS_BYTES

# What the readers of zip archives, of torch.save's records and of its restricted pickles raise at damaged bytes.
_BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError)
_BROKEN += (ValueError, TypeError, LookupError, AttributeError, AssertionError)


class BrokenFileError(Mismatch):
    """Bytes that are no file of torch.save, or one with more than tensors in it."""


def load_torch(file: Path | BinaryIO) -> tuple[Any, int]:
    """What is stored in a file of torch.save (as a zip archive), and how many bytes its entries have.

    Raises:
        BrokenFileError: it is no such file, or holds more than tensors, numbers, texts, lists and dicts.
        Mismatch: it holds more bytes than a sample may have.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch's reader would unpack a packed entry, however large
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_TENSORS_BYTES:
            raise Mismatch(f"holds {size} bytes, more than the {MAX_TENSORS_BYTES} that a sample may have")
        if not isinstance(file, Path):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True), size
    except _BROKEN as error:
        reason = str(error).strip().partition("\n")[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's own text says how to load it all the same
            reason = "the file is broken or holds more than a tensor"
        raise BrokenFileError(reason) from None


def plain_tensor(found: Any, size: int) -> torch.Tensor:
    """`found`, if it is a tensor whose numbers all stand in its file of `size` bytes.

    Raises:
        Mismatch: it is none.
    """
    if (
        not isinstance(found, torch.Tensor)
        or found.layout != torch.strided
        or found.is_nested
        or found.device.type != "cpu"
    ):
        raise Mismatch(f"holds {type(found).__name__}, not one dense tensor")
    if found.nbytes > size:
        raise Mismatch("holds a view of fewer numbers than its shape says; store the tensor itself")
    return found.detach()
