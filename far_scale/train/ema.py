"""A running average of the weights, sharded as the optimizer is: no step ever gathers the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from far_scale.train.engine import Fragment


class ShardedEMA:
    """ema <- decay * ema + (1 - decay) * weight, float32, on this rank's fragments of the master weights.

    As officially it starts from the first weights and has no warm-up.

    Attributes:
        weights: one `[part]` float32 tensor a fragment.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        self.decay = decay
        self._runs: list[tuple[Tensor, Tensor]] = []  # average and live weights of each master tensor
        pieces: dict[int, Tensor] = {}
        # Fragments of one master lie in one storage, and so do their averages: an update takes one kernel a master
        # (ZeRO keeps one or a few), not one a parameter.
        live = {index: fragment.weight.detach() for index, fragment in enumerate(fragments)}
        for _, indices in groupby(sorted(live, key=lambda i: _storage(live[i])), lambda i: _storage(live[i])):
            own = list(indices)
            first = min(live[index].storage_offset() for index in own)
            end = max(live[index].storage_offset() + live[index].numel() for index in own)
            run = live[own[0]].as_strided((end - first,), (1,), first)
            average = run.clone()
            self._runs.append((average, run))
            for index in own:
                start = live[index].storage_offset() - first
                pieces[index] = average[start : start + live[index].numel()]
        self.weights: list[Tensor] = [pieces[index] for index in live]

    @torch.no_grad()
    def update(self, kept: Tensor) -> None:
        """Take in the weights of the step that just ended.

        Args:
            kept: 1, or 0 for a step that was skipped, which the average leaves out too: a scalar tensor on the
                device, so that the host need not know it yet.
        """
        weight = kept * (1 - self.decay)
        for average, live in self._runs:
            average.lerp_(live, weight.to(live.device))  # another device where the optimizer is offloaded


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
