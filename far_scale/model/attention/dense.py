"""The oracle: attention with a dense mask, in any precision on any device. For tests, and where no kernel fits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from far_scale.layout import FrameLayout


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: FrameLayout) -> Tensor:
    """q, k, v `[T, N, D]` -> `[T, N, D]`; memory and work grow with T^2 whatever the mask lets through."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(q.device))
    return out.squeeze(0).transpose(0, 1)
