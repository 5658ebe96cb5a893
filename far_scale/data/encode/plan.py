"""Videos to latent shards, by several processes and tasks, whose count changes no byte.

Shard k holds the videos k n to k n + n - 1 less those that are rejected, so each shard is one piece of work and
belongs to one process. A shard is whole once its index is there; the manifest comes last. What is whole after a kill is
not made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from far_scale import autoencoder as autoencoders
from far_scale.data.encode.latent_files import LATENTS_SUFFIX
from far_scale.data.encode.tasks import encode_task, merge
from far_scale.data.encode.worker import Job, Precision
from far_scale.data.shards.manifest import MANIFEST_NAME, AutoencoderInfo, Manifest
from far_scale.data.shards.writer import ShardSetSpec
from far_scale.data.video.pictures import Framing
from far_scale.data.video.sources import Source, check_folders, describe
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, sync_folder, write_json

SETTINGS_NAME = "encoding.json"
MAX_REJECTED = 0.01  # of all videos: a few broken ones are usual, more are a mistake


def encode_videos(
    paths: list[Path],
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
    max_rejected: float = MAX_REJECTED,
) -> Manifest:
    """Encode video files (see `read_video`) to the shard set `out`, or finish it where it was cut off.

    The arguments are those of `plan`, `encode_task` and `merge`, which do the same in parts.

    Raises:
        UserError: see there.
    """
    found = describe(paths, labels=labels)
    if labels:
        found = check_folders("videos", found, labels)
    job = plan(
        found.sources,
        out,
        autoencoder_name,
        dtype,
        samples_per_shard,
        actions,
        labels,
        min_frames,
        Framing(size),
        device,
        classes=found.classes,
        named_by_folder=found.by_folder,
    )
    encode_task(job, 0, 1, workers, max_rejected)
    return merge(job, 1, max_rejected)


def plan(
    sources: list[Source],
    out: str | Path,
    autoencoder_name: str,
    dtype: Literal["bfloat16", "float16"],
    samples_per_shard: int,
    actions: int,
    labels: int,
    min_frames: int,
    framing: Framing,
    device: str | None,
    precision: Precision = "fp32",
    classes: tuple[str, ...] | None = None,
    named_by_folder: bool = False,
) -> Job:
    """Say what goes into which shard and keep it in the folder `out`, or find there that it was begun the same way.

    Args:
        sources: see `far_scale.data.video.sources`; all videos, or all latents.
        autoencoder_name: a name or path that `far_scale.autoencoder.load` knows; of latents, what they were made with.
        actions: number of action classes to store; 0 drops the videos' actions.
        labels: number of label classes to store; 0 drops them. A label comes from the list of videos, else from the
            video, else it is the class of the folder that the video lies in.
        min_frames: the fewest frames a sample may have; shorter videos are rejected.
        framing: how frames become pictures; of latents, only its size and stride are of use.
        device: "cpu" or "cuda" (the workers are dealt out over the GPUs); None to merge, whatever it was encoded on.
        precision: what the autoencoder computes in.
        classes: the names of the labels' classes, where they are known.
        named_by_folder: whether these are the names of the videos' folders.

    Raises:
        UserError: a size that the autoencoder cannot take, what cannot be done with latents or with actions, or other
            settings or sources than the folder was begun with.
    """
    autoencoder = autoencoders.load(autoencoder_name)
    if framing.size % autoencoder.downsample:
        raise UserError(f"--size {framing.size}: {autoencoder.name} needs a multiple of {autoencoder.downsample}")
    if actions and any(source.flip for source in sources):
        raise UserError("--flip: frames would turn left where their actions turn right; leave out --flip, or --actions")
    if not actions:  # files of actions that nobody reads may change, or be missing
        sources = [
            source if labels and _has_label_beside(source) else replace(source, actions=None) for source in sources
        ]
    _check_kind(sources, framing, precision)
    side = framing.size // autoencoder.downsample
    facts = ShardSetSpec(
        latent_shape=(autoencoder.latent_channels, side, side),
        latent_dtype=dtype,
        autoencoder=AutoencoderInfo(
            name=autoencoder.name, weight_hash=autoencoder.weight_hash, scaling_factor=autoencoder.scaling_factor
        ),
        actions=actions,
        labels=labels,
        classes=classes if labels else None,
    )
    kept = _kept_settings(Path(out))
    if kept is not None and "classes" not in kept and named_by_folder and _numbered_as_before(sources):
        facts, named_by_folder = replace(facts, classes=None), False  # begun before sets had names of their classes
    if device is None:
        if kept is None:
            raise UserError(f"{out}: nothing was encoded here yet; run the tasks first, then --merge")
        device = str(kept.get("device"))
    job = Job(
        out=Path(out),
        sources=tuple(sources),
        samples_per_shard=samples_per_shard,
        facts=facts,
        autoencoder=autoencoder_name,
        device=device,
        framing=framing,
        min_frames=min_frames,
        precision=precision,
        named_by_folder=named_by_folder,
    )
    _keep_settings(job)
    return job


def _has_label_beside(source: Source) -> bool:
    """Whether the file of its actions may hold its label."""
    return source.label is None and source.actions is not None and source.label_file == source.actions


def _numbered_as_before(sources: list[Source]) -> bool:
    """Whether the folders' classes are 0, 1, ... in the order of their paths, as they were before sets had names."""
    folders = sorted({source.path.absolute().parent for source in sources})
    numbers = {folder: number for number, folder in enumerate(folders)}
    return all(source.folder_label == numbers[source.path.absolute().parent] for source in sources)


def _check_kind(sources: list[Source], framing: Framing, precision: Precision) -> None:
    """Refuse pictures' settings where there are latents.

    Raises:
        UserError: such a setting.
    """
    latents = next((source for source in sources if source.path.suffix == LATENTS_SUFFIX), None)
    plain = Framing(framing.size, stride=framing.stride)
    if latents and (framing != plain or precision != "fp32" or any(source.flip for source in sources)):
        raise UserError(
            f"{latents.path}: holds latents, taken as they are; leave out --resize, --crop, --flip and --precision"
        )


def _keep_settings(job: Job) -> None:
    """Write down what the folder is encoded with, or refuse where it was begun with something else."""
    videos = hashlib.sha256()
    for source in job.sources:  # what is in the files is told when they are read, see `fingerprints`
        actions = None if source.actions is None else os.path.relpath(source.actions, source.path.parent)
        videos.update(f"{json.dumps([source.name, source.key, source.label, actions])}\n".encode())
    facts, framing = job.facts, job.framing
    settings = {
        "videos": f"{len(job.sources)} with fingerprint {videos.hexdigest()[:16]}",
        "autoencoder": f"{facts.autoencoder.name} {facts.autoencoder.weight_hash}",
        "dtype": facts.latent_dtype,
        "size": framing.size,
        "resize": framing.resize,
        "crop": framing.crop,
        "frame-stride": framing.stride,
        "flip": any(source.flip for source in job.sources),
        "precision": job.precision,
        "actions": facts.actions,
        "labels": facts.labels,
        "min-frames": job.min_frames,
        "samples-per-shard": job.samples_per_shard,
        "device": job.device,
    }
    if facts.classes is not None:
        names = hashlib.sha256(json.dumps(facts.classes).encode()).hexdigest()
        settings["classes"] = f"{len(facts.classes)} with fingerprint {names[:16]}"
    path = job.out / SETTINGS_NAME
    # Looked for before the settings are: a task that begins beside us writes its settings first and then shards.
    shards = any(job.out.glob("shard-*")) or (job.out / MANIFEST_NAME).exists()
    if not path.exists():
        if shards:
            raise UserError(f"{job.out}: holds shards that this command did not make; encode into another folder")
        _write_once(path, settings)
    before = _kept_settings(job.out) or {}
    for name in dict.fromkeys([*settings, "classes"]):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{job.out}: was encoded with {name} {before.get(name)}, not {settings.get(name)}; "
                "encode into another folder, or remove this one first"
            )


def _kept_settings(out: Path) -> dict[str, Any] | None:
    """What the folder was begun with, or None where it was not begun."""
    path = out / SETTINGS_NAME
    if not path.exists():
        return None
    settings = read_json(path, "encoding's settings")
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: not the settings of an encoding; encode into another folder, or remove this one first"
        )
    return settings


def _write_once(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings, if no task on another machine does it first: whoever is second reads the first one's."""
    mine = path.with_name(f".{uuid.uuid4().hex}.part.json")
    try:
        write_json(mine, settings)
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
            sync_folder(path.parent)
    finally:
        mine.unlink(missing_ok=True)
