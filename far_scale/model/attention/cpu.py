"""The kernel for CPUs: PyTorch's flash attention operator, run once for each sequence length.

The operator takes dense batches `[sequences, N, length, D]` in float32, float64, bfloat16 or float16 and gives the
log-sum-exp `[sequences, N, length]`. Sequences of one length lie end to end as a dense batch already (no copy);
mixed lengths are gathered, a batch for each length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.layout import Spans

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _dense(x: Tensor, length: int) -> Tensor:
    """`[sequences * length, N, D]` -> `[sequences, N, length, D]`, a view."""
    return x.unflatten(0, (-1, length)).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """`[sequences, N, length, ...]` -> `[sequences * length, N, ...]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _rows(length: int, starts: tuple[int, ...]) -> Tensor:
    return (torch.tensor(starts)[:, None] + torch.arange(length)[None, :]).flatten()


def forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    if spans.uniform:
        length = spans.longest
        out, lse = _forward(_dense(q, length), _dense(k, length), _dense(v, length), 0.0, causal)
        return _flat(out), _flat(lse)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for length, starts in spans.groups:
        rows = _rows(length, starts)
        part_out, part_lse = forward(q[rows], k[rows], v[rows], Spans((length,) * len(starts)), causal)
        out[rows], lse[rows] = part_out, part_lse
    return out, lse


# Below this many tokens the operator's backward in bfloat16 is slower than in float32, 10 times so on frames of 16
# tokens (measured with torch 2.13 on a Xeon that multiplies bfloat16 matrices in hardware).
SHORT = 512


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    if q.dtype in (torch.bfloat16, torch.float16) and spans.longest < SHORT:
        dq, dk, dv = backward(dout.float(), q.float(), k.float(), v.float(), out.float(), lse, spans, causal)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    if spans.uniform:
        length = spans.longest
        dense = (_dense(x, length) for x in (dout, q, k, v, out))
        # The operator reads the log-sum-exp by plain offsets, so that one alone must lie contiguously.
        dq, dk, dv = _backward(*dense, _dense(lse, length).contiguous(), 0.0, causal)
        return _flat(dq), _flat(dk), _flat(dv)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for length, starts in spans.groups:
        rows = _rows(length, starts)
        group = Spans((length,) * len(starts))
        parts = backward(dout[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], group, causal)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[rows] = part
    return gradients
