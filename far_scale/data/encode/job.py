"""An encoding job, and the settings that its output folder keeps (`encoding.json`): other settings are refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from far_scale.data.shards.manifest import MANIFEST_NAME
from far_scale.data.shards.writer import ShardSetSpec
from far_scale.data.video.sources import Source
from far_scale.data.video.transforms import FrameTransform
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, sync_folder, write_json

SETTINGS_NAME = "encoding.json"
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class EncodingJob:
    """Everything that the workers need to encode a shard set.

    Attributes:
        autoencoder: name or path, see `far_scale.autoencoder.load`.
        min_frames: shorter videos are rejected.
        precision: compute precision of the autoencoder.
        classes_from_folders: whether the class names are those of the videos' folders.
    """

    out: Path
    sources: tuple[Source, ...]
    samples_per_shard: int
    facts: ShardSetSpec
    autoencoder: str
    device: str
    transform: FrameTransform
    min_frames: int
    precision: Precision
    classes_from_folders: bool = False

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.sources) // self.samples_per_shard)

    def sources_of(self, shard: int) -> tuple[Source, ...]:
        """The videos of a shard, including those that will be rejected."""
        first = shard * self.samples_per_shard
        return self.sources[first : first + self.samples_per_shard]


def read_settings(out: Path) -> dict[str, Any] | None:
    """Read the settings of an output folder; None where nothing was encoded yet."""
    path = out / SETTINGS_NAME
    if not path.exists():
        return None
    settings = read_json(path, "encoding's settings")
    if not isinstance(settings, dict):
        raise UserError(
            f"{path}: not the settings of an encoding; encode into another folder, or remove this one first"
        )
    return settings


def write_or_check_settings(job: EncodingJob) -> None:
    """Write the settings of a new output folder, or compare them with those of an existing one.

    Raises:
        UserError: the folder has other settings, or shards without settings.
    """
    settings = _settings_of(job)
    path = job.out / SETTINGS_NAME
    # Look for shards first: a task that starts at the same time writes its settings before its shards.
    has_shards = any(job.out.glob("shard-*")) or (job.out / MANIFEST_NAME).exists()
    if not path.exists():
        if has_shards:
            raise UserError(f"{job.out}: holds shards that this command did not make; encode into another folder")
        _write_once(path, settings)
    existing = read_settings(job.out) or {}
    for name in dict.fromkeys([*settings, "classes"]):
        if existing.get(name) != settings.get(name):
            raise UserError(
                f"{job.out}: was encoded with {name} {existing.get(name)}, not {settings.get(name)}; "
                "encode into another folder, or remove this one first"
            )


def _settings_of(job: EncodingJob) -> dict[str, Any]:
    videos = hashlib.sha256()
    for source in job.sources:  # file contents are compared later, see `fingerprints`
        actions = None if source.actions is None else os.path.relpath(source.actions, source.path.parent)
        videos.update(f"{json.dumps([source.name, source.key, source.label, actions])}\n".encode())
    facts, transform = job.facts, job.transform
    settings = {
        "videos": f"{len(job.sources)} with fingerprint {videos.hexdigest()[:16]}",
        "autoencoder": f"{facts.autoencoder.name} {facts.autoencoder.weight_hash}",
        "dtype": facts.latent_dtype,
        "size": transform.size,
        "resize": transform.resize,
        "crop": transform.crop,
        "frame-stride": transform.stride,
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
    return settings


def _write_once(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings unless a task on another machine does so first; then that file stays."""
    part = path.with_name(f".{uuid.uuid4().hex}.part.json")
    try:
        write_json(part, settings)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)
