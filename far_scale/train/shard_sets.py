"""The shard sets of a run: opened and checked by all ranks together, and the budget of damaged samples.

The ranks share the work; if one of them finds an error, all raise it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist

from far_scale.config.schema import DataSection, Shards, mixture_weights, shard_urls
from far_scale.data.loader.mixture import Mixture, MixtureManifest, check_classes, sets_of
from far_scale.data.loader.pack_loader import Pack
from far_scale.data.remote.cache import NodeCache
from far_scale.data.shards.errors import DamagedError, SkippedClip, over_budget
from far_scale.data.shards.manifest import MANIFEST_NAME, Manifest
from far_scale.data.shards.shard_set import ShardSet
from far_scale.data.shards.store import StagingCounts, display_name, read_manifest_bytes
from far_scale.distributed.process_group import Processes, all_gather_objects, all_ranks_or_raise
from far_scale.train.curriculum import Stage
from far_scale.utils.errors import UserError
from far_scale.utils.event_log import EventLog
from far_scale.utils.urls import is_remote


class OpenedSets(NamedTuple):
    """The shard sets of a run.

    Attributes:
        by_stage: the shard set or mixture of each stage, by the stage's index; stages with the same sets share them.
        manifest: of data.shards; its autoencoder and scaling hold for all stages.
    """

    by_stage: dict[int, ShardSet | Mixture]
    manifest: Manifest | MixtureManifest


def open_sets(
    data: DataSection, plan: Sequence[Stage], processes: Processes, events: EventLog, step: int
) -> OpenedSets:
    """Open the shard sets of the stages and check that they fit; every rank calls it.

    Each rank looks up its part of the shards. A remote manifest is fetched by one rank.

    Args:
        data: the recipe's section.
        plan: the stages to come.
        events: gets an event for each shard that is missing within the budget.
        step: steps done before, for the events.

    Raises:
        UserError: on all ranks alike: a set is missing, incomplete, not the same on all ranks, or does not fit.
    """
    opened: dict[str, ShardSet] = {}
    by_stage = {}
    for stage in plan:
        for url in shard_urls(stage.data.shards):
            if url not in opened:
                opened[url] = open_set(url, stage.data, processes, staged=True)
                check_shards(opened[url], stage.data.max_damaged_samples, processes, events, step)
        by_stage[stage.index] = all_ranks_or_raise(partial(_open_for_stage, stage, opened), processes)
    for url in shard_urls(data.shards):
        if url not in opened:
            opened[url] = open_set(url, data, processes, staged=True)
    source = all_ranks_or_raise(lambda: open_source(data.shards, opened.__getitem__), processes)
    labelled = [stage for stage in plan if stage.config.labels]
    if labelled:
        sections = [data, *(stage.data for stage in labelled)]
        label_sets = [opened[url] for section in sections for url in shard_urls(section.shards)]
        names = ((shard_set.folder, shard_set.manifest.classes) for shard_set in label_sets)
        all_ranks_or_raise(lambda: check_classes(names), processes)
    return OpenedSets(by_stage, source.manifest)


def _open_for_stage(stage: Stage, opened: Mapping[str, ShardSet]) -> ShardSet | Mixture:
    source = open_source(stage.data.shards, opened.__getitem__)
    source.check(stage.data, stage.model)
    return source


def open_source(shards: Shards, open_set: Callable[[str], ShardSet] = ShardSet.open) -> ShardSet | Mixture:
    """Open a recipe's shard set, or the mixture of its shard sets, each by `open_set`.

    Raises:
        UserError: a set is missing or incomplete, or two of them do not fit together.
    """
    if isinstance(shards, str):
        return open_set(shards)
    return Mixture([open_set(url) for url in shard_urls(shards)], mixture_weights(shards))


def open_set(url: str, data: DataSection, processes: Processes, staged: bool = False) -> ShardSet:
    """Open one set, the same on all ranks, without looking at its shards.

    Args:
        url: folder or URL.
        data: the recipe's section.
        processes: the run's.
        staged: read a local set through data.stage_local, where the recipe has one.

    Raises:
        UserError: on all ranks alike: there is no manifest, or the ranks find different ones.
    """

    def parse_and_open() -> ShardSet:
        manifest = Manifest.parse(text, display_name(url, MANIFEST_NAME))
        cache = None
        if is_remote(url) or manifest.shards.needs_cache:
            if data.cache_dir is None:
                raise UserError(
                    f"{url}: its shards are remote or compressed and come through a cache; set data.cache_dir"
                )
            cache = NodeCache(data.cache_dir, data.cache_bytes)
        elif staged and data.stage_local is not None:
            cache = NodeCache(data.stage_local, data.cache_bytes, "data.stage_local")
        return ShardSet(url, manifest, cache)

    text = _read_manifest(url, processes)
    shard_set = all_ranks_or_raise(parse_and_open, processes)
    digests = all_gather_objects(hashlib.sha256(text).hexdigest(), processes.host_group)
    if len(set(digests)) > 1:
        other_rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise UserError(
            f"{shard_set.folder}: rank {other_rank} finds a different manifest than rank 0; copy the same set to all "
            "nodes"
        )
    return shard_set


def _read_manifest(url: str, processes: Processes) -> bytes:
    if not is_remote(url):
        return all_ranks_or_raise(lambda: read_manifest_bytes(url), processes)
    text = all_ranks_or_raise(lambda: read_manifest_bytes(url) if processes.is_main_process else b"", processes)
    if processes.world_size > 1:
        box = [text]
        dist.broadcast_object_list(box, src=0, group=processes.host_group)
        text = box[0]
    return text


def check_shards(shard_set: ShardSet, budget: int, processes: Processes, events: EventLog, step: int) -> None:
    """Check that a set's shards exist; every rank checks its part.

    Args:
        budget: maximum number of missing samples; each missing shard is logged as an event.

    Raises:
        DamagedError: on all ranks alike: more are missing.
    """
    missing = list(shard_set.missing_shards(processes.rank, processes.world_size))
    samples = sum(shard_set.samples_per_shard[number] for number, _ in missing)
    parts = all_gather_objects((len(missing), samples, missing[0][1] if missing else None), processes.host_group)
    shards, samples = (sum(part[column] for part in parts) for column in (0, 1))
    first: DamagedError | None = next((problem for _, _, problem in parts if problem is not None), None)
    if first is None:
        return
    if samples > budget:
        more = f" ({shards} shards of {samples} samples are incomplete)" if shards > 1 else ""
        raise DamagedError(first.file, first.problem + more)
    all_missing = all_gather_objects([(number, str(problem)) for number, problem in missing], processes.host_group)
    for _, problem in sorted(shard for part in all_missing for shard in part):
        events.emit("damaged-shard", step, f"incomplete, its clips will be skipped: {problem}")


def log_staged_reads(source: ShardSet | Mixture, step: int, processes: Processes, events: EventLog) -> None:
    """Emit how often the staged sets of a stage were read from copies and from the source, over all ranks."""
    stores = [shard_set.staged for shard_set, _ in sets_of(source) if shard_set.staged is not None]
    if not stores:
        return
    all_counts = all_gather_objects([store.counts() for store in stores], processes.host_group)
    total = StagingCounts(*map(sum, zip(*(counts for part in all_counts for counts in part), strict=True)))
    events.emit(
        "staged",
        step,
        f"data.stage_local: {total.copied_files} files ({total.copied_bytes / 1e9:.3g} GB) copied to the nodes' disks "
        f"and {total.opened_on_node} opened there, {total.opened_at_source} opened at the source",
        **total._asdict(),
    )


class DamagedSamples:
    """Counts the skipped samples of a stage over all ranks and lanes, against one budget.

    Args:
        budget: clips that may be skipped.
        lanes: the lanes' states where the stage resumes from a checkpoint, or None.
        processes: the run's.
        events: gets an event for each clip.

    Attributes:
        count: clips skipped so far.
    """

    def __init__(
        self, budget: int, lanes: Mapping[int, Mapping[str, Any]] | None, processes: Processes, events: EventLog
    ) -> None:
        self._budget, self._processes, self._events = budget, processes, events
        self.count = sum(state.get("damaged", 0) for state in (lanes or {}).values())

    def report(self, step: int, packs: Sequence[Pack]) -> None:
        """Report the clips that any rank skipped in a step; all ranks call it.

        Args:
            step: its number, from 1.
            packs: that this rank trained on in it.

        Raises:
            UserError: on all ranks alike: there are more than the budget allows.
        """
        skipped_here = [skipped for pack in packs for skipped in pack.skipped]
        all_skipped: list[SkippedClip] = [
            skipped for part in all_gather_objects(skipped_here, self._processes.host_group) for skipped in part
        ]
        for skipped in sorted(all_skipped, key=lambda skipped: skipped.lane):
            self.count += 1
            facts = {"lane": skipped.lane, "key": skipped.key, "file": skipped.file, "reason": skipped.reason}
            text = f"step {step}: {skipped} ({self.count} in all, data.max_damaged_samples is {self._budget})"
            self._events.emit("damaged-sample", step, text, count=self.count, **facts)
        if self.count > self._budget:
            raise over_budget(self.count, self._budget, all_skipped)
