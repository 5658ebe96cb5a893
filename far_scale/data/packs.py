"""Packs: the clips that go through the model together, read ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from far_scale.data.lanes import Lane, LaneOrder
from far_scale.data.scaling import LatentScaling
from far_scale.data.shards import ShardSet
from far_scale.errors import UserError
from far_scale.randomness import generator


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
    """

    latents: torch.Tensor
    actions: torch.Tensor | None
    labels: torch.Tensor | None
    clip_frames: tuple[int, ...]
    keys: tuple[str, ...]
    lane: int
    step: int
    lane_state: dict[str, int]


class PackLoader:
    """Iterating yields, for every training step from `step` on, the packs of this rank's lanes in their order.

    A pack depends on its lane and step alone, so any division of the lanes among ranks reads the same packs. A thread
    reads ahead (not a process: handing tensors over would cost more than reading them); whatever it meets is raised
    by `next`.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        scaling: LatentScaling,
        lanes: Sequence[int],
        lanes_total: int,
        clips_per_pack: int,
        frames: int,
        frame_stride: int,
        shuffle_window: int,
        seed: int,
        step: int = 0,
        lane_states: dict[int, dict[str, int]] | None = None,
        prefetch: int = 2,
    ) -> None:
        """`lanes` are this rank's of `lanes_total`; `frames` of a clip, `frame_stride` of the video apart.

        `lane_states` are the states after the step before `step` (None: each lane's beginning); `prefetch` is in steps.

        Raises:
            UserError: more lanes than samples, or a state that does not fit the shard set.
        """
        self._set, self._scaling = shard_set, scaling
        self._clips, self._frames, self._stride = clips_per_pack, frames, frame_stride
        self._seed, self._step = seed, step
        order = LaneOrder(shard_set.samples_per_shard, lanes_total, seed, shuffle_window)
        self._lanes = [Lane(order, lane) for lane in sorted(lanes)]
        for lane in self._lanes:
            if lane_states is not None:
                lane.load_state_dict(lane_states[lane.lane])
        self._ready: queue.SimpleQueue[list[Pack] | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(max(1, prefetch))
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read_ahead, name="packs", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """The packs of the next step.

        Raises:
            UserError: a shard or sample that cannot be read; asked again, the same one.
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
        """Stop reading ahead; returns when the thread has ended."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed.is_set():
                    return
                self._ready.put([self._make_pack(lane) for lane in self._lanes])
                self._step += 1
        except BaseException as error:  # the thread has nobody to tell but the one who asks for packs
            self._ready.put(error)

    def _make_pack(self, lane: Lane) -> Pack:
        draw = generator(self._seed, "crop", self._step, lane.lane)
        samples, keys = [], []
        for _ in range(self._clips):
            shard, number = next(lane)
            # FAR's random_sample_frames: any start from which the clip still fits, each as likely.
            starts = self._set.frames_of(shard, number) - (self._frames - 1) * self._stride
            if starts < 1:
                file = self._set.manifest.shards[shard].file
                raise UserError(
                    f"{self._set.folder / file}: sample {number} is too short for data.frames={self._frames} with "
                    f"data.frame_stride={self._stride}; lower them, or encode with --min-frames"
                )
            start = int(draw.integers(0, starts))
            samples.append(self._set.read(shard, number, start, self._frames, self._stride))
            keys.append(f"{samples[-1].key}@{start}")
        manifest = self._set.manifest
        return Pack(
            latents=self._scaling.normalise(torch.cat([sample.latents for sample in samples])),
            actions=torch.cat([s.actions for s in samples if s.actions is not None]) if manifest.actions else None,
            labels=torch.tensor([s.label for s in samples]) if manifest.labels else None,
            clip_frames=(self._frames,) * self._clips,
            keys=tuple(keys),
            lane=lane.lane,
            step=self._step,
            lane_state=lane.state_dict(),
        )
