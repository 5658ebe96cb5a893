"""`frame_attention`: frame-block causal attention over a pack, by the kernel that fits device and precision."""

from __future__ import annotations

from torch import Tensor

from far_scale.layout import FrameLayout
from far_scale.model.attention import cpu, torch_varlen
from far_scale.model.attention.causal_pair import CausalPair
from far_scale.model.attention.dense import dense_attention
from far_scale.model.attention.kernel import Kernel


def kernel_for(q: Tensor) -> Kernel | None:
    """The kernel for this tensor's device and precision; None where only the dense oracle computes it."""
    if q.device.type == "cpu":
        return cpu
    if q.device.type == "cuda" and q.dtype in torch_varlen.DTYPES:
        return torch_varlen
    return None


def frame_attention(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout) -> Tensor:
    """Every token attends to its own frame in full and to all earlier frames of its clip.

    Args:
        q, k, v: `[T, N, D]`, the pack's tokens in the order of `layout`; softmax scale 1/sqrt(D).
        layout: whose tokens they are.

    Returns:
        `[T, N, D]`, differentiable in q, k and v.

    Raises:
        ValueError: the tensors do not hold `layout.tokens` tokens.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[0] != layout.tokens:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must each be [T, N, D] with T = {layout.tokens} tokens, got {shapes}")
    kernel = kernel_for(q)
    if kernel is None:
        return dense_attention(q, k, v, layout)
    return CausalPair.apply(q, k, v, layout, kernel)
