"""The kernel of flash-attn 2: Ampere, Ada, Hopper and Blackwell GPUs.

For 2.5.7 to 2.8.4 (`flash_attn.flash_attn_interface`). `[T, N, D]` in bfloat16 or float16 with int32 cumulative
lengths, heads of a multiple of 8 up to 256; the log-sum-exp is natural and float32: `[N, T]`, and before 2.6 padded,
`[sequences, N, longest]`. `causal` aligns bottom right where keys outnumber queries (we use it only for equal
lengths). The backward adds dq up with atomics unless deterministic.

What changed: before 2.7 the forward gives 8 tensors, the log-sum-exp sixth, and takes the window as a pair; since then
4, the log-sum-exp second, and the functions are torch operators with two window numbers. Soft caps came with 2.6.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from far_scale.model.attention.install import FLASH_ATTN_2_COMMAND
from far_scale.model.attention.kernel import GPURequirements, import_failure, pad_lse, padded_rows, unpad_lse
from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "flash-attn-2", "flash-attn", FLASH_ATTN_2_COMMAND
DTYPES = (torch.bfloat16, torch.float16)

_NEEDS = GPURequirements(DTYPES, lowest=(8, 0))
_MODULE = "flash_attn.flash_attn_interface"


class _Library(NamedTuple):
    """The library's two functions, and the arguments that depend on its version."""

    forward: Any
    backward: Any
    forward_options: dict[str, Any]
    backward_options: dict[str, Any]
    lse_index: int
    padded: bool


@functools.cache
def _library() -> _Library:
    interface = importlib.import_module(_MODULE)
    major, minor = (int(number) for number in importlib.import_module("flash_attn").__version__.split(".")[:2])
    forward, backward = interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward
    options: dict[str, Any] = {"alibi_slopes": None}
    if (major, minor) >= (2, 6):
        options["softcap"] = 0.0
    if (major, minor) >= (2, 7):
        options |= {"window_size_left": -1, "window_size_right": -1}
        return _Library(forward, backward, options, options, lse_index=1, padded=False)
    options["window_size"] = (-1, -1)
    forward_options = options | {"return_softmax": False, "block_table": None}
    return _Library(forward, backward, forward_options, options, lse_index=5, padded=(major, minor) < (2, 6))


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """See `Kernel.unusable_reason`."""
    return _NEEDS.unusable_reason(device, dtype, head_dim) or import_failure(PACKAGE, "2.5.7", _MODULE)


def prepare(queries: Spans, keys: Spans, causal: bool, device: torch.device) -> list[Tensor]:
    """See `PreparedKernel.prepare`."""
    tensors = [queries.cumulative(device), keys.cumulative(device)]
    return [*tensors, padded_rows(queries, queries.longest, device)] if _library().padded else tensors


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    library = _library()
    out, *rest = library.forward(
        q, k, v, queries.cumulative(q.device), keys.cumulative(q.device), queries.longest, keys.longest,
        dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal, **library.forward_options,
    )  # fmt: skip
    lse = rest[library.lse_index - 1]
    return out, unpad_lse(lse, queries) if library.padded else lse.transpose(0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    library = _library()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse = pad_lse(lse, queries, queries.longest) if library.padded else lse.transpose(0, 1).contiguous()
    library.backward(
        dout, q, k, v, out, lse, dq, dk, dv,
        queries.cumulative(q.device), keys.cumulative(q.device), queries.longest, keys.longest,
        dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(), **library.backward_options,
    )  # fmt: skip
    return dq, dk, dv
