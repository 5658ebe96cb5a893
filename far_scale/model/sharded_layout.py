"""Sequence parallelism: the ranks of a group hold different frames of the same packs.

Whole frames are shared out, of the window and of the context separately, so that a rank's numbers of frames differ from
another's by one at most. All but attention is computed frame by frame. For attention the ranks exchange frames for
heads (Ulysses, arXiv 2309.14509): each attends over the whole pack with some of the heads, whose numbers also differ by
one at most.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from far_scale.model.layout import AttentionPlan, FrameGroup, FrameLayout


def even_split(count: int, parts: int) -> tuple[int, ...]:
    """`count` as the sizes of `parts` parts, which differ by one at most; the larger ones come first."""
    return tuple(count // parts + (part < count % parts) for part in range(parts))


@dataclass(frozen=True)
class SequenceRank:
    """This process among those that share its packs.

    Attributes:
        rank: in the group.
        size: ranks of the group.
        group: over which they exchange; None for one rank.
    """

    rank: int
    size: int
    group: Any = None

    def part(self, count: int) -> slice:
        """This rank's part of `count` things that are shared out by `even_split`."""
        ends = (0, *itertools.accumulate(even_split(count, self.size)))
        return slice(ends[self.rank], ends[self.rank + 1])


class ShardedPlan(AttentionPlan):
    """The attention of a whole pack, to which each rank of a group brings the tokens of its frames.

    Attributes:
        whole: the same attention on one rank, of the pack's layout.
        shard: this rank.
        query_tokens, key_tokens: those that each rank brings, of the context (where it has queries) and of the window.
        compilable: whether no rank has so few frames that the compiler would specialize on their number.
    """

    def __init__(self, whole: AttentionPlan, layout: FrameLayout, shard: SequenceRank) -> None:
        super().__init__(whole.group, whole.prefix, prefix_in_group=whole.first_key == 0)
        self.whole, self.shard = whole, shard
        self.key_tokens = tuple(_tokens(group, shard) for group in (layout.context, layout.window))
        self.query_tokens = self.key_tokens[1:] if whole.group is layout.window else self.key_tokens
        frames = [even_split(group.frames, shard.size) for group in (layout.window, layout.context) if group.frames]
        self.compilable = min(map(min, frames)) > 1


def _tokens(group: FrameGroup, shard: SequenceRank) -> tuple[int, ...]:
    parts = (SequenceRank(rank, shard.size).part(group.frames) for rank in range(shard.size))
    return tuple(sum(group.frame_tokens[part]) for part in parts)


class ShardedLayout:
    """The frames of a pack that one rank of a group holds.

    Attributes:
        whole: layout of the pack.
        shard: the rank.
    """

    def __init__(self, whole: FrameLayout, shard: SequenceRank) -> None:
        self.whole, self.shard = whole, shard

    @property
    def clip_frames(self) -> tuple[int, ...]:
        """`[B]` frames of each clip of the pack, on all ranks."""
        return self.whole.clip_frames

    @cached_property
    def own(self) -> FrameLayout:
        """The rank's frames. A clip may have none."""
        window, context = (_slice(group, self.shard) for group in (self.whole.window, self.whole.context))
        clip_frames = tuple(map(sum, zip(window.clip_frames, context.clip_frames, strict=True)))
        return FrameLayout(clip_frames, window, context)

    @cached_property
    def rows(self) -> Tensor:
        """`[F]` int64 on the CPU: indices of the rank's frames in the pack."""
        device = torch.device("cpu")
        window = self.whole.window_rows(device)[self.window_part]
        context = self.whole.context_rows(device)[self.shard.part(self.whole.context.frames)]
        return torch.cat([window, context]).sort().values

    @property
    def window_part(self) -> slice:
        """The rank's frames among those of the pack's window group."""
        return self.shard.part(self.whole.window.frames)

    @cached_property
    def plan(self) -> ShardedPlan:
        """See `FrameLayout.plan`."""
        return ShardedPlan(self.whole.plan, self.whole, self.shard)

    @cached_property
    def window_plan(self) -> ShardedPlan:
        """See `FrameLayout.window_plan`."""
        return ShardedPlan(self.whole.window_plan, self.whole, self.shard)

    def tensors(self, device: torch.device) -> list[Tensor]:
        """See `FrameLayout.tensors`."""
        return self.own.tensors(device)


def _slice(group: FrameGroup, shard: SequenceRank) -> FrameGroup:
    """The group's frames on a rank."""
    part = shard.part(group.frames)
    ends = list(itertools.accumulate(group.clip_frames))
    clip_frames = tuple(
        max(0, min(part.stop, end) - max(part.start, end - count))
        for count, end in zip(group.clip_frames, ends, strict=True)
    )
    first = sum(group.frame_tokens[: part.start])
    frame_tokens = group.frame_tokens[part]
    positions = group.positions[first : first + sum(frame_tokens)]
    return FrameGroup(clip_frames, frame_tokens, positions, group.causal)
