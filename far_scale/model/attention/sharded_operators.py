"""Attention under sequence parallelism as torch operators: the exchange of frames for heads is inside them.

    far_scale::sharded_attention            q, k, v, handle, kernel -> out, lse
    far_scale::sharded_attention_backward   the same, the output's gradient, out, lse -> all gradients

All tensors are of the rank's own tokens with all heads, so that shapes depend on nothing else. A rank keeps no more
than these for the backward, which exchanges them again. Window and context go through one operator, so keys and values
of the context, which both see, are sent once. Each block has one operator, which depends on that of the block before,
so the ranks exchange in the same order however the compiler arranges the rest.

    shape letters   T, K tokens of this rank among the plan's queries and keys   N heads   D head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from far_scale.model.attention import flex, operators
from far_scale.model.attention.exchange import ToHeads, ToTokens, to_heads, to_tokens
from far_scale.model.layout import AttentionPlan
from far_scale.model.sharded_layout import ShardedPlan

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor handle, str kernel"


def attend_sharded(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str) -> Tensor:
    """Attention over a pack whose frames the ranks of a group share; all of them call it together.

    Args:
        q: `[T, N, D]`; T may be 0.
        k, v: `[K, N, D]`, the context's first.
        handle: of a `ShardedPlan`.
        kernel: see `operators.attend`.

    Returns:
        `[T, N, D]`.
    """
    if kernel == flex.NAME:
        flex_out: Tensor = _attend_by_flex(q, k, v, handle)
        return flex_out
    out: Tensor = torch.ops.far_scale.sharded_attention(q, k, v, handle, kernel)[0]
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_flex(q: Tensor, k: Tensor, v: Tensor, handle: Tensor) -> Tensor:
    """FlexAttention is differentiated by autograd, so here the exchanges are autograd functions around it."""
    plan, heads = _find(handle), q.shape[1]
    tokens = [plan.query_tokens, plan.key_tokens, plan.key_tokens]
    q, k, v = ToHeads.apply(plan.shard, tokens, q, k, v)  # type: ignore[no-untyped-call]
    # Its block mask is kept with the plan of the pack's layout, which outlives this one.
    out = flex.attend(q, k, v, plan.whole.handle)
    own: Tensor = ToTokens.apply(plan.shard, tokens[:1], heads, out)[0]  # type: ignore[no-untyped-call]
    return own


@torch.library.custom_op("far_scale::sharded_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    plan, heads, dtype = _find(handle), q.shape[1], q.dtype
    q, k, v = to_heads([q, k, v], [plan.query_tokens, plan.key_tokens, plan.key_tokens], plan.shard)
    out, lse = operators.forward(q, k, v, plan.whole, kernel)
    out, lse = to_tokens([out, _as_channels(lse, dtype)], [plan.query_tokens] * 2, heads, plan.shard)
    return out, _from_channels(lse)


@torch.library.custom_op(
    "far_scale::sharded_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    plan, heads = _find(handle), q.shape[1]
    of_queries, of_keys = [dout, out, _as_channels(lse, q.dtype), q], [k, v]
    tokens = [plan.query_tokens] * len(of_queries) + [plan.key_tokens] * len(of_keys)
    dout, out, lse, q, k, v = to_heads([*of_queries, *of_keys], tokens, plan.shard)
    gradients = operators.backward(dout, out, _from_channels(lse), q, k, v, plan.whole, kernel)
    dq, dk, dv = to_tokens(gradients, [plan.query_tokens, plan.key_tokens, plan.key_tokens], heads, plan.shard)
    return dq, dk, dv


@_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), operators.empty_lse(q)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, kernel: str
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd_backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.far_scale.sharded_attention_backward(dout, *ctx.saved_tensors, ctx.kernel)
    return *gradients, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.far_scale.sharded_attention, get_raw=True)
def _forward_flops(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *_: Any, **__: Any) -> int:
    """As for `frame_attention`, with the heads of this rank."""
    return 2 * 2 * _products(q, handle)


@register_flop_formula(torch.ops.far_scale.sharded_attention_backward, get_raw=True)
def _backward_flops(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *_: Any, **__: Any
) -> int:
    return 5 * 2 * _products(q, handle)


def _products(q: Tensor, handle: Tensor) -> int:
    """Multiply-adds of one product of scores or values, on this rank."""
    plan = _find(handle)
    part = plan.shard.part(q.shape[1])
    return int(plan.pairs * (part.stop - part.start) * q.shape[2])


def _find(handle: Tensor) -> ShardedPlan:
    plan = AttentionPlan.find(handle)
    assert isinstance(plan, ShardedPlan), "sharded attention takes the handle of a sharded plan"
    return plan


def _as_channels(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """A log-sum-exp `[T, N]` as channels `[T, N, 1 or 2]` of another dtype, with the same bits."""
    return lse.contiguous().unsqueeze(-1).view(dtype)


def _from_channels(lse: Tensor) -> Tensor:
    """The inverse of `_as_channels`."""
    return lse.view(torch.promote_types(lse.dtype, torch.float32)).squeeze(-1)
