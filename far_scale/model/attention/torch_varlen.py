"""The kernel for NVIDIA GPUs that needs nothing beside PyTorch (2.9 and later): its varlen flash operators.

They take `[T, N, D]` in bfloat16 or float16 with int32 cumulative lengths and give the log-sum-exp `[N, T]` in
float32 (the variable-length path of `aten::_flash_attention_forward`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.layout import Spans

DTYPES = (torch.bfloat16, torch.float16)

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    starts, key_starts = queries.cumulative(q.device), keys.cumulative(q.device)
    out, lse, *_ = _forward(q, k, v, starts, key_starts, queries.longest, keys.longest, 0.0, causal, False)
    return out, lse.transpose(0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    starts, key_starts = queries.cumulative(q.device), keys.cumulative(q.device)
    # Only dropout, of which there is none, reads the generator state and its companion.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    companion = torch.empty(0, device=q.device)
    return _backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous(),
        starts, key_starts, queries.longest, keys.longest, 0.0, causal, state, companion,
    )  # fmt: skip
