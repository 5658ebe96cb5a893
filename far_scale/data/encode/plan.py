"""Planning of an encoding: which videos go into which latent shard, with what settings.

Shard k holds the videos k n to k n + n - 1 except those that are rejected, so it is encoded by one process, and the
number of processes and tasks changes no byte. A shard is complete once its index is written; the manifest comes last.
Complete shards are not encoded again after a kill.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from far_scale import autoencoder as autoencoders
from far_scale.data.encode.job import EncodingJob, Precision, read_settings, write_or_check_settings
from far_scale.data.encode.source_reader import LATENTS_SUFFIX
from far_scale.data.encode.tasks import encode_task, merge_tasks
from far_scale.data.shards.manifest import AutoencoderInfo, Manifest
from far_scale.data.shards.store import read_manifest_bytes
from far_scale.data.shards.writer import ShardSetSpec
from far_scale.data.video.sources import Source, check_folder_classes, sources_from_paths
from far_scale.data.video.transforms import FrameTransform
from far_scale.data.video.video_lists import read_class_names
from far_scale.utils.errors import UserError

MAX_REJECTED = 0.01  # of all videos: a few broken ones are normal, more are a mistake


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
    """Encode video files (see `read_video`) to the shard set `out`, or resume where it was interrupted.

    Arguments and errors are those of `plan_encoding`, `encode_task` and `merge_tasks`.
    """
    source_set = sources_from_paths(paths, labels=labels)
    if labels:
        source_set = check_folder_classes("videos", source_set, labels)
    job = plan_encoding(
        source_set.sources,
        out,
        autoencoder_name,
        dtype,
        samples_per_shard,
        actions,
        labels,
        min_frames,
        FrameTransform(size),
        device,
        classes=source_set.classes,
        classes_from_folders=source_set.classes_from_folders,
    )
    encode_task(job, 0, 1, workers, max_rejected)
    return merge_tasks(job, 1, max_rejected)


def plan_encoding(
    sources: list[Source],
    out: str | Path,
    autoencoder_name: str,
    dtype: Literal["bfloat16", "float16"],
    samples_per_shard: int,
    actions: int,
    labels: int,
    min_frames: int,
    transform: FrameTransform,
    device: str | None,
    precision: Precision = "fp32",
    classes: tuple[str, ...] | None = None,
    classes_from_folders: bool = False,
) -> EncodingJob:
    """Plan an encoding, and write its settings to the folder `out` or compare them with those of an existing one.

    Args:
        sources: see `far_scale.data.video.sources`; all videos, or all latents.
        autoencoder_name: a name or path for `far_scale.autoencoder.load`; of latents, the one that made them.
        actions: number of action classes to store; 0 drops the videos' actions.
        labels: number of label classes to store; 0 drops them. A label comes from the list of videos, else from the
            video's files, else from its folder.
        min_frames: shorter videos are rejected.
        transform: maps decoded frames to the autoencoder's input; of latents, only size and stride apply.
        device: "cpu" or "cuda" (workers are distributed over the GPUs); None to merge: that of the existing settings.
        precision: compute precision of the autoencoder.
        classes: names of the label classes, if they are known.
        classes_from_folders: whether these are the names of the videos' folders.

    Raises:
        UserError: a size that does not fit the autoencoder, options that do not go with latents or actions, or other
            settings or sources than those of the existing folder.
    """
    autoencoder = autoencoders.load(autoencoder_name)
    if transform.size % autoencoder.downsample:
        raise UserError(f"--size {transform.size}: {autoencoder.name} needs a multiple of {autoencoder.downsample}")
    if actions and any(source.flip for source in sources):
        raise UserError("--flip: frames would turn left where their actions turn right; leave out --flip, or --actions")
    if not actions:  # unused action files may change or be missing
        sources = [
            source
            if labels and source.label is None and source.label_sidecar is not None
            else replace(source, actions=None)
            for source in sources
        ]
    _check_latents_options(sources, transform, precision)
    side = transform.size // autoencoder.downsample
    facts = ShardSetSpec(
        latent_shape=(autoencoder.latent_channels, side, side),
        latent_dtype=dtype,
        autoencoder=describe_autoencoder(autoencoder),
        actions=actions,
        labels=labels,
        classes=classes if labels else None,
    )
    existing = read_settings(Path(out))
    if (
        existing is not None
        and "classes" not in existing
        and classes_from_folders
        and _has_classes_in_path_order(sources)
    ):
        facts, classes_from_folders = replace(facts, classes=None), False  # from a version without class names
    if device is None:
        if existing is None:
            raise UserError(f"{out}: nothing was encoded here yet; run the tasks first, then --merge")
        device = str(existing.get("device"))
    job = EncodingJob(
        out=Path(out),
        sources=tuple(sources),
        samples_per_shard=samples_per_shard,
        facts=facts,
        autoencoder=autoencoder_name,
        device=device,
        transform=transform,
        min_frames=min_frames,
        precision=precision,
        classes_from_folders=classes_from_folders,
    )
    write_or_check_settings(job)
    return job


def describe_autoencoder(autoencoder: autoencoders.Autoencoder) -> AutoencoderInfo:
    """The entry of a manifest for the autoencoder of its latents."""
    return AutoencoderInfo(
        name=autoencoder.name, weight_hash=autoencoder.weight_hash, scaling_factor=autoencoder.scaling_factor
    )


def load_class_names(file: Path | None, shard_set: str | None) -> tuple[str, ...] | None:
    """Read class names from a text file or from the manifest of a shard set; None if neither is given.

    Raises:
        UserError: the file or manifest is missing or invalid, or the set has no class names.
    """
    if shard_set is None:
        return None if file is None else read_class_names(file)
    classes = Manifest.parse(read_manifest_bytes(shard_set), shard_set).classes
    if classes is None:
        raise UserError(f"--classes-of {shard_set}: this set has no names of classes; give --classes, a file of them")
    return classes


def _has_classes_in_path_order(sources: list[Source]) -> bool:
    """Whether the folders' classes are 0, 1, ... in path order, as in versions without class names."""
    folders = sorted({source.path.absolute().parent for source in sources})
    numbers = {folder: number for number, folder in enumerate(folders)}
    return all(source.folder_label == numbers[source.path.absolute().parent] for source in sources)


def _check_latents_options(sources: list[Source], transform: FrameTransform, precision: Precision) -> None:
    """Refuse options of frames where the sources are latents.

    Raises:
        UserError: such an option.
    """
    latents = next((source for source in sources if source.path.suffix == LATENTS_SUFFIX), None)
    default = FrameTransform(transform.size, stride=transform.stride)
    if latents and (transform != default or precision != "fp32" or any(source.flip for source in sources)):
        raise UserError(
            f"{latents.path}: holds latents, taken as they are; leave out --resize, --crop, --flip and --precision"
        )
