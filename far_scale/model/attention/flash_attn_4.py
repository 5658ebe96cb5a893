"""The kernel of flash-attn 4, which is written in CuTe and compiled at first use: Hopper and Blackwell GPUs.

For 4.0.0b10, b20 and b36 (`flash_attn.cute.interface`). `[T, N, D]` in bfloat16 or float16 with int32 cumulative
lengths, heads of a multiple of 8 up to 256 on Hopper and up to 128 on Blackwell; the log-sum-exp is `[N, T]`, float32
and natural. `causal` aligns bottom right where keys outnumber queries (we use it only for equal lengths). The backward
over several sequences runs on compute capability 9.0 (since b5), 10 and 11. On 12 both run on Ampere's instructions,
never deterministically, so flash-attn 2 is used there. The forward returns 2 to 5 values, out and log-sum-exp first.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from far_scale.model.attention.install import flash_attn_4_command
from far_scale.model.attention.kernel import GPURequirements, compute_capability, import_failure
from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "flash-attn-4", "flash-attn-4", flash_attn_4_command(torch.version.cuda)
DTYPES = (torch.bfloat16, torch.float16)

_HOPPER = GPURequirements(DTYPES, lowest=(9, 0), highest=(11, 9))
_BLACKWELL = GPURequirements(DTYPES, lowest=(9, 0), highest=(11, 9), largest_head=128)
_MODULE = "flash_attn.cute.interface"


@functools.cache
def _library() -> Any:
    return importlib.import_module(_MODULE)


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    hopper = device.type == "cuda" and compute_capability(device)[0] == 9
    needs = _HOPPER if hopper else _BLACKWELL
    return needs.unusable_reason(device, dtype, head_dim) or import_failure(PACKAGE, "4.0.0b10", _MODULE)


def prepare(queries: Spans, keys: Spans, causal: bool, device: torch.device) -> list[Tensor]:
    """See `PreparedKernel.prepare`."""
    return [queries.cumulative(device), keys.cumulative(device)]


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    out, lse, *_ = _library()._flash_attn_fwd(q, k, v, **_sequences(q, queries, keys, causal), return_lse=True)
    return out, lse.transpose(0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    dq, dk, dv = _library()._flash_attn_bwd(
        q, k, v, out, dout, lse.transpose(0, 1).contiguous(), **_sequences(q, queries, keys, causal),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _sequences(q: Tensor, queries: Spans, keys: Spans, causal: bool) -> dict[str, Any]:
    return {
        "cu_seqlens_q": queries.cumulative(q.device),
        "cu_seqlens_k": keys.cumulative(q.device),
        "max_seqlen_q": queries.longest,
        "max_seqlen_k": keys.longest,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": causal,
    }
