"""The kernel of xFormers: block-diagonal masks, float32 and GPUs before Ampere too.

For 0.0.33, the first for torch 2.9, to 0.0.35. The log-sum-exp, float32 and natural, is `[1, N, T]` from
its flash operators (bfloat16 and float16, heads up to 256), and padded from its CUTLASS operators (float32 too, up to
compute capability 9.0): `[sequences, N, W]` with W the longest sequence rounded up to 32. Each backward needs the
layout of its own forward, so we name the operators. Tensors are `[1, T, N, D]`, heads of a multiple of 8.
`BlockDiagonalCausalMask` aligns top left, and the flash operators refuse it where keys outnumber queries (we use it
only for equal lengths). The flash backward is not deterministic; if torch asks for that, CUTLASS takes its place.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from far_scale.model.attention.install import xformers_command
from far_scale.model.attention.kernel import (
    GPURequirements,
    compute_capability,
    format_capability,
    import_failure,
    pad_lse,
    padded_rows,
    unpad_lse,
)
from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "xformers", "xformers", xformers_command(torch.__version__)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_FLASH = GPURequirements(DTYPES, lowest=(7, 5))
_CUTLASS = GPURequirements(DTYPES, lowest=(7, 5), highest=(9, 0))
_MODULE = "xformers.ops.fmha"
_PADDING = 32


@functools.cache
def _library() -> Any:
    return importlib.import_module(_MODULE)


def _built_with_cuda() -> bool:
    """Whether its CUDA extensions can be loaded, which fails if they were built for another torch."""
    return bool(importlib.import_module("xformers._cpp_lib")._built_with_cuda)


def _supports_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the flash operators support it; otherwise the CUTLASS operators do."""
    return dtype != torch.float32 and compute_capability(device) >= (8, 0) and _library().flash.FwOp.is_available()


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    if reason := _FLASH.unusable_reason(device, dtype, head_dim) or import_failure(PACKAGE, "0.0.33", _MODULE):
        return reason
    if not _built_with_cuda():  # the import works nevertheless, but the first call fails
        return f"the installed one was built for another torch than {torch.__version__}"
    if _supports_flash(device, dtype):
        return None
    if dtype == torch.bfloat16 and (capability := compute_capability(device)) < (8, 0):
        return f"takes bfloat16 from compute capability 8.0 on, this GPU has {format_capability(capability)}"
    return _CUTLASS.unusable_reason(device, dtype, head_dim)


def _mask(queries: Spans, keys: Spans, causal: bool, device: torch.device) -> Any:
    """The library's mask, cached."""

    def make() -> Any:
        masks = _library().attn_bias
        kind = masks.BlockDiagonalCausalMask if causal else masks.BlockDiagonalMask
        mask = kind.from_seqlens(list(queries.lengths), list(keys.lengths), device=torch.device("cpu"))
        # The library would copy its cumulative lengths from pageable memory, and wait.
        mask.q_seqinfo.seqstart, mask.k_seqinfo.seqstart = queries.cumulative(device), keys.cumulative(device)
        return mask

    return queries.cache.get(("xformers", keys.lengths, causal), device, make)


def _padded_width(spans: Spans) -> int:
    return -(-spans.longest // _PADDING) * _PADDING


def prepare(queries: Spans, keys: Spans, causal: bool, device: torch.device) -> list[Tensor]:
    """See `PreparedKernel.prepare`."""
    _mask(queries, keys, causal, device)
    padded = padded_rows(queries, _padded_width(queries), device)  # for CUTLASS's operators
    return [queries.cumulative(device), keys.cumulative(device), padded]


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    library, mask = _library(), _mask(queries, keys, causal, q.device)
    operator = (library.flash if _supports_flash(q.device, q.dtype) else library.cutlass).FwOp
    out, lse = library.memory_efficient_attention_forward_requires_grad(q[None], k[None], v[None], mask, op=operator)
    return out[0], lse[0].transpose(0, 1) if operator.VARLEN_LSE_PACKED else unpad_lse(lse, queries)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    library, mask = _library(), _mask(queries, keys, causal, q.device)
    flash = _supports_flash(q.device, q.dtype) and not torch.are_deterministic_algorithms_enabled()
    operator = (library.flash if flash else library.cutlass).BwOp
    if operator.VARLEN_LSE_PACKED:
        lse = lse.transpose(0, 1).contiguous()[None]
    else:
        lse = pad_lse(lse, queries, _padded_width(queries))
    dq, dk, dv = library.memory_efficient_attention_backward(
        dout.contiguous()[None], out.contiguous()[None], lse, q[None], k[None], v[None], mask, op=operator
    )
    return dq[0], dk[0], dv[0]
