"""Sums of the packs' bf16 gradients, in as few passes over memory as torch's operators allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class PackGradients:
    """The sum of a step's bf16 gradients over its packs, laid end to end for the reduction over the ranks.

    Each pack's gradients are read once and released. Those of a single pack are copied. Those of several are summed in
    float32, since bf16 would lose small addends, and the last addition writes in the dtype of the reduction.

    Args:
        parameters: whose gradients they are, in the order of `flat`.
        length: elements of `flat`; what is beyond the parameters stays 0.
        dtype: of the reduction.
        packs: calls of `add` in a step.

    Attributes:
        flat: `[length]` of `dtype`, the sum after the step's last `add`.
        sums: `[length]` float32, the sum before it; None with one pack, and `flat` itself in float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], length: int, dtype: torch.dtype, packs: int) -> None:
        self._parameters, self._packs, self._added = list(parameters), packs, 0
        device = self._parameters[0].device
        self.flat = torch.zeros(length, dtype=dtype, device=device)
        self.sums: Tensor | None = None
        if dtype == torch.float32:
            self.sums = self.flat
        elif packs > 1:
            self.sums = torch.zeros(length, dtype=torch.float32, device=device)
        self._in_flat = self._views(self.flat)
        self._in_sums = self._in_flat if self.sums is None else self._views(self.sums)

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients of the parameters and release them; one that is None counts as 0."""
        self._added += 1
        gradients = [parameter.grad for parameter in self._parameters]
        results = self._in_flat if self._added == self._packs else self._in_sums
        if self._added == 1:
            _copy(results, gradients)
        else:
            for result, total, gradient in zip(results, self._in_sums, gradients, strict=True):
                if gradient is not None:
                    torch.add(total, gradient, out=result)
                elif result is not total:
                    result.copy_(total)
        for parameter in self._parameters:
            parameter.grad = None

    def clear(self) -> None:
        """Begin a new step."""
        self._added = 0

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` in the shapes of the parameters."""
        sizes = [parameter.numel() for parameter in self._parameters]
        parts = flat[: sum(sizes)].split(sizes)
        return [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]


def _copy(results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    pairs = [(result, gradient) for result, gradient in zip(results, gradients, strict=True) if gradient is not None]
    if pairs:
        torch._foreach_copy_([result for result, _ in pairs], [gradient for _, gradient in pairs])
    for result, gradient in zip(results, gradients, strict=True):
        if gradient is None:
            result.zero_()
