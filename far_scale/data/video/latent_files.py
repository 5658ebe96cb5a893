"""Latents that the official code extracted: a .pt file a video, one tensor [F, C, H, W], unscaled."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from far_scale.data.shards.manifest import DTYPES
from far_scale.data.shards.typed import MAX_TENSORS_BYTES
from far_scale.data.video.videos import BadVideo, check_readable
from far_scale.errors import UserError

LATENTS_SUFFIX = ".pt"
# what the readers of zip archives, of torch.save's records and of its restricted pickles raise at damaged bytes
_BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError)
_BROKEN += (ValueError, TypeError, LookupError, AttributeError, AssertionError)


def read_latents(path: Path, shape: tuple[int, int, int], dtype: str) -> Tensor:
    """The latents of a file as a shard set of that latent shape and dtype ("bfloat16", "float16") stores them.

    What is stored in half precision is taken bit for bit. float32 is rounded, as the official trainer does it when it
    trains in half precision.

    Raises:
        BadVideo: it is no file of torch.save (as a zip archive), or holds anything but one tensor of that shape.
        UserError: the file is not there or cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of latents")
    try:
        with zipfile.ZipFile(path) as archive:  # torch's reader would unpack a packed entry, however large
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_TENSORS_BYTES:
            raise BadVideo(f"{path}: holds {size} bytes, more than the {MAX_TENSORS_BYTES} that a sample may have")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        check_readable(path)
        reason = str(error).strip().partition("\n")[0][:100]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's own text says how to load it all the same
            reason = "the file is broken or holds more than a tensor"
        raise BadVideo(f"{path}: no latents ({reason}); extract them again with torch.save") from None
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.device.type != "cpu":
        raise BadVideo(f"{path}: holds {type(found).__name__} in place of one tensor [F, C, H, W]; store that alone")
    if found.ndim != 4 or tuple(found.shape[1:]) != shape or not len(found):
        raise BadVideo(
            f"{path}: latents {list(found.shape)}, not [F, {', '.join(map(str, shape))}] as by --autoencoder and "
            "--size; give those that they were extracted with"
        )
    if found.nbytes > size:
        raise BadVideo(f"{path}: holds a view of fewer numbers than its shape says; store the tensor itself")
    if found.dtype not in (DTYPES[dtype], torch.float32):
        raise BadVideo(f"{path}: latents in {str(found.dtype).removeprefix('torch.')}; give the --dtype that they have")
    return found.detach().to(DTYPES[dtype]).contiguous()
