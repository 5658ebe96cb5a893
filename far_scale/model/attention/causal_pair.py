"""Frame-block causality from ordinary attention calls, exact in forward and backward.

Let a group's tokens be in frame order. The keys that query t of frame f may see are

    {keys <= t}                               one causal call; the sequences are the clips
    + {keys of the same frame that are > t}   one causal call over reversed frames; the sequences are the frames
    + {the clip's prefix keys}               if there are any, one call without a mask; the sequences are the clips

With a pack's context and window in one group, each of the first two calls has the sequences of both.

(A group that is not causal needs one call without a mask instead of the first two.)

The sets are disjoint, so their softmaxes merge by the log-sum-exps l1, l2 (the rule of split attention, as in
FlashDecoding): l = logaddexp(l1, l2), o = o1 exp(l1 - l) + o2 exp(l2 - l). Backward, a flash kernel computes
P = exp(s - l) and rowsum(dO * O) from the given l and O. With the merged ones, each call yields exactly the
gradients of its own pairs, which add up.

    shape letters   T tokens of the group   K keys, those of the prefix first   N heads   D head dim
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from far_scale.model.attention.kernel import Kernel
from far_scale.model.layout import AttentionPlan, Prefix


def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """q `[T, N, D]`, k, v `[K, N, D]` -> out `[T, N, D]`, lse `[T, N]` (natural log)."""
    clips, upper, prefix = plan.group.clips, plan.group.upper_triangle(q.device), plan.prefix
    all_k, all_v, k, v = k, v, k[plan.first_key :], v[plan.first_key :]
    out, lse = kernel.forward(q, k, v, clips, clips, causal=plan.group.causal)
    if upper is not None:
        rows, spans = upper.queries, upper.spans
        (upper_q,), (upper_k, upper_v) = _rows(rows, q), _rows(upper.keys, k, v)
        part = kernel.forward(upper_q, upper_k, upper_v, spans, spans, causal=True)
        _merge(out, lse, rows, *part)
    if prefix is not None:
        first, seen = _first_row(prefix, len(q)), slice(prefix.keys.starts[-1])
        (seen_q,) = _rows(prefix.rows, q[first:])
        part = kernel.forward(seen_q, all_k[seen], all_v[seen], prefix.queries, prefix.keys, causal=False)
        _merge(out[first:], lse[first:], prefix.rows, *part)
    return out, lse


def backward(
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q `[T, N, D]`, k, v `[K, N, D]`."""
    clips, upper, prefix = plan.group.clips, plan.group.upper_triangle(q.device), plan.prefix
    all_k, all_v, k, v = k, v, k[plan.first_key :], v[plan.first_key :]
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, clips, clips, causal=plan.group.causal)
    if upper is not None:
        rows, keys, spans = upper.queries, upper.keys, upper.spans
        upper_dout, upper_q, upper_out, upper_lse = _rows(rows, dout, q, out, lse)
        upper_k, upper_v = _rows(keys, k, v)
        upper_dq, upper_dk, upper_dv = kernel.backward(
            upper_dout, upper_q, upper_k, upper_v, upper_out, upper_lse, spans, spans, causal=True
        )
        # Within a call no row comes twice, so the additions need no atomics and their order is fixed.
        _add(dq, rows, upper_dq)
        _add(dk, keys, upper_dk)
        _add(dv, keys, upper_dv)
    if prefix is None:
        return dq, dk, dv
    first, seen = _first_row(prefix, len(q)), slice(prefix.keys.starts[-1])
    seen_dout, seen_q, seen_out, seen_lse = _rows(prefix.rows, *(x[first:] for x in (dout, q, out, lse)))
    prefix_dq, prefix_dk, prefix_dv = kernel.backward(
        seen_dout, seen_q, all_k[seen], all_v[seen], seen_out, seen_lse, prefix.queries, prefix.keys, causal=False
    )
    _add(dq[first:], prefix.rows, prefix_dq)
    if plan.first_key:
        return dq, torch.cat([prefix_dk, dk]), torch.cat([prefix_dv, dv])
    _add(dk[seen], None, prefix_dk)
    _add(dv[seen], None, prefix_dv)
    return dq, dk, dv


def _first_row(prefix: Prefix, tokens: int) -> int:
    """The first of the last rows that see the prefix, where no row numbers say which do."""
    return 0 if prefix.rows is not None else tokens - prefix.queries.starts[-1]


_Function = TypeVar("_Function", bound=Callable[..., object])


def _one_pass(function: _Function) -> _Function:
    """Compile a function for GPUs into one pass over memory; uncompiled, it takes longer than the attention kernels."""

    @functools.cache
    def compiled() -> Callable[..., object]:
        return torch.compile(function, dynamic=True)  # at its first use: this loads the compiler, for a second

    @functools.wraps(function)
    def run(*args: Tensor | None) -> object:
        on_gpu = any(x is not None and x.is_cuda for x in args)
        return (compiled() if on_gpu else function)(*args)

    return cast(_Function, run)


@_one_pass
def _rows(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The given rows of each tensor `[T, ...]`; all for None."""
    # index_select is four times as fast as x[rows] on a CPU
    return tensors if rows is None else tuple(x.index_select(0, rows) for x in tensors)


@_one_pass
def _add(x: Tensor, rows: Tensor | None, part: Tensor) -> None:
    """Add `part` to the given rows of x, in place; to all for None."""
    if rows is None:
        x += part
    else:
        x.index_copy_(0, rows, x.index_select(0, rows) + part)


@_one_pass
def _merge(out: Tensor, lse: Tensor, rows: Tensor | None, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge attention over more keys into the given rows (None: all) of out `[T, N, D]` and lse `[T, N]`, in place."""
    seen_out, seen_lse = (out, lse) if rows is None else (out.index_select(0, rows), lse.index_select(0, rows))
    merged_lse = torch.logaddexp(seen_lse, part_lse)
    seen_weight = (seen_lse - merged_lse).exp().unsqueeze(-1)
    part_weight = (part_lse - merged_lse).exp().unsqueeze(-1)
    merged = (seen_out * seen_weight + part_out * part_weight).to(out.dtype)
    if rows is None:
        out.copy_(merged)
        lse.copy_(merged_lse)
    else:
        out.index_copy_(0, rows, merged)
        lse.index_copy_(0, rows, merged_lse)
