"""Which attention kernel is used where.

The order is fixed, not measured: every rank, and a run that is resumed, must choose alike, or neither the ranks' sums
nor the resumed run would repeat the same numbers.
"""

from __future__ import annotations

import difflib
import functools
import os
from typing import NamedTuple

import torch

from far_scale.model.attention import (
    cpu,
    dense,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flex,
    torch_varlen,
    xformers_blocks,
)
from far_scale.model.attention.kernel import (
    NOT_INSTALLED,
    Kernel,
    compute_capability,
    format_capability,
    installed_version,
)
from far_scale.utils.errors import UserError

KERNEL_VARIABLE = "FAR_SCALE_ATTENTION"

_KERNEL_MODULES: tuple[Kernel, ...] = (flash_attn_4, flash_attn_3, flash_attn_2, torch_varlen, xformers_blocks, cpu)
_KERNELS = {module.NAME: module for module in _KERNEL_MODULES}

KERNELS = (*_KERNELS, flex.NAME, dense.NAME)
"""All names: the kernels that `causal_pair` runs on, FlexAttention and the dense mask, which stand beside them."""

# Measured on an H100 (docs/performance.md): a causal pair pays for its second call and for the merge, so that on clips
# as models train on FlexAttention's one call is faster, though its matrix products are slower.
_GPU_ORDER = (flex.NAME, flash_attn_2.NAME, torch_varlen.NAME, xformers_blocks.NAME, dense.NAME)
# By the first number of the compute capability: what is written for these GPUs goes before what runs on all.
_GPU_ORDER_BY_CAPABILITY = {
    9: (flex.NAME, flash_attn_3.NAME, flash_attn_4.NAME, *_GPU_ORDER[1:]),
    10: (flash_attn_4.NAME, *_GPU_ORDER),
    11: (flash_attn_4.NAME, *_GPU_ORDER),
}


class KernelChoice(NamedTuple):
    """Attributes:
    name: of the kernel.
    why: one line for the log.
    """

    name: str
    why: str


def choose_kernel(
    asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, compiled: bool = True
) -> KernelChoice:
    """The kernel for tensors `[T, N, D]` of this device, dtype and D.

    Args:
        asked: "auto" or a kernel's name; the environment's FAR_SCALE_ATTENTION goes before it.
        compiled: whether "auto" may be FlexAttention, which is compiled in the first calls and anew for other kinds of
            shapes. Training soon has them all; in sampling each frame brings new ones.

    Raises:
        UserError: there is no such kernel, or it cannot compute this here.
    """
    override = os.environ.get(KERNEL_VARIABLE, "")
    return _choose_cached(override or asked, bool(override), device, dtype, head_dim, compiled)


def get_kernel(name: str) -> Kernel:
    """The module of a kernel's name, one that `causal_pair` runs on: neither flex nor dense."""
    return _KERNELS[name]


def unusable_reason(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel of this name cannot compute this here; None where it can."""
    if name == dense.NAME:
        return None
    return (flex if name == flex.NAME else _KERNELS[name]).unusable_reason(device, dtype, head_dim)


@functools.cache
def _choose_cached(
    asked: str, overridden: bool, device: torch.device, dtype: torch.dtype, head_dim: int, compiled: bool
) -> KernelChoice:
    if asked != "auto":
        _check_usable(asked, overridden, device, dtype, head_dim)
        return KernelChoice(asked, f"attention: {asked} (asked for{f' by {KERNEL_VARIABLE}' if overridden else ''})")
    place, order = _candidate_order(device)
    passed_over: dict[str, list[str]] = {}
    for name in order if compiled else (name for name in order if name != flex.NAME):
        reason = unusable_reason(name, device, dtype, head_dim)
        if reason is None:
            reasons = [f"{', '.join(names)}: {what}" for what, names in passed_over.items()]
            why = "; ".join([place, *reasons]) if reasons else f"first choice {place}"
            return KernelChoice(name, f"attention: {name} ({why})")
        passed_over.setdefault(reason, []).append(name)
    raise AssertionError("the dense mask computes everything everywhere")


def _candidate_order(device: torch.device) -> tuple[str, tuple[str, ...]]:
    """Where we are, in words, and the names to try there, best first."""
    if device.type == "cpu":
        return "on a CPU", (cpu.NAME, dense.NAME)
    if device.type != "cuda":
        return f"on {device.type}", (dense.NAME,)
    capability = compute_capability(device)
    return f"on compute capability {format_capability(capability)}", _GPU_ORDER_BY_CAPABILITY.get(
        capability[0], _GPU_ORDER
    )


def _check_usable(asked: str, overridden: bool, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    where = f"{KERNEL_VARIABLE}={asked}" if overridden else f"attention {asked}"
    if asked not in KERNELS:
        near = difflib.get_close_matches(asked, KERNELS, n=1, cutoff=0.0)
        raise UserError(f"{where}: no such kernel; nearest is {near[0]} (there are: auto, {', '.join(KERNELS)})")
    reason = unusable_reason(asked, device, dtype, head_dim)
    if reason is None:
        return
    missing = asked in _KERNELS and installed_version(_KERNELS[asked].PACKAGE) is None
    install = f"; install it with: {_KERNELS[asked].INSTALL}" if missing else ""
    if missing and reason != NOT_INSTALLED:
        install = f", and it is {NOT_INSTALLED}{install}"
    raise UserError(f"{where}: {reason}{install}")
