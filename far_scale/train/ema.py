"""A running average of the weights, sharded as the optimizer is: no step ever gathers the model."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._live = [fragment.weight.detach() for fragment in fragments]
        self.weights: list[Tensor] = [weight.clone() for weight in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step that just ended."""
        torch._foreach_lerp_(self.weights, self._live, 1 - self.decay)
