"""How fast the ranks talk: each with its neighbours in its node and between nodes, and all with all.

A slow link makes both of its ends slow, so each rank talks with two neighbours, in a ring, and its better link counts:
a rank of which both links are slow is the one to blame. Ranks of equal place in their nodes make the rings between
nodes, as they do in NCCL's own, so that every network card is tried.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from far_scale.distributed import process_group
from far_scale.distributed.process_group import Processes, StuckError, all_gather_objects, wait_for_all_ranks
from far_scale.utils.hosts import ranks_by_host

INSIDE, BETWEEN = "in the node", "between nodes"

_BYTES = {"cuda": 128 * 2**20, "cpu": 2 * 2**20}  # a message: some milliseconds at the usual speeds
_REPEATS = 5


@dataclass(frozen=True)
class Round:
    """Pairs of ranks that talk at the same time, none of them in two pairs.

    Attributes:
        kind: INSIDE or BETWEEN.
        partners: of each rank that has one.
    """

    kind: str
    partners: dict[int, int]


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes/s, of pairs each way.

    Attributes:
        better: by kind, INSIDE or BETWEEN, of every rank's better link.
        all_reduce: bus bandwidth of an all-reduce over all ranks; infinite for a rank alone.
    """

    better: dict[str, dict[int, float]]
    all_reduce: float


def measure_links(processes: Processes, hosts: Sequence[str]) -> Links:
    """All ranks' links, on all ranks alike. Takes a second or two beyond NCCL's first contact.

    Args:
        hosts: every rank's, by rank.

    Raises:
        StuckError: some messages do not arrive, or ranks hang; the ranks' group is of no more use then.
    """
    if processes.world_size == 1:
        return Links({}, float("inf"))
    everyone = list(range(processes.world_size))
    numbers = _BYTES[processes.device.type] // 4
    outgoing, incoming = torch.ones(2, numbers, dtype=torch.float32, device=processes.device)

    def all_reduce(values: torch.Tensor) -> Callable[[], list[dist.Work]]:
        return lambda: [dist.all_reduce(values, async_op=True)]

    # One communicator for all; the pairs use it, too, and need none of their own.
    _timed(processes, all_reduce(outgoing[:1]), 1, everyone)
    measured: dict[int, float] = {}
    plan = rounds(hosts)
    for turn in plan:
        partner = turn.partners.get(processes.rank)

        def exchange(partner: int | None = partner) -> list[dist.Work]:
            if partner is None:
                return []
            messages = [dist.P2POp(dist.isend, outgoing, partner), dist.P2POp(dist.irecv, incoming, partner)]
            return dist.batch_isend_irecv(messages)

        pair = [processes.rank] if partner is None else [processes.rank, partner]
        seconds = _timed(processes, exchange, _REPEATS, pair)
        if partner is not None:
            measured[partner] = 4 * numbers / seconds
    seconds = _timed(processes, all_reduce(outgoing), _REPEATS, everyone)
    bus = 2 * (processes.world_size - 1) / processes.world_size * 4 * numbers / seconds
    of_ranks = all_gather_objects((measured, bus), processes.host_group)
    return Links(better_links(plan, [speeds for speeds, _ in of_ranks]), min(bus for _, bus in of_ranks))


def better_links(plan: Sequence[Round], measured: Sequence[dict[int, float]]) -> dict[str, dict[int, float]]:
    """By kind, the speed of every rank's better link.

    Args:
        plan: who talked with whom.
        measured: by rank, the speed with each partner. The slower end of a link is right: at the other, messages may
            have come early.
    """
    better: dict[str, dict[int, float]] = {}
    for turn in plan:
        of_kind = better.setdefault(turn.kind, {})
        for rank, partner in turn.partners.items():
            speed = min(measured[rank][partner], measured[partner][rank])
            of_kind[rank] = max(of_kind.get(rank, 0.0), speed)
    return better


def rounds(hosts: Sequence[str]) -> list[Round]:
    """Who talks with whom: the rings inside the nodes, then those between them, in rounds of pairs."""
    nodes = ranks_by_host(hosts)
    most = max(len(ranks) for ranks in nodes.values())
    across = [[ranks[place] for ranks in nodes.values() if place < len(ranks)] for place in range(most)]
    return [*_ring_rounds(INSIDE, list(nodes.values())), *_ring_rounds(BETWEEN, across)]


def _ring_rounds(kind: str, rings: list[list[int]]) -> list[Round]:
    """Every second link of each ring, then the others, then the last of the rings of odd length."""
    turns: list[dict[int, int]] = [{}, {}, {}]
    for ring in rings:
        links = {1: 0, 2: 1}.get(len(ring), len(ring))
        for place in range(links):
            one, other = ring[place], ring[(place + 1) % len(ring)]
            turn = turns[2 if place == len(ring) - 1 and len(ring) % 2 else place % 2]
            turn[one], turn[other] = other, one
    return [Round(kind, partners) for partners in turns if partners]


def _timed(processes: Processes, send: Callable[[], list[dist.Work]], repeats: int, involved: list[int]) -> float:
    """Seconds of the best of `repeats` messages. All ranks agree afterwards whether all arrived."""
    best, arrived = float("inf"), True
    for _ in range(repeats):
        start = time.perf_counter()
        arrived = arrived and _arrive(send(), processes.device)
        best = min(best, time.perf_counter() - start)
    # Whoever waited for a message in vain comes later by that time.
    wait_for_all_ranks(processes, "an exchange of messages", 2 * process_group.STUCK_SECONDS)
    stuck = {rank for ranks in all_gather_objects([] if arrived else involved, processes.host_group) for rank in ranks}
    if stuck:
        raise StuckError(
            sorted(stuck), f"wait for each other's messages for more than {process_group.STUCK_SECONDS:g} s"
        )
    return best


def _arrive(works: list[dist.Work], device: torch.device) -> bool:
    """Wait for messages, but not forever."""
    if device.type == "cuda":
        # NCCL's own wait is one of the GPU, not of this thread.
        deadline = time.monotonic() + process_group.STUCK_SECONDS
        while not all(work.is_completed() for work in works):
            if time.monotonic() > deadline:
                return False
        return True
    try:
        for work in works:
            work.wait(datetime.timedelta(seconds=process_group.STUCK_SECONDS))
    except RuntimeError:
        return False
    return True
