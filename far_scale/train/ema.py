"""An exponential moving average of the weights, sharded like the optimizer state: no step gathers the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from far_scale.train.engine import Fragment


class ShardedEMA:
    """ema <- decay * ema + (1 - decay) * weight, float32, on this rank's fragments of the master weights.

    As in the official code, it starts from the first weights and has no warm-up.

    Attributes:
        weights: one `[part]` float32 tensor a fragment.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        self.decay = decay
        self._runs: list[tuple[Tensor, Tensor]] = []  # average and weights of each master tensor
        pieces: dict[int, Tensor] = {}
        # The fragments of a master share its storage, and their averages likewise: an update takes one kernel for each
        # master (ZeRO has one or a few), not one for each parameter.
        live = {index: fragment.weight.detach() for index, fragment in enumerate(fragments)}
        for _, indices in groupby(sorted(live, key=lambda i: _storage(live[i])), lambda i: _storage(live[i])):
            in_master = list(indices)
            first = min(live[index].storage_offset() for index in in_master)
            end = max(live[index].storage_offset() + live[index].numel() for index in in_master)
            run = live[in_master[0]].as_strided((end - first,), (1,), first)
            average = run.clone()
            self._runs.append((average, run))
            for index in in_master:
                start = live[index].storage_offset() - first
                pieces[index] = average[start : start + live[index].numel()]
        self.weights: list[Tensor] = [pieces[index] for index in live]

    @torch.no_grad()
    def update(self, update_mask: Tensor) -> None:
        """Update the average after a step.

        Args:
            update_mask: scalar on the device, which the host need not know yet: 0 for a skipped step, which leaves the
                average unchanged, else 1.
        """
        weight = update_mask * (1 - self.decay)
        for average, live in self._runs:
            average.lerp_(live, weight.to(live.device))  # another device where the optimizer is offloaded


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
