"""The reference: attention with a dense mask, in any precision on any device. For tests, and where no kernel fits."""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.model.layout import AttentionPlan, Prefix

NAME = "dense"


def prepare(plan: AttentionPlan, device: torch.device) -> list[Tensor]:
    """Make all that the mask is computed from on `device`; returns the tensors."""
    spans, tensors = [plan.group.frame_spans, plan.group.clips], []
    if plan.prefix is not None:
        spans += [plan.prefix.queries, plan.prefix.keys]
        tensors += [] if (rows := plan.prefix.rows_on(device)) is None else [rows]
    return [*tensors, *(each.sequence_of_token(device) for each in spans)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    """q, k, v `[T, N, D]`, prefix keys and values `[S, N, D]` -> out `[T, N, D]`, lse `[T, N]`.

    Memory and work grow with T (S + T), whatever the mask.
    """
    keys, values = _all_keys(k, v, prefix_k, prefix_v, plan)
    scores = _scores(q, keys, plan)
    lse = scores.logsumexp(-1)
    out = torch.einsum("ntk,knd->tnd", (scores - lse.unsqueeze(-1)).exp().to(q.dtype), values)
    return out, lse.T


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of q, k, v and, with a prefix, of prefix keys and values."""
    keys, values = _all_keys(k, v, prefix_k, prefix_v, plan)
    weights = (_scores(q, keys, plan) - lse.T.unsqueeze(-1)).exp()  # [N, T, S + T]
    d_weights = torch.einsum("tnd,knd->ntk", dout, values).to(weights.dtype)
    row_sum = (dout * out).sum(-1, dtype=weights.dtype).T.unsqueeze(-1)  # [N, T, 1]
    d_scores = (weights * (d_weights - row_sum) * q.shape[-1] ** -0.5).to(q.dtype)
    dq = torch.einsum("ntk,knd->tnd", d_scores, keys)
    d_keys = torch.einsum("ntk,tnd->knd", d_scores, q)
    d_values = torch.einsum("ntk,tnd->knd", weights.to(q.dtype), dout)
    if plan.prefix is None:
        return dq, d_keys, d_values, None, None
    prefix = len(keys) - len(k)
    # Copies of the one part: an operator's outputs must not share memory, as these would with a single head.
    return dq, d_keys[prefix:], d_values[prefix:], d_keys[:prefix].clone(), d_values[:prefix].clone()


def _all_keys(
    k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, plan: AttentionPlan
) -> tuple[Tensor, Tensor]:
    if plan.prefix is None:
        return k, v
    assert prefix_k is not None and prefix_v is not None
    return torch.cat([prefix_k, k]), torch.cat([prefix_v, v])


def _scores(q: Tensor, keys: Tensor, plan: AttentionPlan) -> Tensor:
    """`[N, T, S + T]` in float32 or better, -inf where the mask forbids."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores: Tensor = torch.einsum("tnd,knd->ntk", q.to(precise), keys.to(precise)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask(plan, q.device), -torch.inf)


def mask(plan: AttentionPlan, device: torch.device) -> Tensor:
    """`[T, S + T]` bool, True where the query (row) may see the key (column), the prefix's keys first."""
    group = plan.group.mask(device)
    return group if plan.prefix is None else torch.cat([_prefix_mask(plan.prefix, len(group), device), group], dim=1)


def _prefix_mask(prefix: Prefix, tokens: int, device: torch.device) -> Tensor:
    query_clip, key_clip = (spans.sequence_of_token(device) for spans in (prefix.queries, prefix.keys))
    clip, rows = torch.full((tokens,), -1, device=device), prefix.rows_on(device)
    clip[slice(None) if rows is None else rows] = query_clip
    return clip[:, None] == key_clip[None, :]
