"""Encoding dealt over tasks: task i of N makes the shards i, i + N, i + 2N, ...; a merge makes them one set.

What is in a shard does not depend on the tasks, so any number of them writes the same bytes, and a set may be begun
by some and finished by others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from far_scale.data.encode.fingerprints import (
    VIDEOS_NAME,
    SourcePrint,
    changed_file,
    prints_of_shard,
    read_prints,
    write_prints,
)
from far_scale.data.encode.pool import encode_shards
from far_scale.data.encode.worker import Job
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

_NAMED = 10  # of the missing shards in an error


@dataclass(frozen=True)
class _Finished:
    """A shard of which every video is either a sample or a reject; no index where all are rejects."""

    index: ShardIndex | None
    rejects: list[Reject]
    prints: list[SourcePrint]


def encode_task(job: Job, task: int, tasks: int, workers: int, max_rejected: float) -> int:
    """Make what is missing of one task's shards, and give their number.

    Args:
        workers: processes, each with one thread; one worker works in this process.
        max_rejected: the largest share of all the set's videos that may be rejected.

    Raises:
        UserError: no such task; no GPU; too many rejects, as soon as that is certain; a video that has changed since a
            shard was made of it; a full disk.
    """
    if not 0 <= task < tasks:
        raise UserError(f"--task {task} of --tasks {tasks}: tasks count from 0 to {tasks - 1}")
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that PyTorch can use; take --device cpu")
    rejected, merged = read_rejects(job.out), read_prints(job.out / VIDEOS_NAME)
    mine = range(task, job.shards, tasks)
    missing = [number for number in mine if _finished(job, number, rejected, merged) is None]
    for number in missing:  # what was rejected there may have been mended
        for source in job.sources_of(number):
            rejected.pop(source.key, None)
    for number in missing:  # only ours: other tasks are at work in this folder
        for left_by_a_kill in job.out.glob(f".*-{number:06d}.*part*"):
            left_by_a_kill.unlink(missing_ok=True)

    def add(more: list[Reject]) -> None:
        rejected.update((reject.key, reject) for reject in more)
        check_reject_rate(job.out, rejected.values(), len(job.sources), max_rejected)

    add([])
    if missing:
        encode_shards(job, missing, workers, add)
    return len(mine)


def merge(job: Job, tasks: int, max_rejected: float) -> Manifest:
    """Build the manifest and `rejected.jsonl` when every video is in a shard or rejected.

    Args:
        tasks: how many tasks the shards were dealt over, to name those that have to run again.

    Raises:
        UserError: shards are missing, a video has changed since a shard was made of it, too many videos are rejected,
            or none is left.
    """
    known, merged = read_rejects(job.out), read_prints(job.out / VIDEOS_NAME)
    found = [_finished(job, number, known, merged) for number in range(job.shards)]
    if missing := [number for number, shard in enumerate(found) if shard is None]:
        again = sorted({number % tasks for number in missing})
        raise UserError(
            f"{job.out}: {len(missing)} of {job.shards} shards are missing or not whole: {_few(missing)}; "
            f"run --task {_few(again)} of --tasks {tasks} again, then --merge"
        )
    finished = [shard for shard in found if shard is not None]
    rejects = [reject for shard in finished for reject in shard.rejects]
    write_rejects(job.out / REJECTED_NAME, rejects)
    write_prints(job.out / VIDEOS_NAME, (one for shard in finished for one in shard.prints))
    check_reject_rate(job.out, rejects, len(job.sources), max_rejected)
    indexes = [shard.index for shard in finished if shard.index is not None]
    if not indexes:
        raise UserError(f"{job.out}: all {len(rejects)} videos are rejected; {job.out / REJECTED_NAME} says why")
    facts = job.facts
    rejected = {reject.key for reject in rejects}
    if any(one.relabelled and one.key not in rejected for shard in finished for one in shard.prints):
        facts = replace(facts, classes=None)  # videos have labels of their own, and the folders' names are not theirs
    manifest = build_manifest(job.out, indexes, facts)
    if _written_manifest(job) != manifest:
        manifest.write(job.out)
    for number in range(job.shards):
        prints_of_shard(job.out, number).unlink(missing_ok=True)
        if finished[number].rejects:
            rejects_of_shard(job.out, number).unlink(missing_ok=True)
    return manifest


def _finished(
    job: Job, number: int, known: Mapping[str, Reject], merged: Mapping[str, SourcePrint]
) -> _Finished | None:
    """What shard `number` holds, or None where a video of it is neither in it nor known as a reject, or was mended.

    Raises:
        UserError: a video in it has changed.
    """
    index = finished_index(job.out, number)
    keys = [row.key for row in index.samples] if index else []
    there, sources = set(keys), job.sources_of(number)
    if keys != [source.key for source in sources if source.key in there]:
        return None
    rest = [source.key for source in sources if source.key not in there]
    if any(key not in known for key in rest):
        return None
    own = read_prints(prints_of_shard(job.out, number))
    prints = [own.get(source.key) or merged.get(source.key) for source in sources]
    for source, before in zip(sources, prints, strict=True):
        if before is None:
            return None
        if (changed := changed_file(source, before)) is not None:
            if index is None or source.key not in there:
                return None
            raise UserError(
                f"{changed}: has changed since shard {number} was made of it; encode into another folder, "
                f"or remove {ShardIndex.path_of(job.out, index.file)} to have that shard made anew"
            )
    return _Finished(index, [known[key] for key in rest], [one for one in prints if one is not None])


def _written_manifest(job: Job) -> Manifest | None:
    try:
        return Manifest.read(job.out)
    except UserError:  # missing, or spoilt: it is written anew from the indexes
        return None


def _few(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return ", ".join(map(str, numbers[:_NAMED])) + more
