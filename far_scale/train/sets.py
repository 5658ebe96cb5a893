"""Opening the shard sets of a run, all ranks together: the work is dealt out, and what one finds all refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch.distributed as dist

from far_scale.config.schema import DataSection, Shards, mixture_weights, shard_urls
from far_scale.data.loader.mixture import Mixture, MixtureManifest, check_classes, sets_of
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.errors import DamagedError
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.store import StagingCounts, display_name, read_manifest_bytes
from far_scale.distributed.process_group import Processes, all_gather_objects, all_ranks_or_raise
from far_scale.train.curriculum import Stage
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog
from far_scale.utils.urls import is_remote


class OpenedSets(NamedTuple):
    """Of a run.

    Attributes:
        of_stages: the shard set or mixture of each stage, by its index; stages with the same sets share them.
        manifest: of data.shards, whose autoencoder and scaling hold for all stages.
    """

    of_stages: dict[int, ShardSet | Mixture]
    manifest: Manifest | MixtureManifest


def open_sets(
    data: DataSection, plan: Sequence[Stage], processes: Processes, events: EventLog, step: int
) -> OpenedSets:
    """Open what the stages read, and refuse what does not fit them; every rank calls it.

    Each rank asks the file system for its share of the shards. A manifest far away is fetched by one rank.

    Args:
        data: the recipe's section.
        plan: the stages that are to come.
        events: where shards that are missing within the budget are told.
        step: steps done before, for the events.

    Raises:
        UserError: on all ranks alike: a set is not there, not whole, not the same on all ranks, or does not fit.
    """
    opened: dict[str, ShardSet] = {}
    of_stages = {}
    for stage in plan:
        for where in shard_urls(stage.data.shards):
            if where not in opened:
                opened[where] = open_set(where, stage.data, processes, staged=True)
                check_shards(opened[where], stage.data.max_damaged_samples, processes, events, step)
        of_stages[stage.index] = all_ranks_or_raise(partial(_fitting, stage, opened), processes)
    for where in shard_urls(data.shards):
        if where not in opened:
            opened[where] = open_set(where, data, processes, staged=True)
    own = all_ranks_or_raise(lambda: open_source(data.shards, opened.__getitem__), processes)
    by_label = [stage for stage in plan if stage.config.labels]
    if by_label:
        read = [
            opened[where]
            for section in [data, *(stage.data for stage in by_label)]
            for where in shard_urls(section.shards)
        ]
        all_ranks_or_raise(lambda: check_classes((each.folder, each.manifest.classes) for each in read), processes)
    return OpenedSets(of_stages, own.manifest)


def _fitting(stage: Stage, opened: Mapping[str, ShardSet]) -> ShardSet | Mixture:
    source = open_source(stage.data.shards, opened.__getitem__)
    source.check(stage.data, stage.model)
    return source


def open_source(shards: Shards, open_set: Callable[[str], ShardSet] = ShardSet.open) -> ShardSet | Mixture:
    """Open the shard set that a recipe names, or the mixture of those that it lists, each by `open_set`.

    Raises:
        UserError: a set is not there or not whole, or two of them do not fit one another.
    """
    if isinstance(shards, str):
        return open_set(shards)
    return Mixture([open_set(url) for url in shard_urls(shards)], mixture_weights(shards))


def open_set(where: str, data: DataSection, processes: Processes, staged: bool = False) -> ShardSet:
    """Open one set, the same on all ranks; its shards are not looked at.

    Args:
        where: folder or URL.
        data: the recipe's section.
        processes: who opens it.
        staged: read a local set by way of data.stage_local, where the recipe has one.

    Raises:
        UserError: on all ranks alike: there is no manifest, or the ranks find different ones.
    """

    def opened() -> ShardSet:
        manifest = Manifest.parse(text, display_name(where, MANIFEST_NAME))
        node = None
        if is_remote(where) or manifest.shards.needs_cache:
            if data.cache_dir is None:
                raise UserError(
                    f"{where}: its shards are remote or compressed and come through a cache; set data.cache_dir"
                )
            node = NodeCache(data.cache_dir, data.cache_bytes)
        elif staged and data.stage_local is not None:
            node = NodeCache(data.stage_local, data.cache_bytes, "data.stage_local")
        return ShardSet(where, manifest, node)

    text = _manifest_text(where, processes)
    shard_set = all_ranks_or_raise(opened, processes)
    digests = all_gather_objects(hashlib.sha256(text).hexdigest(), processes.host_group)
    if len(set(digests)) > 1:
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise UserError(
            f"{shard_set.folder}: rank {other} finds another manifest there than rank 0; copy the same set to all nodes"
        )
    return shard_set


def _manifest_text(where: str, processes: Processes) -> bytes:
    if not is_remote(where):
        return all_ranks_or_raise(lambda: read_manifest_bytes(where), processes)
    text = all_ranks_or_raise(lambda: read_manifest_bytes(where) if processes.is_main_process else b"", processes)
    if processes.world_size > 1:
        box = [text]
        dist.broadcast_object_list(box, src=0, group=processes.host_group)
        text = box[0]
    return text


def say_staged(source: ShardSet | Mixture, step: int, processes: Processes, events: EventLog) -> None:
    """Log what the staged sets of a stage have read where so far, all ranks together; nothing where none is staged."""
    stores = [each.staged for each, _ in sets_of(source) if each.staged is not None]
    if not stores:
        return
    of_ranks = all_gather_objects([store.counts() for store in stores], processes.host_group)
    total = StagingCounts(*map(sum, zip(*(counts for own in of_ranks for counts in own), strict=True)))
    events.emit(
        "staged",
        step,
        f"data.stage_local: {total.copied_files} files ({total.copied_bytes / 1e9:.3g} GB) copied to the nodes' disks "
        f"and {total.opened_on_node} opened there, {total.opened_at_source} opened at the source",
        **total._asdict(),
    )


def check_shards(shard_set: ShardSet, budget: int, processes: Processes, events: EventLog, step: int) -> None:
    """Every rank looks at its share; what is missing is refused, or told where the budget may be enough for it."""
    found = list(shard_set.missing_shards(processes.rank, processes.world_size))
    samples = sum(shard_set.samples_per_shard[number] for number, _ in found)
    parts = all_gather_objects((len(found), samples, found[0][1] if found else None), processes.host_group)
    shards, samples = (sum(part[column] for part in parts) for column in (0, 1))
    first: DamagedError | None = next((problem for _, _, problem in parts if problem is not None), None)
    if first is None:
        return
    if samples > budget:
        more = f" ({shards} shards of {samples} samples are not whole)" if shards > 1 else ""
        raise DamagedError(first.file, first.problem + more)
    everyone = all_gather_objects([(number, str(problem)) for number, problem in found], processes.host_group)
    for _, problem in sorted(each for part in everyone for each in part):
        events.emit("damaged-shard", step, f"not whole, and its clips will be left out: {problem}")
