"""`frame_attention`: frame-block causal attention over a pack, by the kernel that fits device and precision."""

from __future__ import annotations

from torch import Tensor

from far_scale.layout import FrameGroup
from far_scale.model.attention import cpu, torch_varlen
from far_scale.model.attention.causal_pair import CausalPair
from far_scale.model.attention.dense import dense_attention
from far_scale.model.attention.earlier import Earlier
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
    earlier: Earlier | None = None,
) -> Tensor:
    """Every token attends to its own frame in full, to all earlier frames of its clip in the group, and to all of its
    clip's earlier keys.

    Args:
        q, k, v: `[T, N, D]`, the group's tokens in its order; softmax scale 1/sqrt(D).
        group: whose tokens they are.
        earlier: keys and values before the group, if any.

    Returns:
        `[T, N, D]`, differentiable in all tensors.

    Raises:
        ValueError: the tensors do not hold the group's tokens or the prefix's.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[0] != group.tokens:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must each be [T, N, D] with T = {group.tokens} tokens, got {shapes}")
    context_k, context_v, prefix = earlier or (None, None, None)
    if context_k is not None and len(context_k) != (prefix.keys.starts[-1] if prefix else 0):
        raise ValueError(f"the prefix has {prefix.keys.starts[-1] if prefix else 0} earlier keys, got {len(context_k)}")
    if not group.tokens:
        return q + k + v  # as empty as they are, and every one of them gets its (empty) gradient
    kernel = kernel_for(q)
    if kernel is None:
        return dense_attention(q, k, v, group, earlier)
    return CausalPair.apply(q, k, v, context_k, context_v, group, prefix, kernel)
