"""`frame_attention`: frame-block causal attention over a group of frames, by the kernel that fits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from far_scale.model.attention.choice import choose
from far_scale.model.attention.operators import attend
from far_scale.model.layout import AttentionPlan, FrameGroup, Prefix


class PrefixKV(NamedTuple):
    """Keys and values that come before a group: its clips' contexts, or what a cache holds.

    Attributes:
        k, v: `[S, N, D]`, of one clip after another; S may be 0.
        prefix: which queries see which of them; None where S is 0.
    """

    k: Tensor
    v: Tensor
    prefix: Prefix | None


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: FrameGroup,
    prefix_kv: PrefixKV | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Every token attends to its own frame in full, to all earlier frames of its clip in the group, and to all of its
    clip's earlier keys.

    Args:
        q, k, v: `[T, N, D]`, the group's tokens in its order; softmax scale 1/sqrt(D).
        group: whose tokens they are.
        prefix_kv: keys and values before the group, if any.
        kernel: its name, or "auto" for the first that is usable.

    Returns:
        `[T, N, D]`, differentiable in all tensors.

    Raises:
        ValueError: the tensors do not hold the group's tokens or the prefix's.
        UserError: the kernel is unknown or not usable here.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[0] != group.tokens:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must each be [T, N, D] with T = {group.tokens} tokens, got {shapes}")
    prefix_k, prefix_v, prefix = prefix_kv or (None, None, None)
    if prefix_k is not None and len(prefix_k) != (prefix.keys.starts[-1] if prefix else 0):
        raise ValueError(f"the prefix has {prefix.keys.starts[-1] if prefix else 0} earlier keys, got {len(prefix_k)}")
    name = choose(kernel, q.device, q.dtype, q.shape[-1]).name
    plan = AttentionPlan(group, prefix)
    out = attend(q, k, v, prefix_k, prefix_v, plan.handle, name)
    if out.grad_fn is not None:
        out.grad_fn.metadata["plan"] = plan  # type: ignore[index]  # the backward finds it by its handle, so it must live as long
    return out
