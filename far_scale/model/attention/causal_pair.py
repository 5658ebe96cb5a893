"""Frame-block causality out of two ordinary causal kernel calls, exact in forward and backward.

Let a clip's tokens stand in frame order. The keys that query t of frame f may see are

    {keys <= t}                               one causal call; the sequences are the clips
    + {keys of the same frame that are > t}   one causal call over reversed frames; the sequences are the frames

The two sets are disjoint, so their softmaxes merge by the log-sum-exps l1, l2 (the rule of split attention, as in
FlashDecoding): l = logaddexp(l1, l2), o = o1 exp(l1 - l) + o2 exp(l2 - l). Backward, a flash kernel computes
P = exp(s - l) and rowsum(dO * O) from the l and O it is given; given the merged ones, each call yields exactly its
own pairs' share of the gradients, which add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from far_scale.layout import FrameLayout
from far_scale.model.attention.kernel import Kernel


class CausalPair(torch.autograd.Function):
    """q, k, v `[T, N, D]` -> `[T, N, D]`, see `frame_attention`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout, kernel: Kernel) -> Tensor:
        out, lse = kernel.forward(q, k, v, layout.clips, causal=True)
        upper = layout.upper_triangle(q.device)
        if upper is not None:
            rows, keys = upper.queries, upper.keys
            upper_out, upper_lse = kernel.forward(q[rows], k[keys], v[keys], upper.spans, causal=True)
            lower_out, lower_lse = out[rows], lse[rows]
            merged = torch.logaddexp(lower_lse, upper_lse)
            lower_share = (lower_lse - merged).exp_().unsqueeze(-1)
            upper_share = (upper_lse - merged).exp_().unsqueeze(-1)
            out = out.index_copy(0, rows, (lower_out * lower_share + upper_out * upper_share).to(out.dtype))
            lse = lse.index_copy(0, rows, merged)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.kernel = layout, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grad_outputs
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.kernel.backward(dout, q, k, v, out, lse, ctx.layout.clips, causal=True)
        upper = ctx.layout.upper_triangle(q.device)
        if upper is not None:
            rows, keys = upper.queries, upper.keys
            upper_dq, upper_dk, upper_dv = ctx.kernel.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], upper.spans, causal=True
            )
            # Within a call no row comes twice, so the additions need no atomics and their order is fixed.
            dq = dq.index_copy(0, rows, dq[rows] + upper_dq)
            dk = dk.index_copy(0, keys, dk[keys] + upper_dk)
            dv = dv.index_copy(0, keys, dv[keys] + upper_dv)
        return dq, dk, dv, None, None
