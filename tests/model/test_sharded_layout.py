"""How the ranks of a group share out the frames of a pack."""

from __future__ import annotations

import pytest
import torch

from far_scale.model import FARConfig
from far_scale.model.layout import FrameLayout
from far_scale.model.sharded_layout import SequenceRank, ShardedLayout, even_split

CPU = torch.device("cpu")


def test_parts_differ_by_one_at_most() -> None:
    assert even_split(18, 4) == (5, 5, 4, 4)
    assert even_split(3, 2) == (2, 1)
    assert even_split(1, 3) == (1, 0, 0)
    assert [SequenceRank(rank, 3).part(5) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 5)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("clip_frames", [(7, 2, 5), (1,), (3, 3), (9,)])
def test_the_ranks_hold_every_frame_once(clip_frames: tuple[int, ...], size: int) -> None:
    whole = FrameLayout.of(clip_frames, (4, 4), window=3, coarsening=2)
    shards = [ShardedLayout(whole, SequenceRank(rank, size)) for rank in range(size)]
    assert torch.cat([shard.rows for shard in shards]).sort().values.tolist() == list(range(whole.frames))
    for name in ("window", "context"):
        group, parts = getattr(whole, name), [getattr(shard.own, name) for shard in shards]
        counts = [part.frames for part in parts]
        assert sum(counts) == group.frames and max(counts) - min(counts) <= 1
        assert torch.equal(torch.cat([part.positions for part in parts]), group.positions)
        assert torch.equal(torch.cat([part.clip_of_frame(CPU) for part in parts]), group.clip_of_frame(CPU))
    for shard in shards:
        # The rank's frames are in the order of the pack, and its rows say which are the window's.
        own_rows = shard.rows[shard.own.window_rows(CPU)]
        assert torch.equal(own_rows, whole.window_rows(CPU)[shard.window_part])
        assert torch.equal(shard.own.clip_of_frame(CPU), whole.clip_of_frame(CPU)[shard.rows])
        plan = shard.plan(CPU)
        assert plan.key_tokens[1] == tuple(other.own.window.tokens for other in shards)
        assert plan.key_tokens[0] == tuple(other.own.context.tokens for other in shards)
        assert plan.pairs == whole.attended_pairs
        assert shard.window_plan(CPU).pairs == whole.window_pairs


def test_layers_are_compiled_where_no_rank_has_a_single_frame() -> None:
    config = FARConfig(layers=1, heads=2, window=4, context_patch=2)

    def compilable(*clip_frames: int) -> bool:
        layout = config.layout(clip_frames, (4, 4))
        found = {ShardedLayout(layout, SequenceRank(rank, 2)).plan(CPU).compilable for rank in range(2)}
        assert len(found) == 1, "the ranks must agree"
        return found.pop()

    assert compilable(8) and compilable(4)  # with and without a context
    assert not compilable(3)  # 2 + 1
    assert not compilable(7)  # context 2 + 1
    assert not compilable(5)  # context 1 + 0
