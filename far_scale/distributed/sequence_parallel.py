"""The groups of sequence parallelism: consecutive ranks that train on the same packs, each on its frames of them.

A lane belongs to a group, as to a rank without sequence parallelism. All ranks of a group read the same packs and draw
the same noise, so that nothing is broadcast; far_scale/model/sharded_layout.py says how a pack is shared out.

ZeRO shards over all ranks and averages gradients over all of them, and the loss of a rank is scaled accordingly, see
`pack_loss` in far_scale/train/flow_matching.py. DeepSpeed's own sequence groups are not used: its reduce-scatter of
stage 3 ignores their size (0.19.8), so that gradients would be too small by this factor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from far_scale.data.loader.pack_loader import Pack
from far_scale.distributed.process_group import Processes
from far_scale.model.layers import HEAD_DIM
from far_scale.model.layout import FrameLayout
from far_scale.model.sharded_layout import SequenceRank, even_split
from far_scale.utils.errors import UserError
from far_scale.utils.hosts import rank_list

_MAX_GROUPS_SHOWN = 4


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share this rank's packs.

    Attributes:
        index: of the group, from 0.
        count: groups of the run.
        shard: this rank in its group; None if each rank has packs of its own.
        host_group: the group over gloo, for CPU tensors.
    """

    index: int
    count: int
    shard: SequenceRank | None = None
    host_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return 1 if self.shard is None else self.shard.size

    @property
    def reports(self) -> bool:
        """Whether this rank reports what all ranks of the group see in the same way."""
        return self.shard is None or self.shard.rank == 0

    def lanes(self, count: int) -> list[int]:
        """The group's lanes, of `count` in all."""
        return list(range(self.index, count, self.count))

    def check_same_packs(self, packs: Sequence[Pack], step: int) -> None:
        """Check that all ranks of the group have read the same clips; all of them call it.

        Raises:
            UserError: on all ranks of the group: they have not, so that the frames of different clips would be mixed.
        """
        if self.shard is None:
            return
        text = repr([(pack.lane, pack.step, pack.keys, pack.clip_frames) for pack in packs])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        extremes = torch.tensor([number, -number])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.host_group)
        if extremes[0] != -extremes[1]:
            first = self.index * self.size
            raise UserError(
                f"step {step}: {rank_list(range(first, first + self.size))} share packs (train.sequence_parallel) but "
                "have read different clips; a sample may be damaged in one node's copy of the shards only: compare the "
                "copies, or delete the nodes' caches"
            )


def start_sequence_group(size: int, processes: Processes) -> SequenceGroup:
    """Make the groups of `size` consecutive ranks; every rank calls it."""
    count = processes.world_size // size
    if size == 1:
        return SequenceGroup(processes.rank, count)
    index, own, own_host = processes.rank // size, None, None
    for number in range(count):
        ranks = list(range(number * size, (number + 1) * size))
        group = dist.new_group(ranks, timeout=processes.timeout)
        host_group = dist.new_group(ranks, timeout=processes.timeout, backend="gloo")
        if number == index:
            own, own_host = group, host_group
    return SequenceGroup(index, count, SequenceRank(processes.rank % size, size, own), own_host)


def describe_groups(size: int, heads: int, hosts: Sequence[str]) -> list[str]:
    """The groups in one line for the log, and a second one if they cross nodes; no lines for `size` 1.

    Args:
        heads: of the model.
        hosts: every rank's host, by rank.
    """
    if size == 1:
        return []
    firsts = range(0, len(hosts), size)
    shown = [rank_list(range(first, first + size)) for first in firsts[:_MAX_GROUPS_SHOWN]]
    more = ", ..." if len(firsts) > len(shown) else ""
    split = "+".join(map(str, even_split(heads, size)))
    lines = [
        f"sequence parallelism: {len(firsts)} groups of {size} ranks ({'; '.join(shown)}{more}), each shares a pack: "
        f"its frames, and {split} heads in attention"
    ]
    crossing = [first for first in firsts if len(set(hosts[first : first + size])) > 1]
    if crossing:
        lines.append(
            f"train.sequence_parallel: {len(crossing)} of these groups cross nodes, so the exchange around attention "
            f"goes through the network; start a multiple of {size} ranks on each node"
        )
    return lines


def exchanges(
    layout: FrameLayout, layers: int, heads: int, size: int, lse_numbers: int, recomputed: bool, rank: int = 0
) -> Iterator[tuple[str, int]]:
    """The all-to-alls of a pack's forward and backward: the phase, and the elements of the largest tensor of a rank.

    Args:
        layout: of the pack.
        size: ranks that share it.
        lse_numbers: numbers of the model's precision that one float32 takes.
        recomputed: whether backward repeats the forward (train.activation_checkpointing full).
        rank: in the group.
    """
    shard = SequenceRank(rank, size)
    own_heads = even_split(heads, size)[rank]

    def elements(window: int, context: int) -> int:
        """Of a message with so many numbers for each token and head."""
        pairs = ((layout.window, window), (layout.context, context))
        own = sum(sum(group.frame_tokens[shard.part(group.frames)]) * numbers for group, numbers in pairs)
        return max(own * heads, sum(group.tokens * numbers for group, numbers in pairs) * own_heads)

    out = HEAD_DIM + lse_numbers
    for layer in range(layers):
        is_last = layer == layers - 1  # then the context has no queries
        forward = [
            elements(3 * HEAD_DIM, (2 if is_last else 3) * HEAD_DIM),
            elements(out, 0 if is_last else out),
        ]
        yield from (("forward", size) for size in forward)
        if recomputed:
            yield from (("backward", size) for size in forward)
        yield "backward", elements(4 * HEAD_DIM + out, 2 * HEAD_DIM if is_last else 4 * HEAD_DIM + out)
        yield "backward", elements(3 * HEAD_DIM, (2 if is_last else 3) * HEAD_DIM)
