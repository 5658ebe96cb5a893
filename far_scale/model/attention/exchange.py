"""The exchange of sequence parallelism: from a rank's tokens with all heads to all tokens with the rank's heads.

One uneven all-to-all carries several tensors, which may differ in their numbers of tokens and channels. A tensor has
the tokens of one or more groups of frames, the context's before the window's. Each rank holds a part of each group.
Ranks without any tokens take part.

    shape letters   t tokens of this rank, T of all ranks   n heads of this rank, N all heads   C channels of a head
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from far_scale.model.sharded_layout import SequenceRank, even_split

GroupTokens = Sequence[Sequence[int]]
"""Of each group of frames, the number of tokens on each rank."""


def to_heads(tensors: Sequence[Tensor], tokens: Sequence[GroupTokens], shard: SequenceRank) -> list[Tensor]:
    """`[t, N, C]` of each rank's tokens -> `[T, n, C]`, contiguous.

    Args:
        tensors: of one dtype; C may differ.
        tokens: of each tensor.
        shard: this rank.

    Raises:
        ValueError: there are fewer heads than ranks.
    """
    heads = even_split(tensors[0].shape[1], shard.size)
    if not all(heads):
        raise ValueError(f"{sum(heads)} heads cannot be shared by {shard.size} ranks, at least one each")
    own = heads[shard.rank]
    if shard.group is None:
        return [x.contiguous() for x in tensors]
    sent = [[x[:, part] for x in tensors] for part in _slices(heads)]
    # Each rank's tensors arrive in the parts of the groups, so that one concatenation orders them.
    channels = [(x.shape[2], group) for x, groups in zip(tensors, tokens, strict=True) for group in groups]
    received = [[(group[rank], own, size) for size, group in channels] for rank in range(shard.size)]
    parts = zip(*_all_to_all(sent, received, shard), strict=True)  # of each tensor and group, those of all ranks
    return [torch.cat([part for _ in groups for part in next(parts)]) for groups in tokens]


def to_tokens(
    tensors: Sequence[Tensor], tokens: Sequence[GroupTokens], heads: int, shard: SequenceRank
) -> list[Tensor]:
    """`[T, n, C]` of each rank's heads -> `[t, N, C]`, contiguous: the inverse of `to_heads`.

    Args:
        heads: N.
    """
    if shard.group is None:
        return [x.contiguous() for x in tensors]
    pairs = list(zip(tensors, tokens, strict=True))
    # The parts of a rank: the first group's of all ranks come before the second's.
    slices = [_slices(list(itertools.chain(*groups))) for groups in tokens]
    sent = [
        [x[part] for x, parts in zip(tensors, slices, strict=True) for part in parts[rank :: shard.size]]
        for rank in range(shard.size)
    ]
    own = [(sum(group[shard.rank] for group in groups), x.shape[2]) for x, groups in pairs]
    received = [[(count, part, size) for count, size in own] for part in even_split(heads, shard.size)]
    by_rank = _all_to_all(sent, received, shard)
    return [torch.cat(pieces, dim=1) for pieces in zip(*by_rank, strict=True)]


def _slices(counts: Sequence[int]) -> list[slice]:
    return [slice(first, last) for first, last in itertools.pairwise((0, *itertools.accumulate(counts)))]


def _all_to_all(
    sent: list[list[Tensor]], received: list[list[tuple[int, int, int]]], shard: SequenceRank
) -> list[list[Tensor]]:
    """Send the tensors `sent[r]` to rank r, in one message; returns those from each rank, of the shapes `received`."""
    sizes = [sum(x.numel() for x in pieces) for pieces in sent]
    message = sent[0][0].new_empty(sum(sizes))
    # Written in place, so that the heads are picked out in the only copy.
    for place, piece in zip(
        message.split([piece.numel() for pieces in sent for piece in pieces]), itertools.chain(*sent), strict=True
    ):
        place.view(piece.shape).copy_(piece)
    elements = [[a * b * c for a, b, c in shapes] for shapes in received]
    incoming = message.new_empty(sum(map(sum, elements)))
    dist.all_to_all_single(incoming, message, list(map(sum, elements)), sizes, group=shard.group)
    parts = iter(incoming.split(list(itertools.chain(*elements))))
    return [[next(parts).view(shape) for shape in shapes] for shapes in received]


class ToHeads(torch.autograd.Function):
    """`to_heads`, differentiable: `apply(shard, tokens, *tensors)`."""

    @staticmethod
    def forward(ctx: Any, shard: SequenceRank, tokens: Sequence[GroupTokens], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shard, ctx.tokens, ctx.heads = shard, tokens, tensors[0].shape[1]
        return tuple(to_heads(tensors, tokens, shard))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *to_tokens([x.contiguous() for x in gradients], ctx.tokens, ctx.heads, ctx.shard)


class ToTokens(torch.autograd.Function):
    """`to_tokens`, differentiable: `apply(shard, tokens, heads, *tensors)`."""

    @staticmethod
    def forward(
        ctx: Any, shard: SequenceRank, tokens: Sequence[GroupTokens], heads: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shard, ctx.tokens = shard, tokens
        return tuple(to_tokens(tensors, tokens, heads, shard))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *to_heads(gradients, ctx.tokens, ctx.shard)
