"""What an attention kernel is: two functions over token sequences that lie end to end."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from far_scale.layout import Spans


class Kernel(Protocol):
    """Ordinary attention with the log-sum-exp given back, and its backward from a given output and log-sum-exp.

    Queries and keys of a sequence are equally many; `causal` lets query j see keys <= j. The scale is 1/sqrt(D).
    The backward takes `out` and `lse` from its caller and must not recompute them: a caller who merged several
    calls hands over the merged ones, and gets this call's share of the gradients.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> tuple[Tensor, Tensor]:
        """q, k, v `[T, N, D]` -> out `[T, N, D]`, lse `[T, N]` float (natural logarithm)."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients dq, dk, dv `[T, N, D]`."""
        ...
