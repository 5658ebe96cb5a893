"""A ledger of collectives: the bytes that a rank sends in a training step, within its node and between nodes.

While a step is recorded, calls of collectives are intercepted, and their sizes, groups and phases are recorded. Only
sizes are read, so there is no synchronization with the device. Barriers and collectives of Python objects are not
recorded; a regular step has none.

Bytes are given in two ways. `message_bytes` is exact: the largest tensor that a rank passes to the call, which is the
gathered tensor of an all-gather and the unreduced tensor of a reduce-scatter. The bytes sent are those of a ring
algorithm (see `sent_bytes`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

OPERATIONS = {
    "all_reduce": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_base": "all-gather",
    "all_gather_coalesced": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "all_to_all": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
"""The collective of each function of torch.distributed and method of DeepSpeed's backend."""

_phase = "other"


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Assign the collectives that any thread starts inside to this phase of the step.

    Not a context variable, since autograd runs DeepSpeed's hooks in its own threads.
    """
    global _phase
    outer, _phase = _phase, name
    try:
        yield
    finally:
        _phase = outer


class Key(NamedTuple):
    """The key by which collectives are added up.

    Attributes:
        phase: part of the step, such as "forward" or "norm".
        operation: a value of `OPERATIONS`.
        ranks: number of ranks in the group.
        nodes: number of nodes of these ranks.
    """

    phase: str
    operation: str
    ranks: int
    nodes: int


@dataclass(frozen=True)
class Entry:
    """The collectives of one key, of one rank.

    Attributes:
        calls: their number.
        message_bytes: bytes of their tensors, see above.
    """

    key: Key
    calls: int
    message_bytes: int

    @property
    def sent(self) -> float:
        """Bytes that the rank sends, see `sent_bytes`."""
        return sent_bytes(self.key.operation, self.key.ranks, self.message_bytes)

    @property
    def between(self) -> float:
        """The part of `sent` that goes to other nodes, averaged over the group's ranks.

        NCCL's rings go through the ranks node by node, so one link per node leads to another node, and all links carry
        the same. In an all-to-all, a rank sends an equal part to each rank.
        """
        ranks, nodes = self.key.ranks, self.key.nodes
        if self.key.operation == "all-to-all":
            return self.message_bytes * (1 - 1 / nodes)
        return self.sent * nodes / ranks if nodes > 1 else 0.0

    @property
    def within(self) -> float:
        """The part of `sent` that stays on the node."""
        return self.sent - self.between


def sent_bytes(operation: str, ranks: int, message_bytes: float) -> float:
    """Bytes that each of n ranks sends in a ring: (n - 1) / n of the message, twice that for an all-reduce.

    The factors are those of nccl-tests (doc/PERFORMANCE.md, "bus bandwidth") for all-gather, reduce-scatter, all-to-all
    and all-reduce. A broadcast or reduce sends the whole message n - 1 times along a chain, on average also (n - 1) / n
    per rank. Other algorithms (trees, SHARP) differ.
    """
    return (2 if operation == "all-reduce" else 1) * (ranks - 1) / ranks * message_bytes


def table(entries: Sequence[Entry]) -> list[str]:
    """The entries as a text table, with their sum."""
    rows: list[tuple[str, ...]] = [
        ("collectives of a rank", "ranks", "nodes", "calls", "message MB", "MB sent in the node", "to other nodes")
    ]
    for entry in entries:
        key, sizes = entry.key, (entry.message_bytes, entry.within, entry.between)
        name = f"{key.phase}: {key.operation}"
        rows.append((name, str(key.ranks), str(key.nodes), str(entry.calls), *map(_megabytes, sizes)))
    sums = (sum(entry.within for entry in entries), sum(entry.between for entry in entries))
    rows.append(("sum", "", "", str(sum(entry.calls for entry in entries)), "", *map(_megabytes, sums)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 5e4 or not size else "< 0.1"


class Ledger:
    """Records the collectives of this rank.

    Args:
        hosts: every rank's node, by rank.
        backends: further objects with methods that start collectives, such as DeepSpeed's communication backend, which
            may hold references to the original functions of torch.
    """

    def __init__(self, hosts: Sequence[str], *backends: Any) -> None:
        self._hosts, self._owners = hosts, (dist, *backends)
        self._entries: dict[Key, Entry] = {}
        self._groups: dict[Any, tuple[int, int]] = {}
        self._inside = threading.local()
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """The recorded collectives, one entry per key, in the order of their first calls."""
        return list(self._entries.values())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the collectives that are started inside; clears earlier entries."""
        self._entries = {}
        with contextlib.ExitStack() as stack:
            for owner in self._owners:
                for name, operation in OPERATIONS.items():
                    if callable(function := getattr(owner, name, None)):
                        stack.callback(_restore, owner, name, vars(owner).get(name))
                        setattr(owner, name, self._recorded(function, operation))
            yield

    def _recorded(self, function: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "call", False):  # torch's function, called by a backend's method
                return function(*args, **kwargs)
            self._record(operation, [*args, *kwargs.values()])
            self._inside.call = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.call = False

        return call

    def _record(self, operation: str, arguments: list[Any]) -> None:
        group = next((value for value in arguments if isinstance(value, dist.ProcessGroup)), dist.group.WORLD)
        if group not in self._groups:
            ranks = dist.get_process_group_ranks(group)
            self._groups[group] = len(ranks), len({self._hosts[rank] for rank in ranks})
        key = Key(_phase, operation, *self._groups[group])
        size = max(_tensor_bytes(value) for value in arguments)
        with self._lock:
            entry = self._entries.get(key, Entry(key, 0, 0))
            self._entries[key] = replace(entry, calls=entry.calls + 1, message_bytes=entry.message_bytes + size)


def _tensor_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(_tensor_bytes(item) for item in argument) if isinstance(argument, (list, tuple)) else 0


def _restore(owner: Any, name: str, original: Any) -> None:
    """Restore an attribute; None if the original was an attribute of the class."""
    if original is None:
        delattr(owner, name)
    else:
        setattr(owner, name, original)
