"""The kernel of flash-attn 3: Hopper GPUs.

For the `hopper` folder of flash-attention from 2.8.0 to 2.8.4. Its Python functions changed their window arguments
and what they return; the torch operators below them, `flash_attn_3::fwd` and `bwd`, kept their arguments all along (the
backward gave 8 tensors at first and gives 5 now; we bring our own gradients and read none of them). `[T, N, D]` in
bfloat16 or float16 with int32 cumulative lengths, heads of a multiple of 8; the log-sum-exp is `[N, T]`, float32 and
natural. `causal` aligns bottom right where keys outnumber queries (we use it only for equal lengths). The backward
adds dq up with atomics unless deterministic, which is unavailable for heads of 256.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from far_scale.model.attention.install import FLASH_ATTN_3_COMMAND
from far_scale.model.attention.kernel import GPURequirements, import_failure
from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "flash-attn-3", "flash-attn-3", FLASH_ATTN_3_COMMAND
DTYPES = (torch.bfloat16, torch.float16)

_NEEDS = GPURequirements(DTYPES, lowest=(9, 0), highest=(9, 0), largest_head=192)
_MODULE = "flash_attn_3._C"


@functools.cache
def _operators() -> Any:
    importlib.import_module(_MODULE)  # importing it registers the operators
    return torch.ops.flash_attn_3


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    return _NEEDS.unusable_reason(device, dtype, head_dim) or import_failure(PACKAGE, "3.0.0b1", _MODULE)


def prepare(queries: Spans, keys: Spans, causal: bool, device: torch.device) -> list[Tensor]:
    """See `PreparedKernel.prepare`."""
    return [queries.cumulative(device), keys.cumulative(device)]


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    # One split; several, which a heuristic may choose, would give the log-sum-exp in parts.
    out, lse, *_ = _operators().fwd(
        *map(_contiguous_heads, (q, k, v)), **_sequences(q, queries, keys, causal), num_splits=1
    )
    return out, lse.transpose(0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _operators().bwd(
        *map(_contiguous_heads, (dout, q, k, v, out)), lse.transpose(0, 1).contiguous(), dq, dk, dv,
        **_sequences(q, queries, keys, causal), deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _contiguous_heads(x: Tensor) -> Tensor:
    """The operators need contiguous head dimensions; all others may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sequences(q: Tensor, queries: Spans, keys: Spans, causal: bool) -> dict[str, Any]:
    return {
        "cu_seqlens_q": queries.cumulative(q.device),
        "cu_seqlens_k": keys.cumulative(q.device),
        "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
        "softmax_scale": q.shape[-1] ** -0.5,
        "is_causal": causal,
    }
