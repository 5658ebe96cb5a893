"""Selects the attention kernel.

The order is fixed, not measured: all ranks, and a resumed run, must choose the same kernel to get the same numbers.
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
"""All names: the kernels that `causal_pair` runs on, and FlexAttention and the dense reference beside them."""

# Measured on an H100 (docs/performance.md): a causal pair pays for its second call and for the merge. On clips of
# training, FlexAttention's one call is faster, though its matrix products are slower.
_GPU_ORDER = (flex.NAME, flash_attn_2.NAME, torch_varlen.NAME, xformers_blocks.NAME, dense.NAME)
# By major compute capability: kernels written for these GPUs come before those that run on all.
_GPU_ORDER_BY_CAPABILITY = {
    9: (flex.NAME, flash_attn_3.NAME, flash_attn_4.NAME, *_GPU_ORDER[1:]),
    10: (flash_attn_4.NAME, *_GPU_ORDER),
    11: (flash_attn_4.NAME, *_GPU_ORDER),
}


class KernelChoice(NamedTuple):
    """A kernel and why it was chosen.

    Attributes:
        name: of the kernel.
        why: one line for the log.
    """

    name: str
    why: str


def choose_kernel(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, compiled: bool = True
) -> KernelChoice:
    """Choose the kernel for tensors `[T, N, D]` of this device, dtype and D.

    Args:
        requested: "auto" or a kernel's name; the environment variable FAR_SCALE_ATTENTION overrides it.
        compiled: whether "auto" may choose FlexAttention, which recompiles for new kinds of shapes. Training soon has
            seen all of them; in sampling each frame brings new ones.

    Raises:
        UserError: the kernel is unknown, or unusable for these tensors.
    """
    override = os.environ.get(KERNEL_VARIABLE, "")
    return _choose_cached(override or requested, bool(override), device, dtype, head_dim, compiled)


def get_kernel(name: str) -> Kernel:
    """The module of a kernel that `causal_pair` runs on: neither flex nor dense."""
    return _KERNELS[name]


def unusable_reason(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel cannot compute on such tensors; None if it can."""
    if name == dense.NAME:
        return None
    return (flex if name == flex.NAME else _KERNELS[name]).unusable_reason(device, dtype, head_dim)


@functools.cache
def _choose_cached(
    requested: str, overridden: bool, device: torch.device, dtype: torch.dtype, head_dim: int, compiled: bool
) -> KernelChoice:
    if requested != "auto":
        _check_usable(requested, overridden, device, dtype, head_dim)
        source = f" by {KERNEL_VARIABLE}" if overridden else ""
        return KernelChoice(requested, f"attention: {requested} (requested{source})")
    description, order = _candidate_order(device)
    skipped: dict[str, list[str]] = {}
    for name in order if compiled else (name for name in order if name != flex.NAME):
        reason = unusable_reason(name, device, dtype, head_dim)
        if reason is None:
            reasons = [f"{', '.join(names)}: {problem}" for problem, names in skipped.items()]
            why = "; ".join([description, *reasons]) if reasons else f"first choice {description}"
            return KernelChoice(name, f"attention: {name} ({why})")
        skipped.setdefault(reason, []).append(name)
    raise AssertionError("the dense reference computes everything everywhere")


def _candidate_order(device: torch.device) -> tuple[str, tuple[str, ...]]:
    """The device in words, and its candidate kernels, best first."""
    if device.type == "cpu":
        return "on a CPU", (cpu.NAME, dense.NAME)
    if device.type != "cuda":
        return f"on {device.type}", (dense.NAME,)
    capability = compute_capability(device)
    order = _GPU_ORDER_BY_CAPABILITY.get(capability[0], _GPU_ORDER)
    return f"on compute capability {format_capability(capability)}", order


def _check_usable(requested: str, overridden: bool, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    setting = f"{KERNEL_VARIABLE}={requested}" if overridden else f"attention {requested}"
    if requested not in KERNELS:
        nearest = difflib.get_close_matches(requested, KERNELS, n=1, cutoff=0.0)
        raise UserError(f"{setting}: no such kernel; nearest is {nearest[0]} (known: auto, {', '.join(KERNELS)})")
    reason = unusable_reason(requested, device, dtype, head_dim)
    if reason is None:
        return
    missing = requested in _KERNELS and installed_version(_KERNELS[requested].PACKAGE) is None
    install = f"; install it with: {_KERNELS[requested].INSTALL}" if missing else ""
    if missing and reason != NOT_INSTALLED:
        install = f", and it is {NOT_INSTALLED}{install}"
    raise UserError(f"{setting}: {reason}{install}")
