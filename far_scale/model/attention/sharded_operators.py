"""Attention under sequence parallelism as torch operators: the exchange of frames for heads is inside them.

    far_scale::sharded_attention            q, k, v of window and context, handle, kernel -> out, lse of both
    far_scale::sharded_attention_backward   the same, the outputs' gradients, out, lse of both -> all gradients

All tensors are of the rank's own tokens with all heads, so that shapes depend on nothing else. A rank keeps no more
than these for the backward, which exchanges them again. Window and context go through one operator: each block has one,
which depends on that of the block before, so the ranks exchange in the same order however the compiler arranges the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from far_scale.model.attention import flex, operators
from far_scale.model.attention.exchange import ToHeads, ToTokens, to_heads, to_tokens
from far_scale.model.layout import AttentionPlan, FrameLayout
from far_scale.model.sharded_layout import ShardedLayout, ShardedPlan

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? context_q, Tensor? context_k, Tensor? context_v, Tensor handle, str kernel"
)


def prepare(layout: FrameLayout | ShardedLayout, device: torch.device, kernel: str) -> list[Tensor]:
    """Make all that a model's forward and backward over a pack read of its layout on `device`.

    On a GPU it is copied from pinned memory on the current stream, and nothing waits. Another stream that reads it must
    wait for this one, and be named to the tensors by `record_stream`.

    Args:
        kernel: name of the attention kernel.

    Returns:
        All its tensors, also those that were there before.
    """
    if isinstance(layout, ShardedLayout):
        plans = layout.plan.window, layout.plan.context
    else:
        plans = layout.window_plan, layout.context_plan
    tensors = layout.tensors(device)
    for plan in plans:
        tensors += operators.prepare(plan, device, kernel)
    return tensors


def attend_sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    handle: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor | None]:
    """Attention over a pack whose frames the ranks of a group share; all of them call it together.

    Args:
        q, k, v: `[T, N, D]` of the window frames that this rank holds; T may be 0.
        context_q, context_k, context_v: `[S, N, D]` of its context frames, S may be 0; None in a model without context,
            and `context_q` where the context only gives keys and values.
        handle: of a `ShardedPlan`.
        kernel: see `operators.attend`.

    Returns:
        `[T, N, D]` of the window and `[S, N, D]` of the context, None without `context_q`.
    """
    if kernel == flex.NAME:
        flex_outs: tuple[Tensor, Tensor | None] = _attend_by_flex(
            q, k, v, context_q, context_k, context_v, handle, kernel
        )
        return flex_outs
    out, _, context_out, _ = torch.ops.far_scale.sharded_attention(
        q, k, v, context_q, context_k, context_v, handle, kernel
    )
    return out, None if context_q is None else context_out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    handle: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention is differentiated by autograd, so here the exchanges are autograd functions around it."""
    plan, heads = _find(handle), q.shape[1]
    tensors = [x for x in (q, k, v, context_q, context_k, context_v) if x is not None]
    tokens = _tokens(plan, 3, len(tensors) - 3)
    q, k, v, *context = ToHeads.apply(plan.shard, tokens, *tensors)  # type: ignore[no-untyped-call]
    prefix_k, prefix_v = context[-2:] if context else (None, None)
    # Its block masks are kept with the plans of the pack's layout, which outlive this one.
    outs = [flex.attend(q, k, v, prefix_k, prefix_v, plan.window.handle)]
    if context_q is not None:
        outs.append(flex.attend(*context, None, None, plan.context.handle))
    tokens = _tokens(plan, 1, len(outs) - 1)
    out, *context_outs = ToTokens.apply(plan.shard, tokens, heads, *outs)  # type: ignore[no-untyped-call]
    return out, context_outs[0] if context_outs else None


@torch.library.custom_op(
    "far_scale::sharded_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    handle: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, heads = _find(handle), q.shape[1]
    tensors = [x for x in (q, k, v, context_q, context_k, context_v) if x is not None]
    whole_q, whole_k, whole_v, *context = to_heads(tensors, _tokens(plan, 3, len(tensors) - 3), plan.shard)
    prefix_k, prefix_v = context[-2:] if context else (None, None)
    out, lse = operators.forward(whole_q, whole_k, whole_v, prefix_k, prefix_v, plan, kernel)
    outs = [out, _as_channels(lse, q.dtype)]
    if context_q is not None:
        whole_q, whole_k, whole_v = context
        context_out, context_lse = operators.forward(whole_q, whole_k, whole_v, None, None, plan.context, kernel)
        outs += [context_out, _as_channels(context_lse, q.dtype)]
    out, lse, *context_outs = to_tokens(outs, _tokens(plan, 2, len(outs) - 2), heads, plan.shard)
    if context_q is None:
        return out, _from_channels(lse), q.new_empty(0), q.new_empty(0)
    context_out, context_lse = context_outs
    return out, _from_channels(lse), context_out, _from_channels(context_lse)


@torch.library.custom_op(
    "far_scale::sharded_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor context_dout, Tensor out, Tensor lse, Tensor context_out, Tensor context_lse, "
    f"{_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor, context_dout: Tensor, out: Tensor, lse: Tensor, context_out: Tensor, context_lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor,
    context_q: Tensor | None, context_k: Tensor | None, context_v: Tensor | None, handle: Tensor, kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan, heads = _find(handle), q.shape[1]
    window = [dout, out, _as_channels(lse, q.dtype), q, k, v]
    context = [x for x in (context_q, context_k, context_v) if x is not None]
    if context_q is not None:
        context = [context_dout, context_out, _as_channels(context_lse, q.dtype), *context]
    exchanged = to_heads([*window, *context], _tokens(plan, len(window), len(context)), plan.shard)
    dout, out, lse, q, k, v, *context = exchanged
    prefix_k, prefix_v = context[-2:] if context else (None, None)
    dq, dk, dv, prefix_dk, prefix_dv = operators.backward(
        dout, out, _from_channels(lse), q, k, v, prefix_k, prefix_v, plan, kernel
    )
    gradients = [dq, dk, dv]
    if context_q is not None:
        dout, out, lse, q, k, v = context
        context_dq, context_dk, context_dv, _, _ = operators.backward(
            dout, out, _from_channels(lse), q, k, v, None, None, plan.context, kernel
        )
        gradients += [context_dq, context_dk + prefix_dk, context_dv + prefix_dv]
    elif context:
        gradients += [prefix_dk, prefix_dv]
    gradients = to_tokens(gradients, _tokens(plan, 3, len(gradients) - 3), heads, plan.shard)
    dq, dk, dv, *rest = gradients
    rest = [dq.new_empty(0) for _ in range(3 - len(rest))] + rest
    return dq, dk, dv, rest[0], rest[1], rest[2]


@_forward.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    handle: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = [torch.empty_like(q, memory_format=torch.contiguous_format), operators.empty_lse(q)]
    if context_q is None:
        return outs[0], outs[1], q.new_empty(0), q.new_empty(0)
    context_out = torch.empty_like(context_q, memory_format=torch.contiguous_format)
    return outs[0], outs[1], context_out, operators.empty_lse(context_q)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor, context_dout: Tensor, out: Tensor, lse: Tensor, context_out: Tensor, context_lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor,
    context_q: Tensor | None, context_k: Tensor | None, context_v: Tensor | None, handle: Tensor, kernel: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, context_q, context_k, context_v)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd_backward(ctx: Any, dout: Tensor, _: Tensor, context_dout: Tensor, __: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    gradients = torch.ops.far_scale.sharded_attention_backward(dout, context_dout, *saved, ctx.kernel)
    inputs = saved[4:10]
    return *(None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)), None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.far_scale.sharded_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, context_q: Any, *others: Any, **__: Any) -> int:
    """As for `frame_attention`, with the heads of this rank."""
    return 2 * 2 * _products(q, context_q, others[-2])


@register_flop_formula(torch.ops.far_scale.sharded_attention_backward, get_raw=True)
def _backward_flops(*inputs: Any, **__: Any) -> int:
    return 5 * 2 * _products(inputs[6], inputs[9], inputs[12])


def _products(q: Tensor, context_q: Tensor | None, handle: Tensor) -> int:
    """Multiply-adds of one product of scores or values, on this rank."""
    plan = _find(handle)
    part = plan.shard.part(q.shape[1])
    pairs = plan.pairs + (0 if context_q is None else plan.context.pairs)
    return int(pairs * (part.stop - part.start) * q.shape[2])


def _find(handle: Tensor) -> ShardedPlan:
    plan = AttentionPlan.find(handle)
    assert isinstance(plan, ShardedPlan), "sharded attention takes the handle of a sharded plan"
    return plan


def _tokens(plan: ShardedPlan, window: int, context: int) -> Sequence[Sequence[int]]:
    """The tokens on each rank of so many tensors of the window and of the context."""
    return [plan.window_tokens] * window + [plan.context_tokens] * context


def _as_channels(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """A log-sum-exp `[T, N]` as channels `[T, N, 1 or 2]` of another dtype, with the same bits."""
    return lse.contiguous().unsqueeze(-1).view(dtype)


def _from_channels(lse: Tensor) -> Tensor:
    """The inverse of `_as_channels`."""
    return lse.view(torch.promote_types(lse.dtype, torch.float32)).squeeze(-1)
