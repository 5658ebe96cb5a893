"""The table of `python -m far_scale.model.attention`: installed and usable kernels, their errors and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from far_scale.model.attention import dense, flex, selection
from far_scale.model.attention.kernel import first_line, installed_version
from far_scale.model.attention.operators import attend
from far_scale.model.layout import AttentionPlan, FrameGroup, FrameLayout

HEAD_DIM = 64
_ERROR_HEADS = 2
_WARM_UP, _REPEATS = 3, 10


class Inputs(NamedTuple):
    """q, dout `[T, N, D]` and k, v `[K, N, D]`."""

    plan: AttentionPlan
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def draw(plan: AttentionPlan, heads: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Normal random numbers, rounded to bfloat16 so that they are the same in every dtype."""
        generator = torch.Generator().manual_seed(plan.group.tokens)
        sizes = [plan.group.tokens, plan.keys, plan.keys, plan.group.tokens]
        drawn = (torch.randn(size, heads, HEAD_DIM, generator=generator).bfloat16() for size in sizes)
        return Inputs(plan, *(x.to(device, dtype) for x in drawn))


def attention_with_gradients(name: str, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of q, k, v, by the kernel of this name."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs[1:4]]
    out = attend(q, k, v, inputs.plan.handle, name)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.dout, materialize_grads=True)]


def max_errors(name: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The largest errors of output and gradients against the dense reference in float64, on clips of different lengths,
    some with a context of coarser frames."""
    layout = FrameLayout.of((5, 1, 3), (4, 4), window=3, coarsening=2)
    plan = layout.plan
    results = attention_with_gradients(name, Inputs.draw(plan, _ERROR_HEADS, device, dtype))
    references = attention_with_gradients(dense.NAME, Inputs.draw(plan, _ERROR_HEADS, device, torch.float64))
    out, *gradients = (
        (ours - reference).abs().max().item() for ours, reference in zip(results, references, strict=True)
    )
    return out, max(gradients)


def median_milliseconds(name: str, inputs: Inputs) -> tuple[float, float]:
    """Median milliseconds of forward and backward."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs[1:4]]
    forward, backward = [], []
    for _ in range(_WARM_UP + _REPEATS):
        started = _synchronized_time(inputs.q.device)
        out = attend(q, k, v, inputs.plan.handle, name)
        computed = _synchronized_time(inputs.q.device)
        torch.autograd.grad(out, leaves, inputs.dout, materialize_grads=True)
        forward.append(computed - started)
        backward.append(_synchronized_time(inputs.q.device) - computed)
    return 1e3 * statistics.median(forward[_WARM_UP:]), 1e3 * statistics.median(backward[_WARM_UP:])


def _synchronized_time(device: torch.device) -> float:
    """The time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table_rows(
    device: torch.device, dtypes: Sequence[torch.dtype], clips: int, frames: int, heads: int
) -> Iterator[str]:
    """The table's lines, timed on clips of frames of 64 tokens, for each kernel in each dtype that it supports."""
    yield f"{device}, torch {torch.__version__}; timed: {clips} x {frames} frames of 64 tokens, {heads} heads of 64"
    yield "kernel        installed      dtype        error of gradients  ms forward  backward"
    plan = AttentionPlan(FrameGroup.of((frames,) * clips, (8, 8)))
    for name in selection.KERNELS:
        package = "torch" if name in (flex.NAME, dense.NAME) else selection.get_kernel(name).PACKAGE
        version = installed_version(package) or "-"
        reasons = {dtype: selection.unusable_reason(name, device, dtype, HEAD_DIM) for dtype in dtypes}
        if None not in reasons.values():
            yield f"{name:13} {version:14} no: {reasons[dtypes[0]]}"
            continue
        for dtype in (dtype for dtype, reason in reasons.items() if reason is None):
            start = f"{name:13} {version:14} {str(dtype).removeprefix('torch.'):9}"
            try:
                out_error, gradient_error = max_errors(name, device, dtype)
                forward_ms, backward_ms = median_milliseconds(name, Inputs.draw(plan, heads, device, dtype))
            except Exception as error:  # any error of a library must not hide the other kernels' lines
                yield f"{start} fails: {type(error).__name__}: {first_line(error)}"
                continue
            yield f"{start} {out_error:8.1e} {gradient_error:12.1e} {forward_ms:11.3f} {backward_ms:9.3f}"
