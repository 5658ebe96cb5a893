"""The reference: attention with a dense mask, in any precision on any device. For tests, and where no kernel fits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """q `[T, N, D]`, k, v `[K, N, D]` -> out `[T, N, D]`, lse `[T, N]`.

    Memory and work grow with T K, whatever the mask.
    """
    scores = _scores(q, k, plan)
    lse = scores.logsumexp(-1)
    out = torch.einsum("ntk,knd->tnd", (scores - lse.unsqueeze(-1)).exp().to(q.dtype), v)
    return out, lse.T


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v."""
    weights = (_scores(q, k, plan) - lse.T.unsqueeze(-1)).exp()  # [N, T, K]
    d_weights = torch.einsum("tnd,knd->ntk", dout, v).to(weights.dtype)
    row_sum = (dout * out).sum(-1, dtype=weights.dtype).T.unsqueeze(-1)  # [N, T, 1]
    d_scores = (weights * (d_weights - row_sum) * q.shape[-1] ** -0.5).to(q.dtype)
    dq = torch.einsum("ntk,knd->tnd", d_scores, k)
    dk = torch.einsum("ntk,tnd->knd", d_scores, q)
    dv = torch.einsum("ntk,tnd->knd", weights.to(q.dtype), dout)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, plan: AttentionPlan) -> Tensor:
    """`[N, T, K]` in float32 or better, -inf where the mask forbids."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores: Tensor = torch.einsum("tnd,knd->ntk", q.to(precise), k.to(precise)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask(plan, q.device), -torch.inf)


def mask(plan: AttentionPlan, device: torch.device) -> Tensor:
    """`[T, K]` bool, True where the query (row) may see the key (column), the prefix's keys first."""
    mask = F.pad(plan.group.mask(device), (plan.first_key, 0))
    if (prefix := plan.prefix) is not None:
        mask[:, : prefix.keys.starts[-1]] |= _prefix_mask(prefix, len(mask), device)
    return mask


def _prefix_mask(prefix: Prefix, tokens: int, device: torch.device) -> Tensor:
    query_clip, key_clip = (spans.sequence_of_token(device) for spans in (prefix.queries, prefix.keys))
    clip, rows = torch.full((tokens,), -1, device=device), prefix.rows_on(device)
    clip[slice(tokens - len(query_clip), None) if rows is None else rows] = query_clip
    return clip[:, None] == key_clip[None, :]
