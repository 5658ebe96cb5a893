"""Flags that all ranks agree on at the end of a step, so that they take the same branch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from far_scale.distributed.ledger import phase
from far_scale.distributed.process_group import Processes
from far_scale.distributed.signals import StopSignals


class StepFlags(NamedTuple):
    """Flags that are set if they are set on any rank; the same on every rank.

    Attributes:
        stop: a stop signal arrived.
        saving: a checkpoint is still being written.
        damaged: damaged clips were left out of the packs.
        save_due: it is time for a checkpoint.
    """

    stop: bool
    saving: bool
    damaged: bool
    save_due: bool


class Consensus:
    """An all-reduce of `StepFlags` over the CPU group, which overlaps with the device's work.

    Args:
        signals: the stop signals of this process, or None.
        processes: the ranks.
    """

    def __init__(self, signals: StopSignals | None, processes: Processes) -> None:
        self._signals, self._group = signals, processes.host_group
        self._running: tuple[torch.Tensor, dist.Work] | None = None

    def start(self, saving: bool, damaged: bool, save_due: bool = False) -> None:
        """Start the all-reduce.

        Args:
            saving, damaged, save_due: this rank's `StepFlags`.
        """
        stop = self._signals is not None and self._signals.received is not None
        flags = torch.tensor([int(stop), int(saving), int(damaged), int(save_due)])
        with phase("vote"):
            self._running = flags, dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def flags(self) -> StepFlags:
        """Wait for the all-reduce that was started last."""
        assert self._running is not None, "call start first"
        flags, work = self._running
        work.wait()
        return StepFlags(*map(bool, flags.tolist()))
