"""Packs on their way to the device: noise is drawn, tensors are copied and layouts prepared one step ahead, during the
current step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from far_scale.config.schema import ObjectiveSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FARConfig
from far_scale.model.attention import prepare
from far_scale.model.sharded_layout import SequenceRank
from far_scale.train.flow_matching import NoisyPack, add_noise
from far_scale.utils.look_ahead import LookAhead


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        packs: as they were read, in host memory.
        noisy: the same packs with noise, on the device; the frames that this rank holds.
        ranks_per_pack: ranks that share each pack.
    """

    packs: list[Pack]
    noisy: list[NoisyPack]
    ranks_per_pack: int = 1


class DevicePrefetch:
    """Iterates over `packs`, each item the packs of a step; yields the `Batch` of each step.

    A thread makes the next one while the caller computes, and with it all that attention and model need of the packs'
    layouts on the device. On a GPU it copies from pinned memory on a separate stream, and the caller's stream waits for
    the copy, not the host. Errors of the thread are raised by `next`.

    Args:
        kernel: name of the attention kernel that the layouts are prepared for.
        shard: this rank among those that share the packs; None if it has them alone.
    """

    def __init__(
        self,
        packs: Iterator[list[Pack]],
        objective: ObjectiveSection,
        config: FARConfig,
        seed: int,
        device: torch.device,
        kernel: str,
        shard: SequenceRank | None = None,
    ) -> None:
        self._shard, self._kernel = shard, kernel
        self._objective, self._config, self._seed, self._device = objective, config, seed, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches = LookAhead(map(self._make_batch, packs), name="device-prefetch")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, tensors, copied = next(self._batches)
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(stream)  # or their memory could be reused while the step still reads it
        return batch

    def close(self) -> None:
        """Drop the next batch; returns when the thread has ended, for which `packs` must not block."""
        self._batches.close()

    def __enter__(self) -> DevicePrefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_batch(self, packs: list[Pack]) -> tuple[Batch, list[Tensor], torch.cuda.Event | None]:
        """The batch, all its tensors on the device, and on a GPU the end of their copies."""
        noisy, ranks = [add_noise(pack, self._objective, self._config, self._seed) for pack in packs], 1
        if self._shard is not None:
            noisy, ranks = [pack.shard(self._shard) for pack in noisy], self._shard.size
        if self._stream is None:
            batch = Batch(packs, [pack.to(self._device) for pack in noisy], ranks)
            return batch, self._tensors(batch), None
        with torch.cuda.stream(self._stream):
            batch = Batch(packs, [pack.pin().to(self._device) for pack in noisy], ranks)
            tensors = self._tensors(batch)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, tensors, copied

    def _tensors(self, batch: Batch) -> list[Tensor]:
        """The packs' tensors, and those of their layouts, which are prepared here unless an earlier batch had them."""
        of_layouts = [tensor for pack in batch.noisy for tensor in prepare(pack.layout, self._device, self._kernel)]
        return [tensor for pack in batch.noisy for tensor in pack.tensors()] + of_layouts
