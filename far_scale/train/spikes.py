"""Which losses and gradient norms are spikes, decided on the device: nothing here waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WINDOW = 128
"""How many of the last steps a step is compared with."""

LEAST = 16
"""Steps that must have been seen before any is judged: the deviation of a few numbers says little."""

_NORMAL = 1.4826
"""Times the median absolute deviation: the standard deviation, where the numbers are normal."""

_FLOOR = 0.01
"""The deviation is at least this fraction of the median: numbers that hardly move have one near 0, and any change
would be a spike."""


class RunningLevels:
    """The last steps' loss and gradient norm, and what lies far above them.

    Median and median absolute deviation, not mean and deviation: a few wild values hardly move them. Steps that were
    skipped must not be taken in.

    Args:
        deviations: how many robust deviations above the median a spike lies.
        device: where the numbers are.
    """

    def __init__(self, deviations: float, device: torch.device) -> None:
        self._deviations = deviations
        self._places = torch.arange(WINDOW, device=device)
        # Rings, filled from place 0 on; places without a number hold infinity, so that they sort last.
        self._rings = torch.full((2, WINDOW), float("inf"), device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)

    def spikes(self, now: Tensor) -> Tensor:
        """`[2]` bool: whether the loss and the gradient norm in `now` (`[2]` float32) are spikes."""
        middle = (self._seen.clamp(1, WINDOW) - 1).div(2, rounding_mode="floor").expand(2, 1)
        median = self._rings.sort(1).values.gather(1, middle)
        deviation = _NORMAL * (self._rings - median).abs().sort(1).values.gather(1, middle)
        limit = median + self._deviations * torch.maximum(deviation, _FLOOR * median.abs())
        return (now > limit[:, 0]) & (self._seen >= LEAST)

    def take(self, now: Tensor, good: Tensor) -> None:
        """Remember `now` (`[2]` float32) where the scalar bool tensor `good` is true."""
        here = (self._places == self._seen % WINDOW) & good
        self._rings = torch.where(here, now[:, None], self._rings)
        self._seen = self._seen + good

    def forget(self) -> None:
        """Begin as at first: what comes now has another level."""
        self._rings.fill_(float("inf"))
        self._seen.zero_()

    def state(self) -> dict[str, Any]:
        """For JSON. A float32 as a Python float is exact, so that a resumed run judges as one that never stopped."""
        seen = int(self._seen)
        loss, norm = self._rings[:, :seen].tolist()
        return {"seen": seen, "loss": loss, "grad_norm": norm}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.forget()
        self._seen.fill_(state["seen"])
        for ring, key in zip(self._rings, ("loss", "grad_norm"), strict=True):
            ring[: len(state[key])] = torch.tensor(state[key])
