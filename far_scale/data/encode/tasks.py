"""Encoding in tasks: task i of N encodes the shards i, i + N, i + 2N, ...; a merge writes the manifest.

A shard does not depend on the number of tasks, so any number writes the same bytes, and a set may be started with one
number of tasks and finished with another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from far_scale.data.encode.fingerprints import (
    VIDEOS_NAME,
    SourceFingerprint,
    find_changed_file,
    read_fingerprints,
    shard_fingerprints_path,
    write_fingerprints,
)
from far_scale.data.encode.job import EncodingJob
from far_scale.data.encode.pool import encode_shards
from far_scale.data.shards.index import ShardIndex
from far_scale.data.shards.manifest import Manifest
from far_scale.data.shards.rejects import (
    REJECTED_NAME,
    Reject,
    check_reject_rate,
    read_rejects,
    rejects_of_shard,
    write_rejects,
)
from far_scale.data.shards.writer import build_manifest, finished_index
from far_scale.utils.errors import UserError

_MAX_LISTED = 10  # numbers of missing shards in an error


@dataclass(frozen=True)
class _FinishedShard:
    """A shard in which every video is either a sample or a reject; it has no index if all are rejects."""

    index: ShardIndex | None
    rejects: list[Reject]
    fingerprints: list[SourceFingerprint]


def encode_task(job: EncodingJob, task: int, tasks: int, workers: int, max_rejected: float) -> int:
    """Encode the unfinished shards of one task, and return the number of all its shards.

    Args:
        workers: processes, each with one thread; a single worker runs in this process.
        max_rejected: largest fraction of all videos of the set that may be rejected.

    Raises:
        UserError: no such task; no GPU; too many rejects, as soon as that is certain; a video that has changed since
            its shard was encoded; a full disk.
    """
    if not 0 <= task < tasks:
        raise UserError(f"--task {task} of --tasks {tasks}: tasks count from 0 to {tasks - 1}")
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that PyTorch can use; take --device cpu")
    rejects, merged = read_rejects(job.out), read_fingerprints(job.out / VIDEOS_NAME)
    shards = range(task, job.shards, tasks)
    missing = [shard for shard in shards if _finished_shard(job, shard, rejects, merged) is None]
    for shard in missing:  # its rejected videos may have been repaired
        for source in job.sources_of(shard):
            rejects.pop(source.key, None)
    for shard in missing:  # only ours: other tasks write to this folder
        for leftover in job.out.glob(f".*-{shard:06d}.*part*"):
            leftover.unlink(missing_ok=True)

    def add_rejects(new: list[Reject]) -> None:
        rejects.update((reject.key, reject) for reject in new)
        check_reject_rate(job.out, rejects.values(), len(job.sources), max_rejected)

    add_rejects([])
    if missing:
        encode_shards(job, missing, workers, add_rejects)
    return len(shards)


def merge_tasks(job: EncodingJob, tasks: int, max_rejected: float) -> Manifest:
    """Write the manifest and `rejected.jsonl` when every video is in a shard or rejected.

    Args:
        tasks: number of tasks, to name those that have to run again.

    Raises:
        UserError: shards are missing, a video has changed since its shard was encoded, too many videos are rejected,
            or all are.
    """
    known_rejects, merged = read_rejects(job.out), read_fingerprints(job.out / VIDEOS_NAME)
    shards = [_finished_shard(job, number, known_rejects, merged) for number in range(job.shards)]
    if missing := [number for number, shard in enumerate(shards) if shard is None]:
        unfinished_tasks = sorted({number % tasks for number in missing})
        raise UserError(
            f"{job.out}: {len(missing)} of {job.shards} shards are missing or not whole: {_join(missing)}; "
            f"run --task {_join(unfinished_tasks)} of --tasks {tasks} again, then --merge"
        )
    finished = [shard for shard in shards if shard is not None]
    rejects = [reject for shard in finished for reject in shard.rejects]
    fingerprints = [fingerprint for shard in finished for fingerprint in shard.fingerprints]
    write_rejects(job.out / REJECTED_NAME, rejects)
    write_fingerprints(job.out / VIDEOS_NAME, fingerprints)
    check_reject_rate(job.out, rejects, len(job.sources), max_rejected)
    indexes = [shard.index for shard in finished if shard.index is not None]
    if not indexes:
        raise UserError(f"{job.out}: all {len(rejects)} videos are rejected; {job.out / REJECTED_NAME} says why")
    facts, rejected = job.facts, {reject.key for reject in rejects}
    if any(fingerprint.relabelled and fingerprint.key not in rejected for fingerprint in fingerprints):
        facts = replace(facts, classes=None)  # videos have labels of their own, which folder names do not name
    manifest = build_manifest(job.out, indexes, facts)
    if _read_manifest(job.out) != manifest:
        manifest.write(job.out)
    for number in range(job.shards):
        shard_fingerprints_path(job.out, number).unlink(missing_ok=True)
        if finished[number].rejects:
            rejects_of_shard(job.out, number).unlink(missing_ok=True)
    return manifest


def _finished_shard(
    job: EncodingJob, number: int, known_rejects: Mapping[str, Reject], merged: Mapping[str, SourceFingerprint]
) -> _FinishedShard | None:
    """A shard and its rejects; None if a video is neither in it nor a known reject, or a reject's file has changed.

    Raises:
        UserError: a video in it has changed.
    """
    index = finished_index(job.out, number)
    keys = [row.key for row in index.samples] if index else []
    encoded, sources = set(keys), job.sources_of(number)
    if keys != [source.key for source in sources if source.key in encoded]:
        return None
    rejected = [source.key for source in sources if source.key not in encoded]
    if any(key not in known_rejects for key in rejected):
        return None
    of_shard = read_fingerprints(shard_fingerprints_path(job.out, number))
    fingerprints = []
    for source in sources:
        fingerprint = of_shard.get(source.key) or merged.get(source.key)
        if fingerprint is None:
            return None
        if (changed := find_changed_file(source, fingerprint)) is not None:
            if index is None or source.key not in encoded:
                return None
            raise UserError(
                f"{changed}: has changed since shard {number} was made of it; encode into another folder, "
                f"or remove {ShardIndex.path_of(job.out, index.file)} to have that shard made again"
            )
        fingerprints.append(fingerprint)
    return _FinishedShard(index, [known_rejects[key] for key in rejected], fingerprints)


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except UserError:  # missing or damaged: it is written again from the indexes
        return None


def _join(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _MAX_LISTED} more" if len(numbers) > _MAX_LISTED else ""
    return ", ".join(map(str, numbers[:_MAX_LISTED])) + more
