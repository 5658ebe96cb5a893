"""The kernel for NVIDIA GPUs that needs only PyTorch (2.9 and later): its varlen flash operators.

For torch 2.9, 2.10, 2.11 and 2.13: `aten::_flash_attention_forward` and `_backward` take the same
positional arguments in all of them. They are flash-attn 2: `[T, N, D]` in bfloat16 or float16 with int32 cumulative
lengths, heads of a multiple of 8 up to 256; the log-sum-exp is `[N, T]`, float32 and natural. `causal` aligns bottom
right where keys outnumber queries (we use it only for equal lengths). The backward is deterministic if
`torch.use_deterministic_algorithms` asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.model.attention.kernel import GPURequirements
from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "torch-varlen", "torch", ""
DTYPES = (torch.bfloat16, torch.float16)

_NEEDS = GPURequirements(DTYPES, lowest=(8, 0))
_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    return _NEEDS.unusable_reason(device, dtype, head_dim)


def prepare(queries: Spans, keys: Spans, causal: bool, device: torch.device) -> list[Tensor]:
    """See `PreparedKernel.prepare`."""
    return [queries.cumulative(device), keys.cumulative(device)]


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
    # Only dropout, which is off, reads these two.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous(),
        starts, key_starts, queries.longest, keys.longest, 0.0, causal, rng_state, unused,
    )  # fmt: skip
    return gradients
