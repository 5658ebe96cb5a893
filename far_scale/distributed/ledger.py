"""A ledger of collectives: what a rank sends in a training step, within its node and between nodes.

It notes the size, the group and the phase of each collective when it is called. It looks at sizes only, so no device is
waited for and the figures hold for CUDA as for CPUs. Collectives are intercepted while a step is recorded, and not
otherwise. Not noted: barriers, and collectives of Python objects (none of them belongs to a regular step).

Bytes are given in two ways. `message_bytes` is exact: the larger of the tensors that a rank gives to the call, which is
the whole gathered tensor of an all-gather and the whole unreduced tensor of a reduce-scatter. The bytes sent are a
model, that of a ring (see `sent_bytes`).
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
"""The kind of collective that a function of torch.distributed or a method of DeepSpeed's backend starts."""

_phase = "other"


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Collectives that are started inside, by any thread, belong to this phase of the step.

    It is no context variable, since autograd runs DeepSpeed's hooks in threads of its own.
    """
    global _phase
    outer, _phase = _phase, name
    try:
        yield
    finally:
        _phase = outer


class Key(NamedTuple):
    """What entries of a ledger are summed up by.

    Attributes:
        phase: the part of the step, such as "forward" or "norm".
        operation: the kind of collective, a value of `OPERATIONS`.
        ranks: of the group.
        nodes: that the group's ranks are on.
    """

    phase: str
    operation: str
    ranks: int
    nodes: int


@dataclass(frozen=True)
class Entry:
    """Collectives of one key, of one rank.

    Attributes:
        key: what they have in common.
        calls: how many.
        message_bytes: their tensors' bytes, see above.
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
        """Those of `sent` that go to another node, in the mean over the group's ranks.

        A ring goes through the ranks node by node, as NCCL lays it, so that of its n links one a node leads to
        another node, and each link carries the same. Of an all-to-all, a rank sends an equal part to each rank.
        """
        ranks, nodes = self.key.ranks, self.key.nodes
        if self.key.operation == "all-to-all":
            return self.message_bytes * (1 - 1 / nodes)
        return self.sent * nodes / ranks if nodes > 1 else 0.0

    @property
    def within(self) -> float:
        """Those of `sent` that stay on the node."""
        return self.sent - self.between


def sent_bytes(operation: str, ranks: int, message_bytes: float) -> float:
    """Bytes that each of n ranks sends in a ring: (n - 1) / n of the message, twice as much for an all-reduce.

    The factors are those of nccl-tests (doc/PERFORMANCE.md, "bus bandwidth") for all-gather, reduce-scatter, all-to-all
    and all-reduce. A broadcast or reduce passes the whole message n - 1 times along a chain, which is the same
    (n - 1) / n in the mean over the ranks. Algorithms other than rings (trees, SHARP) differ.
    """
    return (2 if operation == "all-reduce" else 1) * (ranks - 1) / ranks * message_bytes


def table(entries: Sequence[Entry]) -> list[str]:
    """The entries as lines of text, with their sum."""
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
    """Collectives of this rank, from `recording` blocks.

    Args:
        hosts: every rank's node, by rank.
        backends: objects beside torch.distributed whose methods start collectives and may hold earlier references to
            torch's functions, such as DeepSpeed's communication backend.
    """

    def __init__(self, hosts: Sequence[str], *backends: Any) -> None:
        self._hosts, self._owners = hosts, (dist, *backends)
        self._entries: dict[Key, Entry] = {}
        self._groups: dict[Any, tuple[int, int]] = {}
        self._inside = threading.local()
        self._lock = threading.Lock()

    def entries(self) -> list[Entry]:
        """One a key, in the order in which the keys were first seen."""
        return list(self._entries.values())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Note what is started inside, and forget what was noted before."""
        self._entries = {}
        with contextlib.ExitStack() as stack:
            for owner in self._owners:
                for name, operation in OPERATIONS.items():
                    if callable(function := getattr(owner, name, None)):
                        stack.callback(_restore, owner, name, vars(owner).get(name))
                        setattr(owner, name, self._noting(function, operation))
            yield

    def _noting(self, function: Callable[..., Any], operation: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "call", False):  # a backend's method calls torch's function in its turn
                return function(*args, **kwargs)
            self._note(operation, [*args, *kwargs.values()])
            self._inside.call = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.call = False

        return noted

    def _note(self, operation: str, arguments: list[Any]) -> None:
        group = next((each for each in arguments if isinstance(each, dist.ProcessGroup)), dist.group.WORLD)
        if group not in self._groups:
            ranks = dist.get_process_group_ranks(group)
            self._groups[group] = len(ranks), len({self._hosts[rank] for rank in ranks})
        key = Key(_phase, operation, *self._groups[group])
        size = max(_bytes_of(each) for each in arguments)
        with self._lock:
            entry = self._entries.get(key, Entry(key, 0, 0))
            self._entries[key] = replace(entry, calls=entry.calls + 1, message_bytes=entry.message_bytes + size)


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(_bytes_of(each) for each in argument) if isinstance(argument, (list, tuple)) else 0


def _restore(owner: Any, name: str, own: Any) -> None:
    """Set an attribute back to the owner's own, or, where that is None, to what its class has."""
    if own is None:
        delattr(owner, name)
    else:
        setattr(owner, name, own)
