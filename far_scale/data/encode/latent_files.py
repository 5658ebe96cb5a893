"""Latents that the official code extracted: a .pt file a video, one tensor [F, C, H, W], unscaled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from far_scale.data.shards.errors import Mismatch
from far_scale.data.shards.manifest import DTYPES
from far_scale.data.shards.tensor_formats import BrokenFileError, load_torch, plain_tensor
from far_scale.data.video.videos import BadVideo, check_readable
from far_scale.utils.errors import UserError

LATENTS_SUFFIX = ".pt"


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
        found = plain_tensor(*load_torch(path))
    except BrokenFileError as error:
        check_readable(path)
        raise BadVideo(f"{path}: no latents ({error}); extract them again with torch.save") from None
    except Mismatch as problem:
        raise BadVideo(f"{path}: {problem}; store one tensor [F, C, H, W] alone") from None
    if found.ndim != 4 or tuple(found.shape[1:]) != shape or not len(found):
        raise BadVideo(
            f"{path}: latents {list(found.shape)}, not [F, {', '.join(map(str, shape))}] as by --autoencoder and "
            "--size; give those that they were extracted with"
        )
    if found.dtype not in (DTYPES[dtype], torch.float32):
        raise BadVideo(f"{path}: latents in {str(found.dtype).removeprefix('torch.')}; give the --dtype that they have")
    return found.to(DTYPES[dtype]).contiguous()
