"""The way of packs to the device: noise drawn and tensors copied one step ahead, beside the step that is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from far_scale.config.schema import ObjectiveSection
from far_scale.data.loader.pack_loader import Pack
from far_scale.model import FARConfig
from far_scale.train.flow_matching import NoisyPack, add_noise


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        packs: as they were read, in host memory.
        noisy: what becomes of each, on the device.
    """

    packs: list[Pack]
    noisy: list[NoisyPack]


class DevicePrefetch:
    """Iterating yields, for every list of packs, the `Batch` made of it.

    A thread makes the next one while the caller computes; on a GPU it copies from pinned memory on a stream of its
    own, for which the caller's stream, not the host, waits. What goes wrong there is raised by `next`.
    """

    def __init__(
        self,
        packs: Iterator[list[Pack]],
        objective: ObjectiveSection,
        config: FARConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self._packs, self._objective, self._config, self._seed, self._device = packs, objective, config, seed, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next: Future[tuple[Batch, torch.cuda.Event | None]] = self._thread.submit(self._make)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, copied = self._next.result()
        self._next = self._thread.submit(self._make)
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in (tensor for noisy in batch.noisy for tensor in noisy.tensors()):
                tensor.record_stream(stream)  # or their memory could be given away while the step still reads it
        return batch

    def __enter__(self) -> DevicePrefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _make(self) -> tuple[Batch, torch.cuda.Event | None]:
        packs = next(self._packs)
        noisy = [add_noise(pack, self._objective, self._config, self._seed) for pack in packs]
        if self._stream is None:
            return Batch(packs, [pack.to(self._device) for pack in noisy]), None
        with torch.cuda.stream(self._stream):
            batch = Batch(packs, [pack.pin().to(self._device) for pack in noisy])
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, copied
