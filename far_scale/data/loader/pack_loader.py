"""Packs: the clips that go through the model together, read ahead in a thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from far_scale.data.loader.mixture import Mixture, sets_of
from far_scale.data.loader.packing import Clip, PackedLane, PackingConfig
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.loader.shard_prefetch import ShardPrefetch
from far_scale.data.remote.fetch import interruptible
from far_scale.data.shards.errors import DamagedError, SkippedClip, over_budget
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet
from far_scale.utils.look_ahead import LookAhead


@dataclass(frozen=True)
class Pack:
    """One lane's clips for one step, concatenated.

    Attributes:
        latents: [F, C, H, W] float32, at the model's scale; F counts the frames of all clips.
        actions: [F] int64 (the action that led to each frame), or None.
        labels: [clips] int64, or None.
        clip_frames: frames of each clip.
        keys: `key@start` of each clip.
        lane, step: the counters of all its random draws.
        lane_state: the lane's state after this pack, for a checkpoint.
        skipped: damaged clips that were skipped since the lane's last pack.
    """

    latents: torch.Tensor
    actions: torch.Tensor | None
    labels: torch.Tensor | None
    clip_frames: tuple[int, ...]
    keys: tuple[str, ...]
    lane: int
    step: int
    lane_state: dict[str, Any]
    skipped: tuple[SkippedClip, ...] = ()


class PackLoader:
    """Iterates over the training steps from `step` on; yields the packs of this rank's lanes, in the lanes' order.

    A pack depends only on its lane and step, so any division of the lanes among ranks reads the same packs. A thread
    reads ahead (not a process: passing tensors between processes costs more than reading them); `next` raises its
    errors, and the same one when called again.
    """

    def __init__(
        self,
        source: ShardSet | Mixture,
        scaling: LatentScaling,
        lanes: Sequence[int],
        packing: PackingConfig,
        step: int = 0,
        lane_states: dict[int, dict[str, Any]] | None = None,
        prefetch: int = 2,
        ahead_bytes: int = 0,
    ) -> None:
        """Start reading.

        Args:
            source: what to read.
            scaling: scaling of the latents.
            lanes: indices of this rank's lanes.
            packing: how samples become packs.
            step: the first step to read.
            lane_states: the lanes' states before `step`; None to begin.
            prefetch: maximum number of steps read ahead.
            ahead_bytes: bytes of shards to fetch into the node's cache before they are needed.

        Raises:
            UserError: more lanes than samples, or a state that does not fit the shard set.
        """
        self._source, self._scaling = source, scaling
        self._frame_stride, self._max_damaged = packing.frame_stride, packing.max_damaged
        self._lanes = packing.make_lanes(source, lanes)
        if lane_states is not None:
            for index, lane in self._lanes.items():
                lane.load_state_dict(lane_states[index])
        self._shard_prefetches: dict[int, ShardPrefetch] = {}  # by the index of the set
        for set_index, (shard_set, weight) in enumerate(sets_of(source)):
            if shard_set.uses_cache and ahead_bytes and self._lanes:
                order = next(iter(self._lanes.values())).sample_lane.set_lanes[set_index].order
                prefetched = ShardPrefetch(shard_set, order, list(self._lanes), int(weight * ahead_bytes))
                self._shard_prefetches[set_index] = prefetched
        self._closed = threading.Event()
        self._steps = LookAhead(map(self._read_step, itertools.count(step)), max(1, prefetch), "packs")

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """The packs of the next step.

        Raises:
            UserError: a shard or sample that cannot be read, or too many damaged samples.
            ValueError: the loader is closed.
            Interrupted: it is closed by another thread while this one waits.
        """
        return next(self._steps)

    def close(self) -> None:
        """Stop reading, also in the middle of fetching a shard; returns when the threads have ended."""
        self._closed.set()
        self._steps.close()
        for prefetch in self._shard_prefetches.values():
            prefetch.close()

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_step(self, step: int) -> list[Pack]:
        with interruptible(self._closed):
            for set_index, prefetch in self._shard_prefetches.items():
                numbers = {i: lane.sample_lane.set_lanes[set_index].next_number for i, lane in self._lanes.items()}
                prefetch.move_to(numbers)
            return [self._read_pack(index, step) for index in self._lanes]

    def _read_pack(self, index: int, step: int) -> Pack:
        lane, manifest = self._lanes[index], self._source.manifest
        read = self._read_clips(lane)
        samples = [sample for _, sample in read]
        return Pack(
            latents=self._scaling.normalise(torch.cat([sample.latents for sample in samples])),
            actions=torch.cat([s.actions for s in samples if s.actions is not None]) if manifest.actions else None,
            labels=torch.tensor([s.label for s in samples]) if manifest.labels else None,
            clip_frames=tuple(clip.frames for clip, _ in read),
            keys=tuple(f"{sample.key}@{clip.start}" for clip, sample in read),
            lane=index,
            step=step,
            lane_state=lane.state_dict(),
            skipped=lane.pop_skipped(),
        )

    def _read_clips(self, lane: PackedLane) -> list[tuple[Clip, Sample]]:
        """The clips of the lane's next pack, without damaged ones; a pack with only damaged clips is skipped."""
        read: list[tuple[Clip, Sample]] = []
        while not read:
            clips = next(lane)
            while clips:
                clip = clips.pop(0)
                try:
                    read.append((clip, self._source.read(*clip.sample, clip.start, clip.frames, self._frame_stride)))
                except DamagedError as error:
                    clips += lane.replace_damaged(clip, error)
        damaged = sum(other.damaged for other in self._lanes.values())
        if damaged > self._max_damaged:  # of this rank; the sum over ranks is checked at the end of a step
            raise over_budget(damaged, self._max_damaged, list(lane.pop_skipped()))
        return read
