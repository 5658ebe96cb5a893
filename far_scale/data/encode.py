"""Videos to latent shards, by several processes, whose count changes no byte.

Shard k holds the videos k n to k n + n - 1, so each shard is one piece of work and belongs to one process. A shard is
whole once its index is there; the manifest comes last. What is whole after a kill is not made again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from far_scale import autoencoder as autoencoders
from far_scale.data.encode_pool import encode_shards
from far_scale.data.encode_worker import Job, Source
from far_scale.data.manifest import MANIFEST_NAME, AutoencoderInfo, Manifest
from far_scale.data.writer import SetFacts, build_manifest, finished_index
from far_scale.errors import UserError
from far_scale.files import read_json, write_json

SETTINGS_NAME = "encoding.json"


def encode_videos(
    sources: list[Path],
    out: str | Path,
    autoencoder_name: str,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    samples_per_shard: int = 64,
    actions: int = 0,
    labels: int = 0,
    min_frames: int = 1,
    size: int = 64,
    workers: int = 1,
    device: str = "cpu",
) -> Manifest:
    """Encode video files (see `read_video`) to the shard set `out`, or finish it where it was cut off.

    Args:
        autoencoder_name: a name or path that `far_scale.autoencoder.load` knows.
        actions: number of action classes to store; 0 drops the videos' actions.
        labels: number of label classes to store; 0 drops them. A video without a label of its own has the class of
            the folder that it lies in: the folders' classes are 0, 1, ... in the order of their names.
        min_frames: the fewest frames a video may have.
        size: height and width in pixels; other videos are scaled to it by their shorter side and cropped in the centre.
        workers: processes, each with one thread; one worker works in this process.
        device: "cpu" or "cuda" (the workers are dealt out over the GPUs).

    Raises:
        UserError: no videos, or one that cannot be used; other settings than the folder was begun with; no GPU, a full
            disk.
    """
    out = Path(out)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that PyTorch can use; take --device cpu")
    autoencoder = autoencoders.load(autoencoder_name)
    if size % autoencoder.downsample:
        raise UserError(f"--size {size}: {autoencoder.name} needs a multiple of {autoencoder.downsample}")
    side = size // autoencoder.downsample
    facts = SetFacts(
        latent_shape=(autoencoder.latent_channels, side, side),
        latent_dtype=dtype,
        autoencoder=AutoencoderInfo(
            name=autoencoder.name, weight_hash=autoencoder.weight_hash, scaling_factor=autoencoder.scaling_factor
        ),
        actions=actions,
        labels=labels,
    )
    found = tuple(_describe(sources))
    job = Job(out, found, samples_per_shard, facts, autoencoder_name, device, size, min_frames)
    _keep_settings(job)
    shards = range(-(-len(found) // samples_per_shard))
    missing = [number for number in shards if finished_index(out, number) is None]
    for left_by_a_kill in out.glob(".shard-*.part*"):
        left_by_a_kill.unlink(missing_ok=True)
    if missing:
        encode_shards(job, missing, workers)
    indexes = [index for number in shards if (index := finished_index(out, number)) is not None]
    manifest = build_manifest(out, indexes, facts)
    if _written_manifest(out) != manifest:
        manifest.write(out)
    return manifest


def _written_manifest(out: Path) -> Manifest | None:
    try:
        return Manifest.read(out)
    except UserError:  # missing, or spoilt: it is written anew from the indexes
        return None


def _describe(paths: list[Path]) -> Iterator[Source]:
    """Keys and names of the videos, from their paths below the folder that they share."""
    if not paths:
        raise UserError("--videos: there is no video here that can be read (.mp4, .avi, .mkv, .npz, ...)")
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    folders = {folder: number for number, folder in enumerate(sorted({path.absolute().parent for path in paths}))}
    taken: dict[str, Path] = {}
    for path in paths:
        name = path.absolute().relative_to(root)
        key = re.sub(r"[^A-Za-z0-9_-]+", "_", str(name.with_suffix("")))[-80:]
        if (other := taken.setdefault(key, path)) is not path:
            raise UserError(f"{path}: its sample would have the key {key}, as that of {other}; rename one of them")
        yield Source(path, name.as_posix(), key, folders[path.absolute().parent])


def _keep_settings(job: Job) -> None:
    """Write down what the folder is encoded with, or refuse where it was begun with something else."""
    videos = hashlib.sha256()
    for source in job.sources:
        videos.update(f"{source.name} {_fingerprint(source.path)}\n".encode())
    facts = job.facts
    settings = {
        "videos": f"{len(job.sources)} with fingerprint {videos.hexdigest()[:16]}",
        "autoencoder": f"{facts.autoencoder.name} {facts.autoencoder.weight_hash}",
        "dtype": facts.latent_dtype,
        "size": job.size,
        "actions": facts.actions,
        "labels": facts.labels,
        "min-frames": job.min_frames,
        "samples-per-shard": job.samples_per_shard,
        "device": job.device,
    }
    path = job.out / SETTINGS_NAME
    if path.exists():
        before = read_json(path, "encoding's settings")
        for name, value in settings.items():
            if not isinstance(before, dict) or before.get(name) != value:
                was = before.get(name) if isinstance(before, dict) else before
                raise UserError(
                    f"{job.out}: was encoded with {name} {was}, not {value}; "
                    "encode into another folder, or remove this one first"
                )
    elif any(job.out.glob("shard-*")) or (job.out / MANIFEST_NAME).exists():
        raise UserError(f"{job.out}: holds shards that this command did not make; encode into another folder")
    else:
        write_json(path, settings)


def _fingerprint(path: Path) -> str:
    """Size and ends of a file: enough to see that it was recorded anew, and cheap for any number of long videos."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such video") from None
    return f"{size} {digest.hexdigest()}"
