"""`frame_attention`: frame-block causal attention over a pack, by the kernel that fits device and precision."""

from __future__ import annotations

from torch import Tensor

from far_scale.layout import FrameGroup, Prefix
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


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: FrameGroup,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Every token attends to its own frame in full, to all earlier frames of its clip in the group, and to its clip's
    context where there is one.

    Args:
        q, k, v: `[T, N, D]`, the group's tokens in its order; softmax scale 1/sqrt(D).
        group: whose tokens they are.
        context_k, context_v: `[S, N, D]`, the contexts of the group's clips one after another; S may be 0.
        prefix: which queries see which of them; None for none.

    Returns:
        `[T, N, D]`, differentiable in all five tensors.

    Raises:
        ValueError: the tensors do not hold the group's tokens or the prefix's.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[0] != group.tokens:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must each be [T, N, D] with T = {group.tokens} tokens, got {shapes}")
    if prefix is not None and (context_k is None or len(context_k) != prefix.keys.starts[-1]):
        given = "none" if context_k is None else len(context_k)
        raise ValueError(f"the prefix has {prefix.keys.starts[-1]} context tokens, got {given}")
    if not group.tokens:
        return q + k + v  # as empty as they are, and every one of them gets its (empty) gradient
    kernel = kernel_for(q)
    if kernel is None:
        return dense_attention(q, k, v, group, context_k, context_v, prefix)
    return CausalPair.apply(q, k, v, context_k, context_v, group, prefix, kernel)
