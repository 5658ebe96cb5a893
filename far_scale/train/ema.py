"""An exponential moving average of the weights, sharded like the optimizer state: no step gathers the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from far_scale.train.engine import Fragment


class ShardedEMA:
    """ema <- decay * ema + (1 - decay) * weight, float32, on this rank's fragments of the master weights.

    As in the official code, it starts from the initial weights, without warm-up.

    Attributes:
        weights: one `[part]` float32 tensor per fragment.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        self.decay = decay
        self._masters: list[tuple[Tensor, Tensor]] = []  # average and weights of each master tensor
        pieces: dict[int, Tensor] = {}
        # The fragments of a master tensor share its storage, and so do their averages: an update takes one kernel per
        # master (ZeRO has one or a few), not one per parameter.
        live = {index: fragment.weight.detach() for index, fragment in enumerate(fragments)}
        for _, indices in groupby(sorted(live, key=lambda i: _storage(live[i])), lambda i: _storage(live[i])):
            in_master = list(indices)
            first = min(live[index].storage_offset() for index in in_master)
            end = max(live[index].storage_offset() + live[index].numel() for index in in_master)
            master = live[in_master[0]].as_strided((end - first,), (1,), first)
            average = master.clone()
            self._masters.append((average, master))
            for index in in_master:
                start = live[index].storage_offset() - first
                pieces[index] = average[start : start + live[index].numel()]
        self.weights: list[Tensor] = [pieces[index] for index in live]

    @torch.no_grad()
    def update(self, update_mask: Tensor) -> None:
        """Update the average after a step.

        Args:
            update_mask: scalar on the device, read without a host sync: 0 for a skipped step, which leaves the average
                unchanged, else 1.
        """
        weight = update_mask * (1 - self.decay)
        for average, live in self._masters:
            average.lerp_(live, weight.to(live.device))  # another device where the optimizer is offloaded


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
