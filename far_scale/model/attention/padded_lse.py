"""Log-sum-exps between our layout, token after token, and the padded one of some libraries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from far_scale.model.layout import Spans


@functools.lru_cache(maxsize=64)  # a layer asks for the same as the layer before
def _rows(spans: Spans, width: int, device: torch.device) -> Tensor:
    """`[T]` int64: where each token stands among `sequences * width` padded ones."""
    lengths = torch.tensor(spans.lengths)
    padding_before = torch.arange(len(lengths)) * width - torch.tensor(spans.starts[:-1])
    return (torch.arange(spans.starts[-1]) + padding_before.repeat_interleave(lengths)).to(device)


def unpad(lse: Tensor, spans: Spans) -> Tensor:
    """`[sequences, N, width]`, width at least the longest sequence -> `[T, N]`."""
    return lse.transpose(1, 2).flatten(0, 1).index_select(0, _rows(spans, lse.shape[2], lse.device))


def pad(lse: Tensor, spans: Spans, width: int) -> Tensor:
    """`[T, N]` -> `[sequences, N, width]`, filled up with infinity, which gives weights of exp(s - inf) = 0."""
    padded = lse.new_full((len(spans.lengths) * width, lse.shape[1]), torch.inf)
    padded.index_copy_(0, _rows(spans, width, lse.device), lse)
    return padded.unflatten(0, (-1, width)).transpose(1, 2).contiguous()
