"""A kernel in plain PyTorch: what the libraries' kernels compute, on any device, in any precision, for any lengths.

Causal as flash-attn is: the last query sees the last key ('bottom right'). Weights are rounded to the inputs' dtype
before they meet the values, as in the libraries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from far_scale.model.layout import Spans

NAME, PACKAGE, INSTALL = "plain", "torch", ""


def unusable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, causal: bool) -> tuple[Tensor, Tensor]:
    """See `Kernel.forward`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for rows, key_rows in _sequences(queries, keys):
        scores = _scores(q[rows], k[key_rows], causal)
        lse[rows] = scores.logsumexp(-1).T
        out[rows] = torch.einsum("nqk,knd->qnd", scores.softmax(-1).to(q.dtype), v[key_rows])
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Spans, keys: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Kernel.backward`."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for rows, key_rows in _sequences(queries, keys):
        weights = (_scores(q[rows], k[key_rows], causal) - lse[rows].T[..., None]).exp()
        d_weights = torch.einsum("qnd,knd->nqk", dout[rows], v[key_rows]).to(weights.dtype)
        share = (dout[rows].to(weights.dtype) * out[rows].to(weights.dtype)).sum(-1).T[..., None]
        d_scores = (weights * (d_weights - share) * q.shape[-1] ** -0.5).to(q.dtype)
        dq[rows] = torch.einsum("nqk,knd->qnd", d_scores, k[key_rows])
        dk[key_rows] = torch.einsum("nqk,qnd->knd", d_scores, q[rows])
        dv[key_rows] = torch.einsum("nqk,qnd->knd", weights.to(q.dtype), dout[rows])
    return dq, dk, dv


def _sequences(queries: Spans, keys: Spans) -> Iterator[tuple[slice, slice]]:
    for i in range(len(queries.lengths)):
        yield slice(*queries.starts[i : i + 2]), slice(*keys.starts[i : i + 2])


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`[N, q, k]` in float32 or better."""
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qnd,knd->nqk", q.to(precise), k.to(precise)) * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores
