"""What an attention kernel is: two functions over token sequences that lie end to end."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from far_scale.layout import Spans


class Kernel(Protocol):
    """Ordinary attention with the log-sum-exp given back, and its backward from a given output and log-sum-exp.

    Query sequence i sees key sequence i. `causal`, only where both have the same lengths, lets query j see keys <= j.
    The scale is 1/sqrt(D). The backward takes `out` and `lse` from its caller and must not recompute them: a caller
    who merged several calls hands over the merged ones, and gets this call's share of the gradients.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q `[T, N, D]`, k, v `[S, N, D]` -> out `[T, N, D]`, lse `[T, N]` float (natural logarithm), both new."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Spans,
        keys: Spans,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients dq `[T, N, D]`, dk, dv `[S, N, D]`, all new."""
        ...
