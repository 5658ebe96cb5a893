"""Frame-block causal attention as torch operators, for torch.compile, selective checkpointing and FLOP counters.

    far_scale::frame_attention            q, k, v, handle, kernel -> out, lse
    far_scale::frame_attention_backward   the same, the output's gradient, out, lse -> all gradients

A compiled graph calls them for any pack: its only constant is the kernel's name, and the plan is looked up by its
handle (see `AttentionPlan`). All keys are in one tensor, and all values, so that no kernel has to concatenate them.

    shape letters   T tokens of the plan's group   K keys, those of its prefix first   N heads   D head dim
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from far_scale.model.attention import causal_pair, dense, flex, selection
from far_scale.model.attention.selection import choose_kernel
from far_scale.model.layout import AttentionPlan, FrameGroup, Prefix

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor handle, str kernel"


def attend(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str) -> Tensor:
    """Frame-block causal attention over the tokens of a plan.

    Args:
        q: `[T, N, D]`.
        k, v: `[K, N, D]`.
        handle: of an `AttentionPlan`.
        kernel: the name of a usable kernel (see `selection.choose_kernel`).

    Returns:
        `[T, N, D]`, differentiable in all tensors but the handle.
    """
    if kernel == flex.NAME:
        flex_out: Tensor = flex.attend(q, k, v, handle)
        return flex_out
    out: Tensor = torch.ops.far_scale.frame_attention(q, k, v, handle, kernel)[0]
    return out


def prepare(plan: AttentionPlan, device: torch.device, kernel: str) -> list[Tensor]:
    """Make all that attention over the plan by this kernel reads of it on `device`; returns the tensors."""
    if kernel == flex.NAME:
        return flex.prepare(plan, device)
    if kernel == dense.NAME:
        return dense.prepare(plan, device)
    return causal_pair.prepare(selection.get_kernel(kernel), plan, device)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, kernel: str) -> tuple[Tensor, Tensor]:
    """Attention by a kernel other than FlexAttention: out `[T, N, D]` and lse `[T, N]`, contiguous."""
    if not len(q):
        return torch.empty_like(q, memory_format=torch.contiguous_format), empty_lse(q)
    if kernel == dense.NAME:
        out, lse = dense.forward(q, k, v, plan)
    else:
        out, lse = causal_pair.forward(selection.get_kernel(kernel), q, k, v, plan)
    return out.contiguous(), lse.contiguous()


def backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, contiguous."""
    if not len(q):
        empty_gradients: tuple[Tensor, Tensor, Tensor] = _backward_shapes(dout, out, lse, q, k, v, plan.handle, kernel)
        return empty_gradients
    if kernel == dense.NAME:
        gradients = dense.backward(dout, q, k, v, out, lse, plan)
    else:
        gradients = causal_pair.backward(selection.get_kernel(kernel), dout, q, k, v, out, lse, plan)
    dq, dk, dv = (x.contiguous() for x in gradients)
    return dq, dk, dv


@torch.library.custom_op("far_scale::frame_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, AttentionPlan.find(handle), kernel)


@torch.library.custom_op(
    "far_scale::frame_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dout, out, lse, q, k, v, AttentionPlan.find(handle), kernel)


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), empty_lse(q)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def empty_lse(q: Tensor) -> Tensor:
    """An uninitialized log-sum-exp `[T, N]` for q."""
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd_backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.far_scale.frame_attention_backward(dout, *ctx.saved_tensors, ctx.kernel)
    return *gradients, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.far_scale.frame_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *_: Any, **__: Any) -> int:
    """Two products, scores and values, of 2 D FLOPs a pair and head."""
    return 2 * 2 * AttentionPlan.find(handle).pairs * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.far_scale.frame_attention_backward, get_raw=True)
def _backward_flops(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *_: Any, **__: Any
) -> int:
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
    plan = AttentionPlan(group, None if prefix_kv is None else prefix_kv.prefix)
    if prefix_kv is not None:
        if len(prefix_kv.k) != plan.first_key:
            raise ValueError(f"the prefix has {plan.first_key} prefix keys, got {len(prefix_kv.k)}")
        k, v = torch.cat([prefix_kv.k, k]), torch.cat([prefix_kv.v, v])
    name = choose_kernel(kernel, q.device, q.dtype, q.shape[-1]).name
    out = attend(q, k, v, plan.handle, name)
    if out.grad_fn is not None:
        out.grad_fn.metadata["plan"] = plan  # type: ignore[index]  # alive until the backward, which looks it up
    return out
