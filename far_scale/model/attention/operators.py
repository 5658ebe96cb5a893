"""Frame-block causal attention as torch operators, for torch.compile, selective checkpointing and FLOP counters.

    far_scale::frame_attention            q, k, v, prefix keys and values, handle, kernel -> out, lse
    far_scale::frame_attention_backward   the same, the output's gradient, out, lse -> all gradients

A compiled graph calls them for any pack: its only constant is the kernel's name, and the plan is looked up by its
handle (see `AttentionPlan`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from far_scale.model.attention import causal_pair, dense, flex, selection
from far_scale.model.attention.selection import choose_kernel
from far_scale.model.layout import AttentionPlan, FrameGroup, Prefix

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor handle, str kernel"


def attend(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, handle: Tensor, kernel: str
) -> Tensor:
    """Frame-block causal attention over the tokens of a plan.

    Args:
        q, k, v: `[T, N, D]`.
        prefix_k, prefix_v: `[S, N, D]` keys and values of the plan's prefix; S is 0 without one.
        handle: of an `AttentionPlan`.
        kernel: the name of a usable kernel (see `selection.choose_kernel`).

    Returns:
        `[T, N, D]`, differentiable in all tensors but the handle.
    """
    if kernel == flex.NAME:
        flex_out: Tensor = flex.attend(q, k, v, prefix_k, prefix_v, handle)
        return flex_out
    out: Tensor = torch.ops.far_scale.frame_attention(q, k, v, prefix_k, prefix_v, handle, kernel)[0]
    return out


def prepare(plan: AttentionPlan, device: torch.device, kernel: str) -> list[Tensor]:
    """Make all that attention over the plan by this kernel reads of it on `device`; returns the tensors."""
    if not plan.group.tokens:
        return []
    if kernel == flex.NAME:
        return flex.prepare(plan, device)
    if kernel == dense.NAME:
        return dense.prepare(plan, device)
    return causal_pair.prepare(selection.get_kernel(kernel), plan, device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, plan: AttentionPlan, kernel: str
) -> tuple[Tensor, Tensor]:
    """Attention by a kernel other than FlexAttention: out `[T, N, D]` and lse `[T, N]`, contiguous."""
    if not len(q):
        return torch.empty_like(q, memory_format=torch.contiguous_format), empty_lse(q)
    if kernel == dense.NAME:
        out, lse = dense.forward(q, k, v, prefix_k, prefix_v, plan)
    else:
        out, lse = causal_pair.forward(selection.get_kernel(kernel), q, k, v, prefix_k, prefix_v, plan)
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None,
    plan: AttentionPlan, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and of prefix keys and values, contiguous; empty ones without prefix tensors."""
    if not len(q):
        empty_gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _backward_shapes(
            dout, out, lse, q, k, v, prefix_k, prefix_v, plan.handle, kernel
        )
        return empty_gradients
    if kernel == dense.NAME:
        gradients = dense.backward(dout, q, k, v, prefix_k, prefix_v, out, lse, plan)
    else:
        gradients = causal_pair.backward(
            selection.get_kernel(kernel), dout, q, k, v, prefix_k, prefix_v, out, lse, plan
        )
    dq, dk, dv, prefix_dk, prefix_dv = (None if x is None else x.contiguous() for x in gradients)
    assert dq is not None and dk is not None and dv is not None
    # An operator always returns tensors: empty ones without prefix keys, zeros for prefix keys that no query sees.
    empty = q.new_empty(0)
    if prefix_dk is None:
        prefix_dk = empty if prefix_k is None else torch.zeros_like(prefix_k)
    if prefix_dv is None:
        prefix_dv = empty.clone() if prefix_v is None else torch.zeros_like(prefix_v)
    return dq, dk, dv, prefix_dk, prefix_dv


@torch.library.custom_op("far_scale::frame_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, handle: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, prefix_k, prefix_v, AttentionPlan.find(handle), kernel)


@torch.library.custom_op(
    "far_scale::frame_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, handle: Tensor, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(dout, out, lse, q, k, v, prefix_k, prefix_v, AttentionPlan.find(handle), kernel)


@_forward.register_fake
def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, handle: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), empty_lse(q)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, handle: Tensor, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    prefix_dk, prefix_dv = (
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (prefix_k, prefix_v)
    )
    return dq, dk, dv, prefix_dk, prefix_dv


def empty_lse(q: Tensor) -> Tensor:
    """An uninitialized log-sum-exp `[T, N]` for q."""
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd_backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    _, _, _, _, _, prefix_k, _, _ = saved = ctx.saved_tensors
    dq, dk, dv, prefix_dk, prefix_dv = torch.ops.far_scale.frame_attention_backward(dout, *saved, ctx.kernel)
    if prefix_k is None:
        return dq, dk, dv, None, None, None, None
    return dq, dk, dv, prefix_dk, prefix_dv, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.far_scale.frame_attention, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, handle: Tensor, *_: Any, **__: Any
) -> int:
    """Two products, scores and values, of 2 D FLOPs a pair and head."""
    return 2 * 2 * AttentionPlan.find(handle).pairs * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.far_scale.frame_attention_backward, get_raw=True)
def _backward_flops(
    dout: Tensor, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, handle: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Five products: scores again, and the gradients of weights, values, keys and queries."""
    return 5 * 2 * AttentionPlan.find(handle).pairs * q.shape[1] * q.shape[2]


class PrefixKV(NamedTuple):
    """Keys and values before a group: its clips' contexts, or those in a cache.

    Attributes:
        k, v: `[S, N, D]`, of one clip after another; S may be 0.
        prefix: which queries see which of them; None if S is 0.
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
    """Attention of every token to its own frame in full, to all earlier frames of its clip in the group, and to all of
    its clip's prefix keys.

    Args:
        q, k, v: `[T, N, D]`, the group's tokens in order; softmax scale 1/sqrt(D).
        group: of the tokens.
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
        raise ValueError(f"the prefix has {prefix.keys.starts[-1] if prefix else 0} prefix keys, got {len(prefix_k)}")
    name = choose_kernel(kernel, q.device, q.dtype, q.shape[-1]).name
    plan = AttentionPlan(group, prefix)
    out = attend(q, k, v, prefix_k, prefix_v, plan.handle, name)
    if out.grad_fn is not None:
        out.grad_fn.metadata["plan"] = plan  # type: ignore[index]  # alive until the backward, which looks it up
    return out
