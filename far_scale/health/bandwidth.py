"""Bandwidth of the links between ranks, in the nodes and between nodes, and of an all-reduce over all ranks.

A slow link is slow for both of its ranks. So each rank exchanges messages with two neighbours in a ring, and its faster
link counts: the rank at fault is the one with two slow links. As in NCCL, the rings between nodes connect the ranks of
the same local rank, so every network adapter is tested.
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

_BYTES = {"cuda": 128 * 2**20, "cpu": 2 * 2**20}  # of a message: some milliseconds at usual speeds
_REPEATS = 5


@dataclass(frozen=True)
class Round:
    """Disjoint pairs of ranks that exchange messages at the same time.

    Attributes:
        kind: INSIDE or BETWEEN.
        partners: the partner of each rank in a pair.
    """

    kind: str
    partners: dict[int, int]


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes/s, for pairs in each direction.

    Attributes:
        fastest: by kind, INSIDE or BETWEEN, and rank: that of the rank's faster link.
        all_reduce: bus bandwidth of an all-reduce over all ranks; infinite for a single rank.
    """

    fastest: dict[str, dict[int, float]]
    all_reduce: float


def measure_links(processes: Processes, hosts: Sequence[str]) -> Links:
    """Measure the links of all ranks; the same result on each. One or two seconds, plus NCCL's first contact.

    Args:
        hosts: every rank's host, by rank.

    Raises:
        StuckError: messages do not arrive or ranks hang; the process group cannot be used afterwards.
    """
    if processes.world_size == 1:
        return Links({}, float("inf"))
    all_ranks = list(range(processes.world_size))
    elements = _BYTES[processes.device.type] // 4
    outgoing, incoming = torch.ones(2, elements, dtype=torch.float32, device=processes.device)

    def all_reduce(values: torch.Tensor) -> Callable[[], list[dist.Work]]:
        return lambda: [dist.all_reduce(values, async_op=True)]

    # Creates the communicator of all ranks, which the pairs use, too.
    _timed(processes, all_reduce(outgoing[:1]), 1, all_ranks)
    measured: dict[int, float] = {}
    plan = rounds(hosts)
    for pairs in plan:
        partner = pairs.partners.get(processes.rank)

        def exchange(partner: int | None = partner) -> list[dist.Work]:
            if partner is None:
                return []
            messages = [dist.P2POp(dist.isend, outgoing, partner), dist.P2POp(dist.irecv, incoming, partner)]
            return dist.batch_isend_irecv(messages)

        pair = [processes.rank] if partner is None else [processes.rank, partner]
        seconds = _timed(processes, exchange, _REPEATS, pair)
        if partner is not None:
            measured[partner] = 4 * elements / seconds
    seconds = _timed(processes, all_reduce(outgoing), _REPEATS, all_ranks)
    bus = 2 * (processes.world_size - 1) / processes.world_size * 4 * elements / seconds
    results = all_gather_objects((measured, bus), processes.host_group)
    return Links(fastest_links(plan, [speeds for speeds, _ in results]), min(bus for _, bus in results))


def fastest_links(plan: Sequence[Round], measured: Sequence[dict[int, float]]) -> dict[str, dict[int, float]]:
    """The bandwidth of every rank's faster link, by kind and rank.

    Args:
        plan: the rounds that were measured.
        measured: by rank, the bandwidth with each partner. Takes the slower of both ranks' measurements, since at
            the other rank the message may have arrived early.
    """
    fastest: dict[str, dict[int, float]] = {}
    for pairs in plan:
        by_rank = fastest.setdefault(pairs.kind, {})
        for rank, partner in pairs.partners.items():
            speed = min(measured[rank][partner], measured[partner][rank])
            by_rank[rank] = max(by_rank.get(rank, 0.0), speed)
    return fastest


def rounds(hosts: Sequence[str]) -> list[Round]:
    """The rings in the nodes, then those between nodes, as rounds of pairs."""
    nodes = ranks_by_host(hosts)
    local_ranks = range(max(len(ranks) for ranks in nodes.values()))
    between = [[ranks[local] for ranks in nodes.values() if local < len(ranks)] for local in local_ranks]
    return [*_ring_rounds(INSIDE, list(nodes.values())), *_ring_rounds(BETWEEN, between)]


def _ring_rounds(kind: str, rings: list[list[int]]) -> list[Round]:
    """The even links of each ring, then the odd ones, then the last link of rings of odd length."""
    rounds_of_pairs: list[dict[int, int]] = [{}, {}, {}]
    for ring in rings:
        links = {1: 0, 2: 1}.get(len(ring), len(ring))
        for link in range(links):
            left, right = ring[link], ring[(link + 1) % len(ring)]
            partners = rounds_of_pairs[2 if link == len(ring) - 1 and len(ring) % 2 else link % 2]
            partners[left], partners[right] = right, left
    return [Round(kind, partners) for partners in rounds_of_pairs if partners]


def _timed(processes: Processes, send: Callable[[], list[dist.Work]], repeats: int, involved: list[int]) -> float:
    """Seconds of the fastest of `repeats` messages; raises on all ranks if any message did not arrive."""
    fastest, arrived = float("inf"), True
    for _ in range(repeats):
        start = time.perf_counter()
        arrived = arrived and _wait_for_messages(send(), processes.device)
        fastest = min(fastest, time.perf_counter() - start)
    # A rank that waited for a lost message arrives later by that timeout.
    wait_for_all_ranks(processes, "an exchange of messages", 2 * process_group.STUCK_SECONDS)
    stuck = {rank for ranks in all_gather_objects([] if arrived else involved, processes.host_group) for rank in ranks}
    if stuck:
        raise StuckError(
            sorted(stuck), f"wait for each other's messages for more than {process_group.STUCK_SECONDS:g} s"
        )
    return fastest


def _wait_for_messages(works: list[dist.Work], device: torch.device) -> bool:
    """Whether the messages arrive in time."""
    if device.type == "cuda":
        # NCCL's own wait blocks the GPU's stream, not this thread.
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
