"""Packs: the clips that go through the model together, read ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from far_scale.data.loader.filling import Clip, ClipLane, PackingConfig
from far_scale.data.loader.mixture import Mixture, sets_of
from far_scale.data.loader.prefetch import ShardPrefetch
from far_scale.data.loader.scaling import LatentScaling
from far_scale.data.remote.fetch import Interrupted, interruptible
from far_scale.data.shards.errors import DamagedError, SkippedClip, over_budget
from far_scale.data.shards.sample import Sample
from far_scale.data.shards.shard_set import ShardSet


@dataclass(frozen=True)
class Pack:
    """One lane's clips for one step, laid end to end.

    Attributes:
        latents: [F, C, H, W] float32, at the model's scale; F counts the frames of all clips.
        actions: [F] int64 (the action that led to each frame), or None.
        labels: [clips] int64, or None.
        clip_frames: frames of each clip.
        keys: `key@start` of each clip.
        lane, step: what drew it; the key of all its randomness.
        lane_state: the lane's state after it, as a checkpoint keeps it.
        skipped: clips that were left out since the lane's last pack, damaged ones.
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
    """Iterating yields, for every training step from `step` on, the packs of this rank's lanes in their order.

    A pack depends on its lane and step alone, so any division of the lanes among ranks reads the same packs. A thread
    reads ahead (not a process: handing tensors over would cost more than reading them); whatever it meets is raised
    by `next`.
    """

    def __init__(
        self,
        shard_set: ShardSet | Mixture,
        scaling: LatentScaling,
        lanes: Sequence[int],
        packing: PackingConfig,
        step: int = 0,
        lane_states: dict[int, dict[str, Any]] | None = None,
        prefetch: int = 2,
        ahead_bytes: int = 0,
    ) -> None:
        """`lanes` are this rank's; `prefetch` is in steps, `ahead_bytes` of shards that come through the node's cache.

        `lane_states` are the states after the step before `step` (None: each lane's beginning).

        Raises:
            UserError: more lanes than samples, or a state that does not fit the shard set.
        """
        self._set, self._scaling = shard_set, scaling
        self._stride, self._step, self._max_damaged = packing.frame_stride, step, packing.max_damaged
        self._lanes = packing.clip_lanes(shard_set, lanes)
        if lane_states is not None:
            for lane, clips in self._lanes.items():
                clips.load_state_dict(lane_states[lane])
        self._ready: queue.SimpleQueue[list[Pack] | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(max(1, prefetch))
        self._prefetches: dict[int, ShardPrefetch] = {}  # by the number of the set
        for number, (each, share) in enumerate(sets_of(shard_set)):
            if each.uses_cache and ahead_bytes and self._lanes:
                order = next(iter(self._lanes.values())).lane.parts[number].order
                self._prefetches[number] = ShardPrefetch(each, order, list(self._lanes), int(share * ahead_bytes))
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="packs", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """The packs of the next step.

        Raises:
            UserError: a shard or sample that cannot be read, or one too many; asked again, the same one.
        """
        if self._closed.is_set():
            raise ValueError("the loader is closed")
        if self._failure is not None:
            raise self._failure
        packs = self._ready.get()
        self._room.release()
        if isinstance(packs, BaseException):
            self._failure = packs
            raise packs
        return packs

    def close(self) -> None:
        """Stop reading ahead; returns when the thread has ended. Whoever waits for packs meets an error."""
        self._closed.set()
        self._room.release()
        self._thread.join()
        for prefetch in self._prefetches.values():
            prefetch.close()

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        try:
            with interruptible(self._closed):
                while True:
                    self._room.acquire()
                    if self._closed.is_set():
                        raise Interrupted
                    for number, prefetch in self._prefetches.items():
                        prefetch.move({lane: clips.lane.parts[number].number for lane, clips in self._lanes.items()})
                    self._ready.put([self._make_pack(lane) for lane in self._lanes])
                    self._step += 1
        except BaseException as error:  # the thread has nobody to tell but the one who asks, or still waits, for packs
            self._ready.put(error)

    def _make_pack(self, lane: int) -> Pack:
        read = self._read_clips(self._lanes[lane])
        samples, manifest = [sample for _, sample in read], self._set.manifest
        return Pack(
            latents=self._scaling.normalise(torch.cat([sample.latents for sample in samples])),
            actions=torch.cat([s.actions for s in samples if s.actions is not None]) if manifest.actions else None,
            labels=torch.tensor([s.label for s in samples]) if manifest.labels else None,
            clip_frames=tuple(clip.frames for clip, _ in read),
            keys=tuple(f"{sample.key}@{clip.start}" for clip, sample in read),
            lane=lane,
            step=self._step,
            lane_state=self._lanes[lane].state_dict(),
            skipped=self._lanes[lane].take_skipped(),
        )

    def _read_clips(self, lane: ClipLane) -> list[tuple[Clip, Sample]]:
        """The lane's next pack, one clip at least; what is damaged is left out as the lane says."""
        read: list[tuple[Clip, Sample]] = []
        while not read:
            clips = lane.next_pack()
            while clips:
                clip = clips.pop(0)
                try:
                    read.append((clip, self._set.read(*clip.place, clip.start, clip.frames, self._stride)))
                except DamagedError as problem:
                    clips += lane.in_place_of(clip, problem)
        count = sum(each.damaged for each in self._lanes.values())
        if count > self._max_damaged:  # of this rank alone; all ranks add up theirs when a step is done
            raise over_budget(count, self._max_damaged, list(lane.take_skipped()))
        return read
