"""The oracle: attention with a dense mask, in any precision on any device. For tests, and where no kernel fits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from far_scale.layout import FrameGroup, Prefix
from far_scale.model.attention.earlier import Earlier


def dense_attention(q: Tensor, k: Tensor, v: Tensor, group: FrameGroup, earlier: Earlier | None = None) -> Tensor:
    """See `frame_attention`; memory and work grow with T (S + T) whatever the mask lets through."""
    mask = group.mask(q.device)
    if earlier is not None and earlier.prefix is not None:
        k, v = torch.cat([earlier.k, k]), torch.cat([earlier.v, v])
        mask = torch.cat([_prefix_mask(earlier.prefix, len(q), q.device), mask], dim=1)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.squeeze(0).transpose(0, 1)


def _prefix_mask(prefix: Prefix, tokens: int, device: torch.device) -> Tensor:
    """`[T, S]` bool, True where the window token (row) is of the context token's (column's) clip."""
    query_clip, key_clip = (
        torch.arange(len(spans.lengths), device=device).repeat_interleave(torch.tensor(spans.lengths, device=device))
        for spans in (prefix.queries, prefix.keys)
    )
    clip = torch.full((tokens,), -1, device=device)
    clip[slice(None) if prefix.rows is None else prefix.rows] = query_clip
    return clip[:, None] == key_clip[None, :]
